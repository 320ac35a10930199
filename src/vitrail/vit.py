"""The Vision Transformer of *An Image is Worth 16x16 Words* (arXiv 2010.11929), from the pixels to the logits.

Read it from top to bottom: a configuration, attention, the MLP, the block that joins them, the patches, the encoder
and the head. Shapes are written with these letters:

    B images in the batch       P prefix tokens (class token and registers)       D width of a token
    C channels, H and W pixels  N patches, in a grid of h rows and w columns       K classes

Nothing here knows of training, tasks or checkpoints. Parts that later papers added are in `layers.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.layers import ConvStem, LayerScale, StochasticDepth, mimetic_init, sine_positions

log = logging.getLogger("vitrail")

# GPT-2 and Google's JAX code use the tanh approximation of GELU, PyTorch's models the exact one.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


@dataclass(frozen=True)
class ViTConfig:
    """What fixes the encoder. The defaults are the paper's ViT-B/16 at 224 pixels."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    image_size: tuple[int, int] = (224, 224)
    """(height, width) in pixels that the learned positions are made for; other sizes interpolate them"""
    channels: int = 3
    mlp_ratio: float = 4.0
    class_token: bool = True
    registers: int = 0
    """extra tokens without a position, dropped at the end (arXiv 2309.16588)"""
    pool: Literal["token", "average"] = "token"
    """what stands for the picture: the class token (equation 4), or the mean of the patches (appendix D.3)"""
    positions: Literal["learned", "sine", "none"] = "learned"
    """learned 1-D positions (the paper), fixed 2-D sines and cosines (arXiv 2205.01580), or none (appendix D.4)"""
    stem: tuple[int, ...] = ()
    """channels of 3x3 convolutions before the projection: the hybrid of section 3.1, after arXiv 2106.14881"""
    qkv_bias: bool = True
    layer_scale: float | None = None
    """first value of a learned factor on each residual branch (arXiv 2103.17239); None for none"""
    drop_path: float = 0.0
    """stochastic depth: chance that the last block's branches are skipped, rising from 0 (arXiv 1603.09382)"""
    dropout: float = 0.0
    attention_init: Literal["xavier", "mimetic"] = "xavier"
    """mimetic: start attention as trained models have it, which helps small data (arXiv 2305.09828)"""
    activation: str = "gelu"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads: change one of them")
        for pixels in self.image_size:
            if pixels % self.patch:
                raise UserError(
                    f"image size {self.image_size[0]}x{self.image_size[1]} does not divide into patches of "
                    f"{self.patch} pixels: choose multiples of {self.patch}"
                )
        if self.pool == "token" and not self.class_token:
            raise UserError("pool='token' needs class_token=True; use pool='average'")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"no activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch


# Table 1 of the paper, the two smaller ones of DeiT (arXiv 2012.12877), and some for small pictures.
SIZES: dict[str, ViTConfig] = {
    "Ti/16": ViTConfig(192, 12, 3, 16),
    "S/16": ViTConfig(384, 12, 6, 16),
    "S/32": ViTConfig(384, 12, 6, 32),
    "B/16": ViTConfig(768, 12, 12, 16),
    "B/32": ViTConfig(768, 12, 12, 32),
    "L/16": ViTConfig(1024, 24, 16, 16),
    "L/32": ViTConfig(1024, 24, 16, 32),
    "H/14": ViTConfig(1280, 32, 16, 14),
    "nano/2": ViTConfig(64, 4, 4, 2, image_size=(8, 8)),
    "micro/4": ViTConfig(128, 6, 4, 4, image_size=(32, 32)),
    "mini/4": ViTConfig(192, 9, 3, 4, image_size=(32, 32)),
}


class Tokens(NamedTuple):
    """What the encoder gives for B pictures, as it enters the pooling."""

    prefix: Tensor
    """[B, P, D]: class token first, then registers"""
    patches: Tensor
    """[B, N, D], row by row"""
    grid: tuple[int, ...]
    """(h, w) with h * w = N"""


class Attention(nn.Module):
    """Multi-head attention (appendix A, equations 6 to 8); to a context it is cross-attention."""

    def __init__(self, width: int, heads: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)  # U_qkv: query, key and value in one product
        self.out = nn.Linear(width, width)  # U_msa
        self.dropout = dropout

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Mix tokens [B, N, D] with themselves or with a context [B, M, D].

        `mask` is broadcast to [B, heads, N, M]: False (or a large negative number) hides a token.
        """
        q, k, v = self.project(x, context)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(x.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, N, D/heads], and keys and values [B, heads, M, D/heads]."""
        if context is None:
            qkv = self.qkv(x)
        else:
            width, bias = x.shape[-1], self.qkv.bias
            parts = (None, None) if bias is None else (bias[:width], bias[width:])
            q = F.linear(x, self.qkv.weight[:width], parts[0])
            kv = F.linear(context, self.qkv.weight[width:], parts[1])
            k, v = rearrange(kv, "b m (two heads d) -> two b heads m d", two=2, heads=self.heads)
            return rearrange(q, "b n (heads d) -> b heads n d", heads=self.heads), k, v
        # `unflatten` and `transpose` give strided views, which fused attention reads without a copy.
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return q, k, v

    def weights(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The attention matrix A of equation 7, [B, heads, N, M]. Fused attention never forms it; pictures need it."""
        q, k, _ = self.project(x, context)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on each token alone (section 3.1)."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.dropout(self.down(self.dropout(self.activation(self.up(x)))))


class Block(nn.Module):
    """One layer of the encoder: attention, then the MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        c = config
        self.norm1 = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.attention = Attention(c.width, c.heads, c.qkv_bias)
        self.branch1 = _branch(c, drop_path)
        self.norm2 = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c.width, int(c.width * c.mlp_ratio), c.activation, c.dropout)
        self.branch2 = _branch(c, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        x = x + self.branch1(self.attention(self.norm1(x)))  # equation 2
        return x + self.branch2(self.mlp(self.norm2(x)))  # equation 3


def _branch(config: ViTConfig, drop_path: float) -> nn.Module:
    """What a residual branch passes before it is added: nothing in the paper."""
    parts: list[nn.Module] = []
    if config.layer_scale is not None:
        parts.append(LayerScale(config.width, config.layer_scale))
    if drop_path > 0:
        parts.append(StochasticDepth(drop_path))
    return nn.Sequential(*parts)


class PatchEmbedding(nn.Module):
    """Cut the picture into patches and project each to a token: the product x_p E of equation 1.

    A convolution whose stride is its kernel size is that linear map on flattened patches (the tests show it).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.stem = ConvStem(config.channels, config.stem, config.patch) if config.stem else nn.Identity()
        channels = config.stem[-1] if config.stem else config.channels
        size = config.patch // self.stem.stride if isinstance(self.stem, ConvStem) else config.patch
        self.projection = nn.Conv2d(channels, config.width, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"pictures of {height}x{width} do not divide into patches of {self.patch} pixels: "
                f"resize or pad them to multiples of {self.patch}"
            )
        return self.projection(self.stem(images))


class ViT(nn.Module):
    """The encoder (equations 1 to 4): pictures in, tokens out."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patches = PatchEmbedding(c)
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.width)) if c.class_token else None
        self.registers = nn.Parameter(torch.zeros(1, c.registers, c.width)) if c.registers else None
        if c.positions == "learned":
            self.positions = nn.Parameter(torch.empty(1, c.class_token + math.prod(c.grid), c.width))
        self.dropout = nn.Dropout(c.dropout)
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks = nn.ModuleList(Block(c, rate) for rate in rates)
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """As Google's code does it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Xavier keeps the signal's size through a layer and its gradient's on the way back.
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MLP):
                # Google's MLP starts with tiny biases in place of zeros.
                nn.init.normal_(module.up.bias, std=1e-6)
                nn.init.normal_(module.down.bias, std=1e-6)
            elif isinstance(module, Attention) and self.config.attention_init == "mimetic":
                mimetic_init(module.qkv, module.out, module.heads)
        # LeCun's normal: each token starts with the variance of its pixels.
        weight = self.patches.projection.weight
        nn.init.trunc_normal_(weight, std=math.sqrt(1 / weight[0].numel()))
        if self.patches.projection.bias is not None:
            nn.init.zeros_(self.patches.projection.bias)
        if self.config.positions == "learned":
            nn.init.normal_(self.positions, std=0.02)  # BERT's value: small beside the projected patches
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)  # equal registers would stay equal for ever

    def forward(self, images: Tensor) -> Tokens:
        """Normalised pictures [B, C, H, W] to tokens after the final norm."""
        tokens, grid = self.embed(images)
        return self.encode(tokens, grid)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pictures [B, C, H, W] to tokens [B, P + N, D] with positions (equation 1), and their grid (h, w)."""
        if images.ndim != 4 or images.shape[1] != self.config.channels:
            raise UserError(
                f"expected pictures [B, {self.config.channels}, H, W], got {list(images.shape)}: "
                "check the number of channels"
            )
        x = self.patches(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        positions = self.positions_for(grid)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        if positions is not None:
            x = x + positions
        if self.registers is not None:
            # Registers stand after the class token and have no position.
            first = 1 if self.class_token is not None else 0
            x = torch.cat([x[:, :first], self.registers.expand(len(x), -1, -1), x[:, first:]], dim=1)
        return self.dropout(x), grid

    def encode(self, tokens: Tensor, grid: tuple[int, ...]) -> Tokens:
        """Tokens [B, P + N, D] through the blocks and the final norm. Any number of patches may be left out."""
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return Tokens(tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :], grid)

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector a picture, [B, D]: y of equation 4."""
        return tokens.prefix[:, 0] if self.config.pool == "token" else tokens.patches.mean(dim=1)

    @property
    def prefix_tokens(self) -> int:
        return int(self.config.class_token) + self.config.registers

    def positions_for(self, grid: tuple[int, int]) -> Tensor | None:
        """Positions [1, (1 +) N, D] for a grid (h, w), interpolated for any but the config's own (section 3.2)."""
        if self.config.positions == "none":
            return None
        weight = self.patches.projection.weight
        if self.config.positions == "sine":
            sines = sine_positions(grid, self.config.width).to(weight)[None]
            return F.pad(sines, (0, 0, int(self.config.class_token), 0))
        if grid == self.config.grid:
            return self.positions
        _say_once(f"positions interpolated from {_by(self.config.grid)} patches to {_by(grid)}")
        return resize_positions(self.positions, self.config.grid, grid, int(self.config.class_token))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Learned positions [1, prefix + N, D] of one grid for another, by their 2-D places (section 3.2)."""
    first, grid = positions[:, :prefix], positions[:, prefix:]
    image = rearrange(grid, "1 (h w) d -> 1 d h w", h=old[0]).float()
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, rearrange(image, "1 d h w -> 1 (h w) d").to(grid.dtype)], dim=1)


class Head(nn.Module):
    """Pooled vector [B, D] to logits [B, K]: one linear layer, or with `hidden` the paper's pre-training head."""

    def __init__(self, width: int, classes: int, hidden: int | None = None, bias: float = 0.0) -> None:
        super().__init__()
        first = nn.Linear(width, hidden) if hidden else None
        self.hidden = nn.Sequential(first, nn.Tanh()) if first else nn.Identity()
        self.linear = nn.Linear(hidden or width, classes)
        # Zero weights: every class starts equally likely, and fine-tuning starts from the features as they are.
        nn.init.zeros_(self.linear.weight)
        # For binary cross-entropy a bias of -log(K) makes the first loss small (arXiv 2006.07159).
        nn.init.constant_(self.linear.bias, bias)
        if first:
            nn.init.xavier_uniform_(first.weight)
            nn.init.zeros_(first.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to [B, K]."""
        return self.linear(self.hidden(x))


def config_for(size: str | ViTConfig, **changes: object) -> ViTConfig:
    """The config of a named size (`"S/16"`), with fields changed. `image_size` may be one number."""
    if isinstance(size, str):
        if size not in SIZES:
            raise UserError(f"no size {size!r}: choose from {', '.join(SIZES)}")
        size = SIZES[size]
    if isinstance(pixels := changes.get("image_size"), int):
        changes["image_size"] = (pixels, pixels)
    return replace(size, **changes)  # type: ignore[arg-type]


def _by(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))


_said: set[str] = set()


@torch.compiler.disable
def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)
