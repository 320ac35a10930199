"""What published Vision Transformers change in the paper's model: one field per change, all plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from vitrail.errors import UserError, require
from vitrail.variants.mlp import ACTIVATIONS
from vitrail.vit import ViTConfig

Resampling = Literal["antialias", "bilinear_antialias", "bicubic", "bilinear", "bicubic_corners", "corners", "offset"]
POOLS = ("token", "average", "max", "average_max", "attention", "distilled", "token_average")


@dataclass(frozen=True)
class VariantConfig(ViTConfig):
    """The paper's fields and what replaces its components. The defaults are the paper.

    `pool` may also be max; average_max for the mean of both; attention: a learned query reads the patches (arXiv
    2106.04560); distilled: class and distillation token, each with its own head; token_average: class token and mean of
    the patches, joined.
    """

    registers: int = 0
    """extra tokens, dropped at the end (arXiv 2309.16588)"""
    qkv_bias: bool = True
    layer_scale: float | None = None
    """first value of a learned factor on each residual branch (arXiv 2103.17239); None for none"""
    activation: str = "gelu"

    # Norms
    norm: Literal["layer", "rms"] = "layer"
    """layer norm, or the root mean square alone (arXiv 1910.07467)"""
    norm_patches: bool = False
    """a norm on the projected patches, before class token and positions (AIMv2)"""
    norm_before: bool = False
    """a norm on the embedded tokens, before the first block (CLIP)"""
    norm_after: bool = True
    """the paper's norm on all tokens after the last block"""
    norm_pooled: bool = False
    """a norm on the pooled vector (BEiT, and timm's `fc_norm`)"""
    norm_after_eps: float | None = None
    """epsilon of `norm_after`, where it is not that of the blocks"""

    # Blocks
    arrangement: Literal["pre", "post", "parallel", "joint", "joint_fused"] = "pre"
    """pre: equations 2 and 3; post: the norm on the branch's output (EVA-02 E); parallel: two attentions side by side,
    then two MLPs (arXiv 2203.09795); joint: attention and MLP side by side behind one norm (arXiv 2302.05442);
    joint_fused: the same with one output product, so with one bias"""
    layer_scale_on: Literal["both", "attention"] = "both"
    """which branches `layer_scale` is on"""

    # Attention
    key_bias: bool = True
    """with `qkv_bias`: whether keys have one too (BEiT and EVA: queries and values alone)"""
    output_bias: bool = True
    """biases of attention's output and of the MLP"""
    qk_norm: bool = False
    """norms on queries and keys, head by head (arXiv 2302.05442)"""
    attention_norm: bool = False
    """a norm on what attention gathered, before its output product (arXiv 2210.06423)"""
    differential: bool = False
    """the difference of two attentions (arXiv 2410.05258)"""
    kv_heads: tuple[int, ...] = ()
    """heads of keys and values in each block, fewer than of queries (arXiv 2305.13245); empty for as many"""

    # MLP
    mlp: Literal["plain", "gated"] = "plain"
    """gated: the activation of one half times the other half (arXiv 2002.05202)"""
    mlp_hidden: int | None = None
    """width inside the MLP, behind the gate if it has one; None for width times `mlp_ratio`"""
    mlp_norm: bool = False
    """a norm behind the activation (arXiv 2210.06423)"""

    # Prefix and positions
    distillation: bool = False
    """a second class token, taught by another model (arXiv 2012.12877); it stands behind the first"""
    prefix_positions: Literal["class", "all", "none"] = "class"
    """which prefix tokens have learned positions: class and distillation token, registers too, or none"""
    resampling: Resampling = "antialias"
    """how learned positions fit another grid. antialias: bicubic, averaging where it shrinks (timm), or bilinear
    (SigLIP 2); bicubic and bilinear: without (Hugging Face); bicubic_corners: from corner to corner (torchvision);
    corners: bilinear from corner to corner (Google); offset: bicubic with 0.1 added to the new size (DINO, DINOv2)"""
    resizing: Resampling | None = None
    """the same where the model itself is made for another size; None for as above (timm has FlexiViT's and RADIO's own
    way there, and its common one for images of changing sizes)"""
    relative: Literal["none", "table", "shared", "both", "decomposed"] = "none"
    """biases on the scores by relative place: a table in each block (BEiT), one for all, both, or products of the query
    with a row's and a column's vector (arXiv 2112.01526, SAM)"""
    relative_resampling: Literal["geometric", "bilinear"] = "geometric"
    """how tables fit another grid: places in geometric progression (BEiT, timm), or evenly (Hugging Face)"""
    rotary: Literal["none", "axial", "centred", "mixed"] = "none"
    """rotations of queries and keys. axial: by row and column (EVA-02); centred: by places from -1 to 1 (DINOv3);
    mixed: by learned directions, head by head (arXiv 2403.13298)"""
    rotary_temperature: float = 10_000.0
    rotary_reference: tuple[int, int] | None = None
    """axial: rows and columns that every grid is stretched to"""
    rotary_offset: float = 0.0
    """axial: added to each row and column number"""
    rotary_first: Literal["rows", "columns"] = "rows"
    """which axis turns the first frequencies"""
    rotary_pairs: Literal["neighbours", "halves"] = "neighbours"
    """what is rotated together: channels 2i and 2i + 1, or channels i and i + half"""
    window: int = 0
    """side in patches of the windows that attention stays in (SAM); 0 for the whole image"""
    global_blocks: tuple[int, ...] = ()
    """with `window`: numbers of the blocks that attend to the whole image"""

    # Stem
    stem_blocks: int = 0
    """residual blocks of two convolutions (arXiv 1512.03385) behind each convolution of `stem` but the first"""
    floor_grid: bool = False
    """leave out the pixels right and below that are no whole patch (SigLIP at 384 pixels), in place of refusing"""
    patch_bias: bool = True
    """bias of the patch projection"""
    backbone: Literal["none", "resnetv2", "resnet", "conv"] = "none"
    """what the patches are cut from. resnetv2: the hybrid's ResNet of section 3.1 (group norm, standardised weights);
    resnet: ResNet-D with batch norm; conv: convolutions that do not overlap (MobileCLIP)"""
    backbone_layers: tuple[int, ...] = ()
    """blocks in each stage (none: the ResNet's first convolution alone); for conv its widths"""
    backbone_eps: float = 1e-5
    """epsilon of the backbone's norms"""
    backbone_weight_eps: float = 1e-8
    """resnetv2: epsilon of the standardised weights"""
    backbone_weight: Literal["variance", "deviation"] = "variance"
    """resnetv2: whether that epsilon is added to the variance (timm) or to its root (Google)"""

    # After the blocks
    neck: int | None = None
    """channels of SAM's neck, two convolutions over the patches"""
    pool_prefix: bool = False
    """whether averages and attention pooling read the prefix tokens too"""
    pool_heads: int | None = None
    """heads of the attention pooling; None for the blocks'"""
    pool_hidden: int | None = None
    """width inside the attention pooling's MLP; None for the blocks'"""
    pool_activation: str | None = None
    """activation of the attention pooling's MLP; None for the blocks'"""
    projection: int | None = None
    """width of a linear map of the pooled vector (CLIP)"""
    projection_bias: bool = False
    projection_tanh: bool = False
    """a tanh behind the projection (BERT's pooler)"""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                object.__setattr__(self, entry.name, tuple(value))  # JSON has lists for tuples
        self._check_the_paper()
        require(self, 0, math.inf, "registers", "stem_blocks")
        require(self, 1, math.inf, "hidden")
        if self.stem_blocks and len(self.stem) == 1:
            raise UserError(
                f"stem_blocks stand behind the second convolution of a stem and later ones: stem is {self.stem}"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(f"no activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}")
        self._check_tokens()
        if self.global_blocks and not self.window:
            raise UserError("global_blocks needs window: give the side of the other blocks' windows")
        if self.relative == "decomposed" and self.kv_heads:
            raise UserError("relative='decomposed' does not go with kv_heads: leave one out")
        if len(self.kv_heads) not in (0, self.depth):
            raise UserError(f"kv_heads needs a number for each of {self.depth} blocks")

    def _check_the_paper(self) -> None:
        """The rules of the paper's fields, for a whole number of patches and a way to pool that it has."""
        if self.pool not in POOLS:
            raise UserError(f"no pool {self.pool!r}: choose from {', '.join(POOLS)}")
        own = {entry.name: getattr(self, entry.name) for entry in fields(ViTConfig)}
        require(self, 1, math.inf, "patch")
        if self.floor_grid:
            own["image_size"] = tuple(pixels - pixels % self.patch for pixels in self.image_size)
        ViTConfig(**{**own, "pool": self.pool if self.pool == "token" else "average"})

    def _check_tokens(self) -> None:
        if self.pool in ("distilled", "token_average") and not self.class_token:
            raise UserError(f"pool={self.pool!r} needs class_token=True; use pool='average'")
        if self.distillation > self.class_token or (self.pool == "distilled") > self.distillation:
            raise UserError("a distillation token goes with a class token, and pool='distilled' with both")
        if self.window and self.prefix_tokens:
            raise UserError("windows hold patches alone: leave class token and registers out")
        if self.relative in ("table", "shared", "both") and (self.prefix_tokens != 1 or not self.class_token):
            raise UserError("relative tables are for patches and a class token: no registers, no distillation token")

    @property
    def prefix_tokens(self) -> int:
        """P: class token, distillation token and registers, in this order."""
        return int(self.class_token) + int(self.distillation) + self.registers

    @property
    def placed_tokens(self) -> int:
        """Prefix tokens with a learned position, always the first ones."""
        own = {"class": self.prefix_tokens - self.registers, "all": self.prefix_tokens, "none": 0}
        return own[self.prefix_positions]

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return self.mlp_hidden or int(self.width * self.mlp_ratio)

    @property
    def token_width(self) -> int:
        """Width of the final tokens."""
        return self.neck or self.width

    @property
    def pooled_width(self) -> int:
        """Width of the vector that represents the image."""
        return self.projection or self.token_width * (2 if self.pool == "token_average" else 1)


def as_variant(config: ViTConfig) -> VariantConfig:
    """The same model with every field of a variant spelled out."""
    return config if isinstance(config, VariantConfig) else VariantConfig(**vars(config))


def simplest(config: ViTConfig) -> ViTConfig:
    """The paper's config where nothing in a variant's differs from the paper."""
    own = {entry.name: getattr(config, entry.name) for entry in fields(ViTConfig)}
    added = [entry for entry in fields(config) if entry.name not in own]
    if config.pool in ("token", "average") and all(getattr(config, entry.name) == entry.default for entry in added):
        return ViTConfig(**own)
    return config
