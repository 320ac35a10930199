"""The encoder of a variant: the paper's `ViT` with the components that its config replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrail.ops import Grid, fit_positions, resize_positions, stochastic_depth
from vitrail.variants.attention import VariantAttention
from vitrail.variants.blocks import block_for
from vitrail.variants.config import VariantConfig, as_variant
from vitrail.variants.merging import unmerge
from vitrail.variants.mlp import VariantMLP
from vitrail.variants.norms import norm_for
from vitrail.variants.place import Place
from vitrail.variants.pooling import AttentionPool, Neck, Projection, pooled
from vitrail.variants.relative import DecomposedBias, RelativeTable, relative_index
from vitrail.variants.rotary import Rotary
from vitrail.variants.stems import patches_for
from vitrail.vit import Attention, Head, Tokens, ViT, ViTConfig, init_weights


class VariantViT(ViT):
    """The encoder of a `VariantConfig`. With its defaults it is `ViT`, bit for bit."""

    config: VariantConfig
    no_decay: ClassVar[tuple[str, ...]] = (*ViT.no_decay, "distillation_token", "registers")
    after_blocks: ClassVar[tuple[str, ...]] = (*ViT.after_blocks, "neck", "pooling", "norm_pooled", "projection")

    def __init__(self, config: VariantConfig) -> None:
        c = config
        super().__init__(c, patches_for(c), *(block_for(c, i) for i in range(c.depth)))
        if c.kv_heads:
            _init_shared_keys(self)
        if c.positions == "learned" and c.placed_tokens != c.prefix_tokens:
            self.positions = _tokens(c.placed_tokens + c.grid[0] * c.grid[1], c.width)
        self.distillation_token = _tokens(1, c.width) if c.distillation else None
        self.registers = _tokens(c.registers, c.width) if c.registers else None
        self.norm = norm_for(c, eps=c.norm_after_eps) if c.norm_after else nn.Identity()
        self.norm_patches = norm_for(c) if c.norm_patches else nn.Identity()
        self.norm_before = norm_for(c) if c.norm_before else nn.Identity()
        self.norm_pooled = norm_for(c, c.token_width) if c.norm_pooled else nn.Identity()
        self.rotary = Rotary(c, c.width, c.heads, c.depth) if c.rotary != "none" else None
        shared = c.relative in ("shared", "both")
        self.relative = RelativeTable(c.grid, c.heads, c.relative_resampling) if shared else None
        self.neck = Neck(c.width, c.neck) if c.neck else None
        self.pooling = _pooling(c) if c.pool == "attention" else None
        self.projection = _projection(c) if c.projection else nn.Identity()

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = self.patches(images)
        grid = tuple(x.shape[2:])
        x = self.norm_patches(x.flatten(2).transpose(1, 2))
        prefix = [t for t in (self.class_token, self.distillation_token, self.registers) if t is not None]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        return self.norm_before(self.dropout(x + self.positions_for(grid))), grid

    def positions_for(self, grid: Grid) -> Tensor:
        c = self.config
        if c.positions != "learned":
            return super().positions_for(grid)
        positions = fit_positions(self.positions, c.grid, grid, c.placed_tokens, c.resampling)
        if c.placed_tokens == c.prefix_tokens:
            return positions
        gap = positions.new_zeros(1, c.prefix_tokens - c.placed_tokens, c.width)  # registers have no position
        return torch.cat([positions[:, : c.placed_tokens], gap, positions[:, c.placed_tokens :]], dim=1)

    def encode(
        self, x: Tensor, grid: Grid, keep: Tensor | None = None, blocks: slice = slice(None), layers: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """As `ViT.encode`. Tokens that merge do so among `blocks`: every result has all tokens again."""
        c = self.config
        if not c.merge:
            return super().encode(x, grid, keep, blocks, layers)
        if keep is None and self.training and c.drop_path:
            keep = stochastic_depth(c.drop_path, torch.rand(len(x), c.depth, 2, device=x.device))
        prefix = x.shape[1] - math.prod(grid)  # with what a task has added after it
        groups, found = None, []
        for i, block in list(enumerate(self.blocks))[blocks]:
            x, groups = block(x, groups, prefix, None if keep is None else keep[:, i].to(x.dtype))
            found += [unmerge(x, groups)] if i in layers else []
        return unmerge(x, groups), found

    def blocks_on(self, grid: Grid, tokens: int) -> Sequence[Any]:
        c, device = self.config, self.patches.projection.weight.device
        if c.rotary == "none" and c.relative == "none" and not c.window:
            return list(self.blocks)
        added = max(0, tokens - c.prefix_tokens - math.prod(grid))  # by a task, after the prefix
        place = Place(grid, c.prefix_tokens + added)
        if c.relative in ("table", "shared", "both"):
            place = place._replace(pairs=relative_index(grid).to(device))
        if self.relative is not None:
            place = place._replace(bias=self.relative(None, place))
        rotations = [None] * c.depth if self.rotary is None else self.rotary(grid, device)
        return [
            partial(block, place=place._replace(rotation=rotation))
            for block, rotation in zip(self.blocks, rotations, strict=True)
        ]

    def finish(self, x: Tensor, grid: Grid) -> Tokens:
        tokens = super().finish(x, grid)
        if self.neck is None:
            return tokens
        patches = self.neck(tokens.patches.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return Tokens(patches[:, :0], patches, grid)

    def pool(self, tokens: Tokens) -> Tensor:
        c = self.config
        x = super().pool(tokens) if c.pool == "token" else pooled(*tokens[:2], c.pool, c.pool_prefix, self.pooling)
        return self.projection(self.norm_pooled(x))


def resize(encoder: ViT, image_size: tuple[int, int]) -> None:
    """Interpolate positions and relative position biases for images of another size (section 3.2)."""
    old = as_variant(encoder.config)
    encoder.config = replace(encoder.config, image_size=image_size)
    grid = encoder.config.grid
    if grid == old.grid:
        return
    if old.positions == "learned":
        how = old.resizing or old.resampling
        resized = resize_positions(encoder.positions.detach(), old.grid, grid, old.placed_tokens, how)
        encoder.positions = nn.Parameter(resized)
    for module in encoder.modules():
        relative = getattr(module, "relative", None)
        if isinstance(relative, RelativeTable | DecomposedBias) and not getattr(module, "window", 0):
            relative.resize(grid)  # in windows it does not change


class DistilledHead(Head):
    """DeiT's pair: one linear layer each for class and distillation token [B, 2, D], and the mean of their logits."""

    def __init__(self, width: int, classes: int, hidden: int | None = None, bias: float = 0.0) -> None:
        super().__init__(width, classes, hidden, bias)
        self.distillation = nn.Linear(hidden or width, classes)
        nn.init.zeros_(self.distillation.weight)
        nn.init.constant_(self.distillation.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 2, D] to [B, K]."""
        x = self.hidden(x)
        return (self.linear(x[:, 0]) + self.distillation(x[:, 1])) / 2


def head_for(config: ViTConfig, classes: int, hidden: int | None = None, bias: float = 0.0) -> Head:
    """The head for the pooled output of an encoder with this config."""
    kind = DistilledHead if config.pool == "distilled" else Head
    return kind(as_variant(config).pooled_width, classes, hidden, bias)


def _init_shared_keys(encoder: VariantViT) -> None:
    """Like `init_weights`, for queries, keys and values of different sizes."""
    for module in encoder.modules():
        if isinstance(module, VariantAttention):
            for matrix in module.qkv.weight.detach().split(module.sizes):
                nn.init.xavier_uniform_(matrix)


def _tokens(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, count, width))  # equal tokens would stay equal for ever


def _pooling(config: VariantConfig) -> AttentionPool:
    """The learned query of `pool="attention"`."""
    c, width = config, config.token_width
    attention = Attention(width, c.pool_heads or c.heads)
    mlp = VariantMLP(width, c.pool_hidden or c.hidden, c.pool_activation or c.activation)
    pooling = AttentionPool(width, attention, norm_for(c, width), mlp)
    init_weights(pooling)
    return pooling


def _projection(config: VariantConfig) -> Projection:
    width = config.token_width * (2 if config.pool == "token_average" else 1)
    projection = Projection(width, config.projection or width, config.projection_bias, config.projection_tanh)
    init_weights(projection)
    return projection
