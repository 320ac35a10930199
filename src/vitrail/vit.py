"""The Vision Transformer of *An Image is Worth 16x16 Words* (arXiv 2010.11929), from the pixels to the logits.

Nothing here depends on training, tasks or later papers; `variants/` builds on this file. Dimensions:

    B images in the batch       P prefix tokens (the class token)                 D width of a token
    C channels, H and W pixels  N patches, in a grid of h rows and w columns      K classes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import UserError, require, require_choices
from vitrail.ops import Grid, attend, check_images, fit_positions, scale_branch, sine_positions, stochastic_depth


@dataclass(frozen=True)
class ViTConfig:
    """The encoder's hyperparameters. The defaults are the paper's ViT-B/16 at 224 pixels."""

    width: int = 768  # of a token: D in the paper
    depth: int = 12  # number of blocks: L
    heads: int = 12  # of attention in each block: k
    patch: int = 16  # side of a patch in pixels: P
    image_size: tuple[int, int] = (224, 224)  # height and width in pixels; learned positions are for this size
    channels: int = 3  # of an image: C
    mlp_ratio: float = 4.0  # hidden width of the MLPs, in widths of a token
    class_token: bool = True  # before the patches (equation 1)
    pool: str = "token"  # pooling: class "token" (equation 4) or "average" of the patches (D.3)
    positions: Literal["learned", "sine", "none"] = "learned"  # 1-D (the paper), 2-D sines (arXiv 2205.01580), or none
    stem: tuple[int, ...] = ()  # hybrid (3.1): channels of the convolutions before the patches
    drop_path: float = 0.0  # stochastic depth rate of the last block, rising from 0 in the first (arXiv 1603.09382)
    dropout: float = 0.0  # after linear layers except queries, keys and values, and on the embedded tokens (B.1)
    norm_eps: float = 1e-6  # of the layer norms

    def __post_init__(self) -> None:
        require(self, 1, math.inf, "width", "depth", "heads", "patch", "channels", "image_size", "stem")
        require(self, 1 / self.width, math.inf, "mlp_ratio")
        require(self, 0, 1, "dropout", "drop_path")
        require_choices(self)
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads: change one of them")
        if any(pixels % self.patch for pixels in self.image_size):
            size = "x".join(map(str, self.image_size))
            raise UserError(f"image size {size} does not divide into patches of {self.patch} pixels: choose multiples")
        if self.pool not in ("token", "average") or (self.pool == "token" and not self.class_token):
            raise UserError(f"pool={self.pool!r}: choose average, or token with class_token=True")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def prefix_tokens(self) -> int:  # P
        return int(self.class_token)


class Tokens(NamedTuple):
    """Prefix [B, P, D] with the class token first, patches [B, N, D] row by row, and their grid (h, w)."""

    prefix: Tensor
    patches: Tensor
    grid: Grid


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Equation 6: the matrix A [B, heads, N, M] of queries [B, heads, N, d] and keys [B, heads, M, d]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention (appendix A, equations 5 to 8); with a context it is cross-attention."""

    def __init__(self, width: int, heads: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)  # U_qkv: queries, keys and values in one product
        self.out = nn.Linear(width, width)  # U_msa

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens [B, N, D] attend to themselves or a context [B, M, D]; False in `mask` [B, heads, N, M] hides."""
        q, k, v = self.project(x) if context is None else self.project(x, 0, 1) + self.project(context, 1, 3)
        x = attend(q, k, v, mask, is_causal)  # equations 6 and 7: `attention_weights(q, k) @ v` in one fused call
        return self.dropout(self.out(x.transpose(1, 2).flatten(2)))  # equation 8

    def project(self, x: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        """Queries, keys and values (equation 5), or only `first` to `last` of them: views [B, heads, N, D/heads]."""
        if last - first == 3:
            x = self.qkv(x)
        else:
            rows = slice(first * x.shape[-1], last * x.shape[-1])
            x = F.linear(x, self.qkv.weight[rows], None if self.qkv.bias is None else self.qkv.bias[rows])
        return tuple(y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in x.chunk(last - first, dim=-1))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, for each token separately (section 3.1)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))


class Block(nn.Module):
    """One layer of the encoder: attention, then the MLP, each with pre-norm and a residual path."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.norm1, self.attention = nn.LayerNorm(width, config.norm_eps), Attention(width, config.heads, True, dropout)
        self.norm2, self.mlp = nn.LayerNorm(width, config.norm_eps), MLP(width, int(width * config.mlp_ratio), dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]; stochastic depth multiplies the branches by `keep` [B, 2]."""
        x = x + scale_branch(self.attention(self.norm1(x)), keep, 0)  # equation 2
        return x + scale_branch(self.mlp(self.norm2(x)), keep, 1)  # equation 3


class PatchEmbedding(nn.Module):
    """Split images into patches and project each: x_p E of equation 1, as a convolution with stride = kernel size."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch, self.projection = patch, nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        check_images(images, self.projection.in_channels, self.patch)
        return self.projection(images)


class ViT(nn.Module):
    """The encoder (equations 1 to 4): images in, tokens out. Takes other patch embeddings (section 3.1) and blocks."""

    no_decay: ClassVar[tuple[str, ...]] = ("class_token", "positions")  # tables without weight decay (DeiT)
    after_blocks: ClassVar[tuple[str, ...]] = ("norm",)  # the layer after the blocks, for layer-wise decay

    def __init__(self, config: ViTConfig, patches: PatchEmbedding | None = None, *blocks: nn.Module) -> None:
        super().__init__()
        assert (type(config) is ViTConfig or type(self) is not ViT) and (patches or not config.stem), "use encoder_for"
        self.config = c = config
        self.patches = patches or PatchEmbedding(c.channels, c.width, c.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.width)) if c.class_token else None
        if c.positions == "learned":
            self.positions = nn.Parameter(torch.empty(1, c.prefix_tokens + math.prod(c.grid), c.width))
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(list(blocks) or [Block(c) for _ in range(c.depth)])
        self.norm: nn.Module = nn.LayerNorm(c.width, c.norm_eps)
        init_weights(self)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tokens:
        """Normalised images [B, C, H, W] to tokens after the final norm; `keep` as for `encode`."""
        x, grid = self.embed(images)
        return self.finish(self.encode(x, grid, keep)[0], grid)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] to tokens [B, P + N, D] with positions (equation 1), and their grid (h, w)."""
        x = self.patches(images)  # [B, D, h, w]
        grid, x = tuple(x.shape[2:]), x.flatten(2).transpose(1, 2)  # [B, N, D]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # [B, 1 + N, D]
        return self.dropout(x + self.positions_for(grid)), grid

    def encode(
        self, x: Tensor, grid: Grid, keep: Tensor | None = None, blocks: slice = slice(None), layers: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, T, D] after `blocks`, and hidden states after each of `layers`; `keep` is `stochastic_depth`'s."""
        if keep is None and self.training and self.config.drop_path:
            keep = stochastic_depth(self.config.drop_path, torch.rand(len(x), self.config.depth, 2, device=x.device))
        found = []
        for i, block in list(enumerate(self.blocks_on(grid, x.shape[1])))[blocks]:
            x = block(x) if keep is None else block(x, keep=keep[:, i].to(x.dtype))
            found += [x] if i in layers else []
        return x, found

    def blocks_on(self, grid: Grid, tokens: int) -> Sequence[nn.Module]:
        """The blocks that `encode` calls for so many tokens; those of variants get the positions of the tokens."""
        return list(self.blocks)

    def finish(self, x: Tensor, grid: Grid) -> Tokens:
        """The final norm; splits the tokens into prefix and patches."""
        x, prefix = self.norm(x), self.config.prefix_tokens
        return Tokens(x[:, :prefix], x[:, prefix:], grid)

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector per image, [B, D]: y of equation 4."""
        return tokens.prefix[:, 0] if self.config.pool == "token" else tokens.patches.mean(dim=1)

    def positions_for(self, grid: Grid) -> Tensor:
        """Positions [1, P + N, D] for a grid (h, w), interpolated if it differs from the config's (section 3.2)."""
        c, like = self.config, self.patches.projection.weight
        if c.positions == "learned":
            return fit_positions(self.positions, c.grid, grid, c.prefix_tokens)
        if c.positions == "none":
            return like.new_zeros(1)
        return F.pad(sine_positions(grid, c.width).to(like, non_blocking=True)[None], (0, 0, c.prefix_tokens, 0))


def init_weights(module: nn.Module) -> None:
    """Initialise as in Google's code. Parents come after their children and overwrite their values."""
    for m in reversed(list(module.modules())):
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
        if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None:
            nn.init.zeros_(m.bias)
        if isinstance(m, Attention):
            for matrix in m.qkv.weight.detach().chunk(3):  # Google scales each by its own shape
                nn.init.xavier_uniform_(matrix)
        if isinstance(m, MLP):
            for bias in [linear.bias for linear in (m.up, m.down) if linear.bias is not None]:
                nn.init.normal_(bias, std=1e-6)
        if isinstance(m, PatchEmbedding):  # LeCun normal: a token has the variance of its pixels
            nn.init.trunc_normal_(m.projection.weight, std=math.sqrt(1 / m.projection.weight[0].numel()))
        if isinstance(m, ViT) and m.config.positions == "learned":
            nn.init.normal_(m.positions, std=0.02)  # BERT's value: small compared with the projected patches


class Head(nn.Module):
    """Pooled vector [B, D] to logits [B, K]: one linear layer, or with `hidden` the paper's pre-training head."""

    def __init__(self, width: int, classes: int, hidden: int | None = None, bias: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.Tanh()) if hidden else nn.Identity()
        self.linear = nn.Linear(hidden or width, classes)
        init_weights(self.hidden)
        # Zero weights: all classes start equally likely, and fine-tuning starts from unchanged features.
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to [B, K]."""
        return self.linear(self.hidden(x))
