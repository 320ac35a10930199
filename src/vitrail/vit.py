"""The Vision Transformer of *An Image is Worth 16x16 Words* (arXiv 2010.11929), from the pixels to the logits.

Read it from top to bottom: a configuration, attention, the MLP, the block that joins them, the patches, the encoder
and the head. Shapes are written with these letters:

    B images in the batch       P prefix tokens (class token and registers)       D width of a token
    C channels, H and W pixels  N patches, in a grid of h rows and w columns       K classes

Nothing here knows of training, tasks or checkpoints. Parts that later papers added are in `layers/`, one file a kind of
part; `variant` chooses them, and without it this file is the paper: what starts with `layers.` then gives the paper's
part, or nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail import layers
from vitrail.errors import UserError
from vitrail.layers import Variant

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
    stem_stride: int = 1
    """of the first of them: 1 for small pictures, 2 for photos, whose first feature maps would cost the most"""
    stem_blocks: int = 0
    """residual blocks of two convolutions (arXiv 1512.03385) behind each of them but the first"""
    qkv_bias: bool = True
    layer_scale: float | None = None
    """first value of a learned factor on each residual branch (arXiv 2103.17239); None for none"""
    drop_path: float = 0.0
    """stochastic depth: chance that the last block's branches are skipped, rising from 0 (arXiv 1603.09382)"""
    dropout: float = 0.0
    """after every linear layer but that of queries, keys and values, and on the embedded tokens (appendix B.1)"""
    attention_init: Literal["xavier", "mimetic"] = "xavier"
    """mimetic: start attention as trained models have it, which helps small data (arXiv 2305.09828)"""
    activation: str = "gelu"
    norm_eps: float = 1e-6
    variant: Variant = field(default_factory=Variant)
    """what published models change: norms, gates, rotary and relative positions, stems, pooling"""

    def __post_init__(self) -> None:
        if isinstance(self.variant, dict):  # from JSON
            object.__setattr__(self, "variant", Variant(**self.variant))
        layers.check(self)

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
    """Multi-head attention (appendix A, equations 5 to 8); to a context it is cross-attention."""

    def __init__(
        self, width: int, heads: int, bias: bool = True, dropout: float = 0.0, kv_heads: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.sizes = [width, *[width // heads * self.kv_heads] * 2]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=bias)  # U_qkv: query, key and value in one product
        self.out = nn.Linear(width, width)  # U_msa
        self.dropout = nn.Dropout(dropout)  # as after every linear layer but qkv (appendix B.1)
        # Nothing in the paper; `layers.add_to_attention` puts a variant's parts here.
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        self.differential: layers.Differential | None = None
        self.relative: layers.RelativeTable | layers.DecomposedBias | None = None
        self.window = 0

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, place: layers.Place | None = None
    ) -> Tensor:
        """Mix tokens [B, N, D] with themselves or with a context [B, M, D].

        `mask` is broadcast to [B, heads, N, M]: False (or a large negative number) hides a token. `place` is what the
        attention of a variant knows of the tokens' places.
        """
        if self.window and place is not None and place.grid != (self.window, self.window):
            return layers.in_windows(self.forward, x, place, self.window)
        q, k, v = self.project(x, context)
        q, k, mask = layers.locate(q, k, mask, place, self.relative)
        attend = layers.attend if self.differential is None else self.differential
        x = attend(q, k, v, attn_mask=mask)  # equations 6 and 7
        return self.dropout(self.out(self.norm(x.transpose(1, 2).flatten(2))))  # equation 8

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, N, D/heads], and keys and values [B, heads, M, D/heads] (equation 5)."""
        if context is None:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        else:
            width, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            q = F.linear(x, weight[:width], None if bias is None else bias[:width])
            k, v = F.linear(context, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        # `unflatten` and `transpose` give strided views, which fused attention reads without a copy.
        per_head = self.sizes[0] // self.heads
        q, k, v = (y.unflatten(-1, (-1, per_head)).transpose(1, 2) for y in (q, k, v))
        if self.kv_heads != self.heads:  # each head of keys and values serves several of queries
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        return self.q_norm(q), self.k_norm(k), v

    def weights(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, place: layers.Place | None = None
    ) -> Tensor:
        """The attention matrix A of equation 6, [B, heads, N, M]. Fused attention never forms it; figures need it."""
        if self.window or self.differential is not None:
            raise UserError("attention in windows, or the difference of two, has no one matrix for the whole picture")
        q, k, _ = self.project(x, context)
        q, k, mask = layers.locate(q, k, mask, place, self.relative)
        return layers.attention_weights(q, k, mask)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on each token alone (section 3.1)."""

    def __init__(
        self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.activation = layers.ACTIVATIONS[activation]()
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
        self.norm1 = layers.norm_for(c)
        self.attention = attention_for(c, index)
        self.branch1 = layers.branch_for(c, drop_path)  # nothing in the paper
        self.norm2 = layers.norm_for(c)
        self.mlp = mlp_for(c)
        self.branch2 = layers.branch_for(c, drop_path, scaled=c.variant.layer_scale_on == "both")

    def forward(self, x: Tensor, place: layers.Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        x = x + self.branch1(self.attention(self.norm1(x), place=place))  # equation 2
        return x + self.branch2(self.mlp(self.norm2(x)))  # equation 3


def attention_for(config: ViTConfig, index: int) -> Attention:
    """The attention of block `index`."""
    c, v = config, config.variant
    kv_heads = v.kv_heads[index] if v.kv_heads else None
    attention = Attention(c.width, c.heads, c.qkv_bias and v.key_bias, c.dropout, kv_heads)
    layers.add_to_attention(attention, c, index)
    return attention


def mlp_for(config: ViTConfig) -> MLP | layers.GatedMLP:
    """The MLP of a block."""
    c, v = config, config.variant
    kind = layers.GatedMLP if v.mlp == "gated" else MLP
    mlp = kind(c.width, c.hidden, c.activation, c.dropout, bias=v.output_bias)
    if v.mlp_norm:
        mlp.norm = layers.norm_for(c, c.hidden)
    return mlp


def block_for(config: ViTConfig, drop_path: float, index: int) -> nn.Module:
    """Block `index`: the paper's, or the same parts in another arrangement."""
    c = config
    if c.variant.arrangement == "pre":
        return Block(c, drop_path, index)
    return layers.arranged(c, drop_path, lambda: attention_for(c, index), lambda: mlp_for(c))


class PatchEmbedding(nn.Module):
    """Cut the picture into patches and project each to a token: the product x_p E of equation 1.

    A convolution whose stride is its kernel size is that linear map on flattened patches (the tests show it).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch, self.floor = config.patch, config.variant.floor_grid
        # Without a stem these are C and the patch size; the hybrid of section 3.1 has one.
        self.stem, channels, size = layers.stem_for(config)
        self.projection = nn.Conv2d(channels, config.width, size, stride=size, bias=config.variant.patch_bias)

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
        self.norm = layers.norm_for(c, eps=c.variant.norm_after_eps) if c.variant.norm_after else nn.Identity()
        self.norm_patches, self.norm_before, self.norm_pooled = layers.outer_norms(c)
        self.rotary, self.relative = layers.relations(c)
        self.neck, self.projection = layers.last_maps(c)
        self.pooling = pooling_for(c) if c.pool == "attention" else None
        self.init_weights()

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
                layers.mimetic_init(module.qkv, module.out, module.heads)
            elif isinstance(module, Attention):
                # Google's queries, keys and values come from three matrices, each with a size of its own.
                for matrix in module.qkv.weight.detach().split(module.sizes):
                    nn.init.xavier_uniform_(matrix)
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
        if (positions := self.positions_for(grid)) is not None:
            x = x + layers.with_gap(positions, self.config.placed_tokens, self.prefix_tokens)
        return self.norm_before(self.dropout(x)), grid

    def encode(self, tokens: Tensor, grid: tuple[int, ...]) -> Tokens:
        """Tokens [B, P + N, D] through the blocks and the final norm. Any number of patches may be left out."""
        for block, place in zip(self.blocks, layers.places_for(self, grid), strict=True):
            tokens = block(tokens, place)
        tokens = self.norm(tokens)
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        if self.neck is not None:
            patches = self.neck(patches.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
            prefix = patches[:, :0]
        return Tokens(prefix, patches, grid)

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector a picture, [B, D]: y of equation 4."""
        kind, both = self.config.pool, self.config.variant.pool_prefix
        x = tokens.prefix[:, 0] if kind == "token" else layers.pooled(*tokens[:2], kind, both, self.pooling)
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
            sines = layers.sine_positions(grid, c.width).to(self.patches.projection.weight)[None]
            return F.pad(sines, (0, 0, c.placed_tokens, 0))
        if grid == c.grid:
            return self.positions
        return layers.fit_positions(self.positions, c.grid, grid, c.placed_tokens, c.variant.resampling)

    def resize(self, image_size: tuple[int, int]) -> None:
        """Keep positions, and what the attention knows of places, for pictures of another size (section 3.2)."""
        old = self.config
        self.config = new = replace(old, image_size=image_size)
        if new.grid == old.grid:
            return
        if old.positions == "learned":
            positions, how = self.positions.detach(), old.variant.resizing or old.variant.resampling
            resized = layers.resize_positions(positions, old.grid, new.grid, old.placed_tokens, how)
            self.positions = nn.Parameter(resized)
        layers.resize_relative(self, new.grid)


def pooling_for(config: ViTConfig) -> layers.AttentionPool:
    """The learned query of `pool="attention"`."""
    c, v = config, config.variant
    width = v.neck or c.width
    attention = Attention(width, v.pool_heads or c.heads)
    mlp = MLP(width, v.pool_hidden or c.hidden, v.pool_activation or c.activation)
    return layers.AttentionPool(width, attention, layers.norm_for(c, width), mlp)


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
