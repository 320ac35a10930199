"""The Vision Transformer of *An Image is Worth 16x16 Words* (arXiv 2010.11929), from the pixels to the logits.

Read it from top to bottom: a configuration, attention, the MLP, the block that joins them, the patches, the encoder
and the head. Shapes are written with these letters:

    B images in the batch       P prefix tokens (class token and registers)       D width of a token
    C channels, H and W pixels  N patches, in a grid of h rows and w columns       K classes

Nothing here knows of training, tasks or checkpoints. Parts that later papers added are in `layers/`, one file a kind of
part; `variant` chooses them, and without it this file is the paper.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.layers import (
    ACTIVATIONS,
    AttentionPool,
    Branch,
    ConvStem,
    DecomposedBias,
    Differential,
    GatedMLP,
    JointBlock,
    LayerScale,
    Neck,
    ParallelBlock,
    Place,
    PostNormBlock,
    Projection,
    RelativeTable,
    Rotary,
    StochasticDepth,
    Variant,
    backbone_for,
    in_windows,
    mimetic_init,
    relative_index,
    resize_positions,
    sine_positions,
)

log = logging.getLogger("vitrail")

Pool = Literal["token", "average", "max", "average_max", "attention", "distilled", "token_average"]


@dataclass(frozen=True)
class ViTConfig:
    """What fixes the encoder. The defaults are the paper's ViT-B/16 at 224 pixels."""

    kind: ClassVar[str] = "vit"
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
    pool: Pool = "token"
    """what stands for the picture: the class token (equation 4), or the mean of the patches (appendix D.3); max, and
    average_max for the mean of both; attention: a learned query reads the patches (arXiv 2106.04560); distilled: class
    and distillation token, each with its own head; token_average: class token and mean of the patches, joined"""
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
    variant: Variant = field(default_factory=Variant)
    """what published models change: norms, gates, rotary and relative positions, stems, pooling"""

    def __post_init__(self) -> None:
        if isinstance(self.variant, dict):  # from JSON
            object.__setattr__(self, "variant", Variant(**self.variant))
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads: change one of them")
        for pixels in self.image_size:
            if pixels % self.patch and not self.variant.floor_grid:
                raise UserError(
                    f"image size {self.image_size[0]}x{self.image_size[1]} does not divide into patches of "
                    f"{self.patch} pixels: choose multiples of {self.patch}"
                )
        if self.pool in ("token", "distilled", "token_average") and not self.class_token:
            raise UserError(f"pool={self.pool!r} needs class_token=True; use pool='average'")
        if self.variant.distillation > self.class_token or (self.pool == "distilled") > self.variant.distillation:
            raise UserError("a distillation token goes with a class token, and pool='distilled' with both")
        if self.variant.window and self.prefix_tokens:
            raise UserError("windows hold patches alone: leave class token and registers out")
        if self.variant.relative in ("table", "shared", "both") and (self.prefix_tokens != 1 or not self.class_token):
            raise UserError("relative tables are for patches and a class token: no registers, no distillation token")
        if len(self.variant.kv_heads) not in (0, self.depth):
            raise UserError(f"kv_heads needs a number for each of {self.depth} blocks")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"no activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def prefix_tokens(self) -> int:
        """P: class token, distillation token and registers, in this order."""
        return int(self.class_token) + int(self.variant.distillation) + self.registers

    @property
    def placed_tokens(self) -> int:
        """Prefix tokens with a learned position, always the first ones."""
        own = {"class": self.prefix_tokens - self.registers, "all": self.prefix_tokens, "none": 0}
        return own[self.variant.prefix_positions]

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return self.variant.mlp_hidden or int(self.width * self.mlp_ratio)

    @property
    def pooled_width(self) -> int:
        """Width of the vector that stands for the picture."""
        width = self.variant.neck or self.width
        return self.variant.projection or (2 * width if self.pool == "token_average" else width)


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

    def __init__(
        self, width: int, heads: int, bias: bool = True, dropout: float = 0.0, kv_heads: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        rows = width + 2 * width // heads * self.kv_heads
        self.qkv = nn.Linear(width, rows, bias=bias)  # U_qkv: query, key and value in one product
        self.out = nn.Linear(width, width)  # U_msa
        self.dropout = dropout
        # Nothing in the paper; `attention_for` puts a variant's parts here.
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        self.differential: Differential | None = None
        self.relative: RelativeTable | DecomposedBias | None = None
        self.window = 0

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, place: Place | None = None
    ) -> Tensor:
        """Mix tokens [B, N, D] with themselves or with a context [B, M, D].

        `mask` is broadcast to [B, heads, N, M]: False (or a large negative number) hides a token.
        """
        if self.window and place is not None:
            return in_windows(lambda part, inside: self.attend(part, None, None, inside), x, place, self.window)
        return self.attend(x, context, mask, place)

    def attend(self, x: Tensor, context: Tensor | None, mask: Tensor | None, place: Place | None) -> Tensor:
        q, k, v = self.project(x, context)
        q, k, mask = self.locate(q, k, mask, place)
        if self.kv_heads != self.heads:  # each head of keys and values serves several of queries
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        dropout = self.dropout if self.training else 0.0
        if self.differential is None:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            x = self.differential(q, k, v, mask, dropout)
        return self.out(self.norm(x.transpose(1, 2).flatten(2)))

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
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        # `unflatten` and `transpose` give strided views, which fused attention reads without a copy.
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = qkv.unflatten(-1, (sum(heads), -1)).transpose(1, 2).split(heads, dim=1)
        return self.q_norm(q), self.k_norm(k), v

    def locate(
        self, q: Tensor, k: Tensor, mask: Tensor | None, place: Place | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, keys and mask with what a variant knows of places: rotations, and biases on the scores."""
        if place is None:
            return q, k, mask
        if place.rotation is not None:
            q, k = (place.rotation.apply(y, place.prefix) for y in (q, k))
        bias = place.bias
        if self.relative is not None:
            own = self.relative(q, place)
            bias = own if bias is None else bias + own
        if bias is None or mask is None:
            return q, k, mask if bias is None else bias.to(q.dtype)
        return q, k, (bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask).to(q.dtype)

    def weights(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, place: Place | None = None
    ) -> Tensor:
        """The attention matrix A of equation 7, [B, heads, N, M]. Fused attention never forms it; pictures need it."""
        if self.window or self.differential is not None:
            raise UserError("attention in windows, or the difference of two, has no one matrix for the whole picture")
        q, k, _ = self.project(x, context)
        q, k, mask = self.locate(q, k, mask, place)
        scores = q @ k.repeat_interleave(self.heads // self.kv_heads, dim=1).transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on each token alone (section 3.1)."""

    def __init__(
        self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.activation = ACTIVATIONS[activation]()
        self.norm: nn.Module = nn.Identity()  # nothing in the paper
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.dropout(self.down(self.norm(self.dropout(self.activation(self.up(x))))))


class Block(nn.Module):
    """One layer of the encoder: attention, then the MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0, index: int = 0) -> None:
        super().__init__()
        c = config
        self.norm1 = norm_for(c)
        self.attention = attention_for(c, index)
        self.branch1 = _branch(c, drop_path)
        self.norm2 = norm_for(c)
        self.mlp = mlp_for(c)
        self.branch2 = _branch(c, drop_path, scaled=c.variant.layer_scale_on == "both")

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        x = x + self.branch1(self.attention(self.norm1(x), place=place))  # equation 2
        return x + self.branch2(self.mlp(self.norm2(x)))  # equation 3


def _branch(config: ViTConfig, drop_path: float, scaled: bool = True) -> nn.Module:
    """What a residual branch passes before it is added: nothing in the paper."""
    parts: list[nn.Module] = []
    if config.layer_scale is not None and scaled:
        parts.append(LayerScale(config.width, config.layer_scale))
    if drop_path > 0:
        parts.append(StochasticDepth(drop_path))
    return nn.Sequential(*parts)


def norm_for(config: ViTConfig, width: int | None = None, eps: float | None = None) -> nn.Module:
    """A norm of `width` channels, or of a token's."""
    kind = nn.RMSNorm if config.variant.norm == "rms" else nn.LayerNorm
    return kind(width or config.width, eps=config.norm_eps if eps is None else eps)


def attention_for(config: ViTConfig, index: int) -> Attention:
    """The attention of block `index`: the paper's, with the parts that the variant adds."""
    c, v = config, config.variant
    per_head = c.width // c.heads
    bias = c.qkv_bias and v.key_bias
    attention = Attention(c.width, c.heads, bias, kv_heads=v.kv_heads[index] if v.kv_heads else None)
    if c.qkv_bias and not v.key_bias:
        attention.q_bias, attention.v_bias = (nn.Parameter(torch.zeros(c.width)) for _ in range(2))
    if not v.output_bias:
        attention.out.register_parameter("bias", None)
    if v.qk_norm:
        attention.q_norm, attention.k_norm = norm_for(c, per_head), norm_for(c, per_head)
    if v.attention_norm:
        attention.norm = norm_for(c)
    if v.differential:
        attention.differential = Differential(per_head, index)
    if v.window and index not in v.global_blocks:
        attention.window = v.window
    if v.relative == "decomposed":
        attention.relative = DecomposedBias((v.window, v.window) if attention.window else c.grid, per_head)
    elif v.relative in ("table", "both"):
        attention.relative = RelativeTable(c.grid, c.heads, v.relative_resampling)
    return attention


def mlp_for(config: ViTConfig, hidden: int | None = None, activation: str | None = None) -> MLP | GatedMLP:
    """The MLP of a block."""
    v = config.variant
    kind = GatedMLP if v.mlp == "gated" else MLP
    mlp = kind(
        config.width, hidden or config.hidden, activation or config.activation, config.dropout, bias=v.output_bias
    )
    if v.mlp_norm:
        mlp.norm = norm_for(config, hidden or config.hidden)
    return mlp


def block_for(config: ViTConfig, drop_path: float, index: int) -> nn.Module:
    """Block `index` in the config's arrangement: `Block` is the paper's."""
    c, arrangement = config, config.variant.arrangement
    if arrangement == "pre":
        return Block(c, drop_path, index)
    if arrangement == "post":
        first, second = _branch(c, drop_path), _branch(c, drop_path)
        return PostNormBlock(attention_for(c, index), norm_for(c), first, mlp_for(c), norm_for(c), second)
    if arrangement == "parallel":
        attentions = [Branch(norm_for(c), attention_for(c, index), _branch(c, drop_path)) for _ in range(2)]
        return ParallelBlock(attentions, [Branch(norm_for(c), mlp_for(c), _branch(c, drop_path)) for _ in range(2)])
    block = JointBlock(norm_for(c), attention_for(c, index), mlp := mlp_for(c), _branch(c, drop_path))
    if arrangement == "joint_fused":
        mlp.down.register_parameter("bias", None)  # attention's output product has the one of both
    return block


class PatchEmbedding(nn.Module):
    """Cut the picture into patches and project each to a token: the product x_p E of equation 1.

    A convolution whose stride is its kernel size is that linear map on flattened patches (the tests show it).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch, self.floor = config.patch, config.variant.floor_grid
        self.stem: nn.Module = nn.Identity()
        channels, size = config.channels, config.patch
        if config.stem or config.variant.backbone != "none":
            stem = (
                ConvStem(channels, config.stem, config.patch) if config.stem else backbone_for(channels, config.variant)
            )
            if size % stem.stride:
                raise UserError(f"patches of {size} pixels are cut from every {stem.stride}th: choose a multiple of it")
            self.stem, channels, size = stem, stem.width, size // stem.stride
        bias = config.variant.patch_bias
        self.projection = nn.Conv2d(channels, config.width, kernel_size=size, stride=size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        height, width = images.shape[2:]
        if (height % self.patch or width % self.patch) and not self.floor:
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
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, c.width)) if c.variant.distillation else None
        self.registers = nn.Parameter(torch.zeros(1, c.registers, c.width)) if c.registers else None
        if c.positions == "learned":
            self.positions = nn.Parameter(torch.empty(1, c.placed_tokens + math.prod(c.grid), c.width))
        self.dropout = nn.Dropout(c.dropout)
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks = nn.ModuleList(block_for(c, rate, i) for i, rate in enumerate(rates))
        self.norm = norm_for(c, eps=c.variant.norm_after_eps) if c.variant.norm_after else nn.Identity()
        self.add_parts()
        self.init_weights()

    def add_parts(self) -> None:
        """What a variant has beside the blocks: nothing in the paper."""
        c, v = self.config, self.config.variant
        self.norm_patches = norm_for(c) if v.norm_patches else nn.Identity()
        self.norm_before = norm_for(c) if v.norm_before else nn.Identity()
        self.rotary = Rotary(v, c.width, c.heads, c.depth) if v.rotary != "none" else None
        shared = v.relative in ("shared", "both")
        self.relative = RelativeTable(c.grid, c.heads, v.relative_resampling) if shared else None
        self.neck = Neck(c.width, v.neck) if v.neck else None
        width = v.neck or c.width
        self.pooling: nn.Module | None = None
        if c.pool == "attention":
            attention = Attention(width, v.pool_heads or c.heads)
            mlp = MLP(width, v.pool_hidden or c.hidden, v.pool_activation or c.activation)
            self.pooling = AttentionPool(width, attention, norm_for(c, width), mlp)
        self.norm_pooled = norm_for(c, width) if v.norm_pooled else nn.Identity()
        self.projection: nn.Module = nn.Identity()
        if v.projection:
            width *= 2 if c.pool == "token_average" else 1
            self.projection = Projection(width, v.projection, v.projection_bias, v.projection_tanh)

    def init_weights(self) -> None:
        """As Google's code does it."""
        if self.patches.projection.weight.is_meta:
            return  # weights without memory have no first values
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Xavier keeps the signal's size through a layer and its gradient's on the way back.
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MLP):
                # Google's MLP starts with tiny biases in place of zeros.
                for bias in (module.up.bias, module.down.bias):
                    if bias is not None:
                        nn.init.normal_(bias, std=1e-6)
            elif isinstance(module, Attention) and self.config.attention_init == "mimetic":
                mimetic_init(module.qkv, module.out, module.heads)
        # LeCun's normal: each token starts with the variance of its pixels.
        weight = self.patches.projection.weight
        nn.init.trunc_normal_(weight, std=math.sqrt(1 / weight[0].numel()))
        if self.patches.projection.bias is not None:
            nn.init.zeros_(self.patches.projection.bias)
        if self.config.positions == "learned":
            nn.init.normal_(self.positions, std=0.02)  # BERT's value: small beside the projected patches
        for tokens in (self.registers, self.distillation_token):
            if tokens is not None:
                nn.init.normal_(tokens, std=0.02)  # equal tokens would stay equal for ever

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
        x = self.norm_patches(x.flatten(2).transpose(1, 2))
        prefix = [t for t in (self.class_token, self.distillation_token, self.registers) if t is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        positions = self.positions_for(grid)
        if positions is not None:
            placed, without = self.config.placed_tokens, self.prefix_tokens - self.config.placed_tokens
            if without:  # registers stand behind the class token and have no position
                zeros = positions.new_zeros(1, without, positions.shape[2])
                positions = torch.cat([positions[:, :placed], zeros, positions[:, placed:]], dim=1)
            x = x + positions
        return self.norm_before(self.dropout(x)), grid

    def encode(self, tokens: Tensor, grid: tuple[int, ...]) -> Tokens:
        """Tokens [B, P + N, D] through the blocks and the final norm. Any number of patches may be left out."""
        for block, place in zip(self.blocks, self.places(grid), strict=True):
            tokens = block(tokens, place)
        tokens = self.norm(tokens)
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        if self.neck is not None:
            patches = self.neck(patches.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
            prefix = patches[:, :0]
        return Tokens(prefix, patches, grid)

    def places(self, grid: tuple[int, ...]) -> list[Place | None]:
        """For each block, what the attention of a variant asks about the tokens' places; the paper's asks nothing."""
        v = self.config.variant
        if v.rotary == "none" and v.relative == "none" and not v.window:
            return [None] * len(self.blocks)
        place = Place(grid, self.prefix_tokens)
        if v.relative in ("table", "shared", "both"):
            place = place._replace(pairs=relative_index(grid).to(self.patches.projection.weight.device))
        if self.relative is not None:
            place = place._replace(bias=self.relative(None, place))
        if self.rotary is None:
            return [place] * len(self.blocks)
        return [place._replace(rotation=turn) for turn in self.rotary(grid, self.patches.projection.weight.device)]

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector a picture, [B, D]: y of equation 4."""
        kind = self.config.pool
        if kind == "token":
            x = tokens.prefix[:, 0]
        elif kind == "distilled":
            x = tokens.prefix[:, :2]  # [B, 2, D], a head for each
        else:
            read = tokens.patches
            if self.config.variant.pool_prefix:
                read = torch.cat([tokens.prefix, read], dim=1)
            if self.pooling is not None:
                x = self.pooling(read)
            elif kind == "average":
                x = read.mean(dim=1)
            elif kind == "token_average":
                x = torch.cat([tokens.prefix[:, 0], read.mean(dim=1)], dim=1)
            else:
                x = read.amax(dim=1) if kind == "max" else 0.5 * (read.amax(dim=1) + read.mean(dim=1))
        return self.projection(self.norm_pooled(x))

    @property
    def prefix_tokens(self) -> int:
        return self.config.prefix_tokens

    def positions_for(self, grid: tuple[int, int]) -> Tensor | None:
        """Positions [1, (1 +) N, D] for a grid (h, w), interpolated for any but the config's own (section 3.2)."""
        c = self.config
        if c.positions == "none":
            return None
        if c.positions == "sine":
            sines = sine_positions(grid, c.width).to(self.patches.projection.weight)[None]
            return F.pad(sines, (0, 0, c.placed_tokens, 0))
        if grid == c.grid:
            return self.positions
        _say_once(f"positions interpolated from {_by(c.grid)} patches to {_by(grid)}")
        return resize_positions(self.positions, c.grid, grid, c.placed_tokens, c.variant.resampling)

    def resize(self, image_size: tuple[int, int]) -> None:
        """Keep positions, and what the attention knows of places, for pictures of another size (section 3.2)."""
        old = self.config
        self.config = new = replace(old, image_size=image_size)
        if new.grid == old.grid:
            return
        if old.positions == "learned":
            positions = self.positions.detach()
            how = old.variant.resizing or old.variant.resampling
            self.positions = nn.Parameter(resize_positions(positions, old.grid, new.grid, old.placed_tokens, how))
        for module in self.modules():
            whole = isinstance(module, ViT) or (isinstance(module, Attention) and not module.window)
            if whole and isinstance(relative := module.relative, RelativeTable | DecomposedBias):
                relative.resize(new.grid)


class Head(nn.Module):
    """Pooled vector [B, D] to logits [B, K]: one linear layer, or with `hidden` the paper's pre-training head.

    `distilled` is DeiT's pair: class and distillation token [B, 2, D] each have a layer, and the logits are averaged.
    """

    def __init__(
        self, width: int, classes: int, hidden: int | None = None, bias: float = 0.0, distilled: bool = False
    ) -> None:
        super().__init__()
        first = nn.Linear(width, hidden) if hidden else None
        self.hidden = nn.Sequential(first, nn.Tanh()) if first else nn.Identity()
        self.linear = nn.Linear(hidden or width, classes)
        self.distillation = nn.Linear(hidden or width, classes) if distilled else None
        for linear in filter(None, (self.linear, self.distillation)):
            # Zero weights: every class starts equally likely, and fine-tuning starts from the features as they are.
            nn.init.zeros_(linear.weight)
            # For binary cross-entropy a bias of -log(K) makes the first loss small (arXiv 2006.07159).
            nn.init.constant_(linear.bias, bias)
        if first:
            nn.init.xavier_uniform_(first.weight)
            nn.init.zeros_(first.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to [B, K]."""
        x = self.hidden(x)
        if self.distillation is None:
            return self.linear(x)
        return (self.linear(x[:, 0]) + self.distillation(x[:, 1])) / 2


def head_for(config: ViTConfig, classes: int, hidden: int | None = None, bias: float = 0.0) -> Head:
    """The head that reads what an encoder of this config pools."""
    return Head(config.pooled_width, classes, hidden, bias, distilled=config.pool == "distilled")


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


def _say_once(message: str) -> None:
    # `torch.compiler.disable` would say it in compiled models too, but imports the compiler, which takes seconds.
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        log.warning(message)
