"""Parts that published variants of the Vision Transformer swap into the paper's model: one file a kind of part."""

from vitrail.layers.attention import Differential, attend, attention_weights, mimetic_init
from vitrail.layers.blocks import Branch, JointBlock, ParallelBlock, PostNormBlock
from vitrail.layers.build import (
    add_to_attention,
    arranged,
    branch_for,
    check,
    last_maps,
    norm_for,
    outer_norms,
    places_for,
    relations,
    resize_relative,
    stem_for,
)
from vitrail.layers.mlp import ACTIVATIONS, GatedMLP, QuickGELU
from vitrail.layers.place import Place, locate
from vitrail.layers.pooling import AttentionPool, ChannelNorm, Neck, Projection, pooled
from vitrail.layers.positions import fit_positions, resize_positions, sine_positions, with_gap
from vitrail.layers.relative import DecomposedBias, RelativeTable, relative_index, resize_table
from vitrail.layers.residual import LayerScale, StochasticDepth
from vitrail.layers.rotary import Rotary, Rotation
from vitrail.layers.stems import ConvStem, PatchStem, ResNet, backbone_for
from vitrail.layers.variant import Variant
from vitrail.layers.windows import in_windows

__all__ = [
    "ACTIVATIONS",
    "AttentionPool",
    "Branch",
    "ChannelNorm",
    "ConvStem",
    "DecomposedBias",
    "Differential",
    "GatedMLP",
    "JointBlock",
    "LayerScale",
    "Neck",
    "ParallelBlock",
    "PatchStem",
    "Place",
    "PostNormBlock",
    "Projection",
    "QuickGELU",
    "RelativeTable",
    "ResNet",
    "Rotary",
    "Rotation",
    "StochasticDepth",
    "Variant",
    "add_to_attention",
    "arranged",
    "attend",
    "attention_weights",
    "backbone_for",
    "branch_for",
    "check",
    "fit_positions",
    "in_windows",
    "last_maps",
    "locate",
    "mimetic_init",
    "norm_for",
    "outer_norms",
    "places_for",
    "pooled",
    "relations",
    "relative_index",
    "resize_positions",
    "resize_relative",
    "resize_table",
    "sine_positions",
    "stem_for",
    "with_gap",
]
