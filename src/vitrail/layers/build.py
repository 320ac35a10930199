"""Which parts a config asks for, beside those of the paper, and where they go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitrail.errors import UserError
from vitrail.layers.attention import Differential
from vitrail.layers.blocks import Branch, JointBlock, ParallelBlock, PostNormBlock
from vitrail.layers.mlp import ACTIVATIONS
from vitrail.layers.place import Place
from vitrail.layers.pooling import Neck, Projection
from vitrail.layers.relative import DecomposedBias, RelativeTable, relative_index
from vitrail.layers.residual import LayerScale, StochasticDepth
from vitrail.layers.rotary import Rotary
from vitrail.layers.stems import ConvStem, backbone_for

if TYPE_CHECKING:
    from vitrail.vit import Attention, ViT, ViTConfig


def check(config: ViTConfig) -> None:
    """Refuse numbers that mean no model, and parts that do not go together.

    Raises:
        UserError: it says which.
    """
    c, v = config, config.variant
    for name in ("width", "depth", "heads", "patch", "channels"):
        if getattr(c, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(c, name)}")
    if c.registers < 0:
        raise UserError(f"registers must not be negative, got {c.registers}")
    if not (0 < c.width * c.mlp_ratio < math.inf and c.hidden >= 1):
        raise UserError(f"mlp_ratio times the width {c.width} must be at least 1 and finite, got {c.mlp_ratio}")
    if min(c.stem, default=1) < 1:
        raise UserError(f"stem is the channels of its convolutions, each at least 1, got {c.stem}")
    if c.stem_blocks < 0:
        raise UserError(f"stem_blocks must not be negative, got {c.stem_blocks}")
    if c.stem_blocks and len(c.stem) == 1:
        raise UserError(f"stem_blocks stand behind the second convolution of a stem and later ones: stem is {c.stem}")
    if min(c.image_size) < 1:
        raise UserError(f"image_size is a height and a width in pixels, got {c.image_size}")
    for name in ("dropout", "drop_path"):
        if not 0 <= getattr(c, name) < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {getattr(c, name)}")
    if c.width % c.heads:
        raise UserError(f"width {c.width} does not divide into {c.heads} heads: change one of them")
    if any(pixels % c.patch for pixels in c.image_size) and not v.floor_grid:
        raise UserError(
            f"image size {c.image_size[0]}x{c.image_size[1]} does not divide into patches of {c.patch} pixels: "
            f"choose multiples of {c.patch}"
        )
    if c.activation not in ACTIVATIONS:
        raise UserError(f"no activation {c.activation!r}: choose from {', '.join(ACTIVATIONS)}")
    if c.pool in ("token", "distilled", "token_average") and not c.class_token:
        raise UserError(f"pool={c.pool!r} needs class_token=True; use pool='average'")
    if v.distillation > c.class_token or (c.pool == "distilled") > v.distillation:
        raise UserError("a distillation token goes with a class token, and pool='distilled' with both")
    if v.window and c.prefix_tokens:
        raise UserError("windows hold patches alone: leave class token and registers out")
    if v.relative in ("table", "shared", "both") and (c.prefix_tokens != 1 or not c.class_token):
        raise UserError("relative tables are for patches and a class token: no registers, no distillation token")
    if len(v.kv_heads) not in (0, c.depth):
        raise UserError(f"kv_heads needs a number for each of {c.depth} blocks")


def norm_for(config: ViTConfig, width: int | None = None, eps: float | None = None) -> nn.Module:
    """A norm of `width` channels, or of a token's: the paper's layer norm, or another kind."""
    kind = nn.RMSNorm if config.variant.norm == "rms" else nn.LayerNorm
    return kind(width or config.width, eps=config.norm_eps if eps is None else eps)


def branch_for(config: ViTConfig, drop_path: float, scaled: bool = True) -> nn.Module:
    """What a residual branch passes before it is added: nothing in the paper."""
    parts: list[nn.Module] = []
    if config.layer_scale is not None and scaled:
        parts.append(LayerScale(config.width, config.layer_scale))
    if drop_path > 0:
        parts.append(StochasticDepth(drop_path))
    return nn.Sequential(*parts)


def add_to_attention(attention: Attention, config: ViTConfig, index: int) -> None:
    """Put the parts that a variant has in the attention of block `index` into it."""
    c, v = config, config.variant
    per_head = c.width // c.heads
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


def arranged(
    config: ViTConfig, drop_path: float, attention: Callable[[], nn.Module], mlp: Callable[[], nn.Module]
) -> nn.Module:
    """A block in another arrangement than the paper's, from what makes an attention and what makes an MLP."""
    c, arrangement = config, config.variant.arrangement
    if arrangement == "post":
        first, second = branch_for(c, drop_path), branch_for(c, drop_path)
        return PostNormBlock(attention(), norm_for(c), first, mlp(), norm_for(c), second)
    if arrangement == "parallel":
        attentions = [Branch(norm_for(c), attention(), branch_for(c, drop_path)) for _ in range(2)]
        return ParallelBlock(attentions, [Branch(norm_for(c), mlp(), branch_for(c, drop_path)) for _ in range(2)])
    block = JointBlock(norm_for(c), attention(), joined := mlp(), branch_for(c, drop_path))
    if arrangement == "joint_fused":
        joined.get_submodule("down").register_parameter("bias", None)  # attention's product has the one of both
    return block


def stem_for(config: ViTConfig) -> tuple[nn.Module, int, int]:
    """What the pixels pass before they are cut into patches; its channels, and the side of a patch in its output."""
    c = config
    if not c.stem and c.variant.backbone == "none":
        return nn.Identity(), c.channels, c.patch
    if c.stem_stride not in (1, 2):
        raise UserError(f"the stem's first stride is 1 or 2, not {c.stem_stride}")
    own = ConvStem(c.channels, c.stem, c.patch, c.stem_stride, c.stem_blocks) if c.stem else None
    found = own or backbone_for(c.channels, c.variant)
    if c.patch % found.stride:
        raise UserError(f"patches of {c.patch} pixels are cut from every {found.stride}th: choose a multiple of it")
    return found, found.width, c.patch // found.stride


def outer_norms(config: ViTConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Norms on projected patches, on embedded tokens and on the pooled vector: none in the paper."""
    c, v = config, config.variant
    patches = norm_for(c) if v.norm_patches else nn.Identity()
    before = norm_for(c) if v.norm_before else nn.Identity()
    return patches, before, norm_for(c, v.neck or c.width) if v.norm_pooled else nn.Identity()


def relations(config: ViTConfig) -> tuple[Rotary | None, RelativeTable | None]:
    """What all blocks know of the tokens' places beside their positions: nothing in the paper."""
    c, v = config, config.variant
    rotary = Rotary(v, c.width, c.heads, c.depth) if v.rotary != "none" else None
    shared = v.relative in ("shared", "both")
    return rotary, RelativeTable(c.grid, c.heads, v.relative_resampling) if shared else None


def last_maps(config: ViTConfig) -> tuple[Neck | None, nn.Module]:
    """What maps the final patches, and what maps the pooled vector: nothing in the paper."""
    c, v = config, config.variant
    neck = Neck(c.width, v.neck) if v.neck else None
    if not v.projection:
        return neck, nn.Identity()
    width = (v.neck or c.width) * (2 if c.pool == "token_average" else 1)
    return neck, Projection(width, v.projection, v.projection_bias, v.projection_tanh)


def places_for(encoder: ViT, grid: tuple[int, ...]) -> list[Place | None]:
    """For each block, what the attention of a variant asks about the tokens' places; the paper's asks nothing."""
    v, device = encoder.config.variant, encoder.patches.projection.weight.device
    if v.rotary == "none" and v.relative == "none" and not v.window:
        return [None] * len(encoder.blocks)
    place = Place(grid, encoder.prefix_tokens)
    if v.relative in ("table", "shared", "both"):
        place = place._replace(pairs=relative_index(grid).to(device))
    if encoder.relative is not None:
        place = place._replace(bias=encoder.relative(None, place))
    if encoder.rotary is None:
        return [place] * len(encoder.blocks)
    return [place._replace(rotation=turn) for turn in encoder.rotary(grid, device)]


def resize_relative(encoder: ViT, grid: tuple[int, int]) -> None:
    """Keep what attention has learned of relative places for another grid; in windows it stays as it is."""
    for module in encoder.modules():
        relative = getattr(module, "relative", None)
        if isinstance(relative, RelativeTable | DecomposedBias) and not getattr(module, "window", 0):
            relative.resize(grid)
