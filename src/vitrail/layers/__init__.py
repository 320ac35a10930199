"""Parts that published variants of the Vision Transformer swap into the paper's model: one file a kind of part."""

from vitrail.layers.attention import Differential, mimetic_init
from vitrail.layers.blocks import Branch, JointBlock, ParallelBlock, PostNormBlock
from vitrail.layers.mlp import ACTIVATIONS, GatedMLP, QuickGELU
from vitrail.layers.place import Place
from vitrail.layers.pooling import AttentionPool, ChannelNorm, Neck, Projection
from vitrail.layers.positions import resize_positions, sine_positions
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
    "backbone_for",
    "in_windows",
    "mimetic_init",
    "relative_index",
    "resize_positions",
    "resize_table",
    "sine_positions",
]
