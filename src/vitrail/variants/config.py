"""What published Vision Transformers change in the paper's model: one field per change, all plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from vitrail.errors import UserError, require, require_choices
from vitrail.vit import ViTConfig

Resampling = Literal["antialias", "bilinear_antialias", "bicubic", "bilinear", "bicubic_corners", "corners", "offset"]
Pool = Literal["token", "average", "max", "average_max", "attention", "distilled", "token_average"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
"""the names of `ACTIVATIONS`"""


@dataclass(frozen=True)
class VariantConfig(ViTConfig):
    """The paper's fields, and fields that replace its components. The defaults are the paper's model.

    `pool` may also be max; average_max for the mean of both; attention: a learned query reads the patches (arXiv
    2106.04560); distilled: class and distillation token, each with its own head; token_average: class token and mean of
    the patches, joined.
    """

    pool: Pool = "token"
    """how tokens become one vector per image"""
    registers: int = 0
    """number of register tokens: extra tokens that are dropped at the end (arXiv 2309.16588)"""
    qkv_bias: bool = True
    layer_scale: float | None = None
    """layer scale: initial value of a learned factor on each residual branch (arXiv 2103.17239); None for no factor"""
    activation: Activation = "gelu"
    """activation of the MLPs"""

    # Norms
    norm: Literal["layer", "rms"] = "layer"
    """layer: layer norm; rms: RMS norm (arXiv 1910.07467)"""
    norm_patches: bool = False
    """a norm on the projected patches, before class token and positions (AIMv2)"""
    norm_before: bool = False
    """a norm on the embedded tokens, before the first block (CLIP)"""
    norm_after: bool = True
    """the paper's norm on all tokens after the last block"""
    norm_pooled: bool = False
    """a norm on the pooled vector (BEiT, and timm's `fc_norm`)"""
    norm_after_eps: float | None = None
    """epsilon of `norm_after`; None: as in the blocks"""

    # Blocks
    arrangement: Literal["pre", "post", "parallel", "joint", "joint_fused"] = "pre"
    """pre: equations 2 and 3; post: norm on the branch's output (EVA-02 E); parallel: two attentions in parallel, then
    two MLPs (arXiv 2203.09795); joint: attention and MLP in parallel after one norm (arXiv 2302.05442); joint_fused:
    the same with a shared output projection, so one bias"""
    layer_scale_on: Literal["both", "attention"] = "both"
    """branches with `layer_scale`"""

    # Attention
    key_bias: bool = True
    """with `qkv_bias`: whether keys have a bias too (BEiT and EVA: only queries and values)"""
    output_bias: bool = True
    """biases of attention's output projection and of the MLP"""
    qk_norm: bool = False
    """norms on queries and keys, per head (arXiv 2302.05442)"""
    attention_norm: bool = False
    """a norm before attention's output projection (arXiv 2210.06423)"""
    differential: bool = False
    """differential attention: the difference of two attention maps (arXiv 2410.05258)"""
    kv_heads: tuple[int, ...] = ()
    """grouped-query attention: key and value heads of each block (arXiv 2305.13245); empty for as many as query
    heads"""

    # MLP
    mlp: Literal["plain", "gated"] = "plain"
    """gated: activation of one half times the other half, as in SwiGLU (arXiv 2002.05202)"""
    mlp_hidden: int | None = None
    """hidden width of the MLP, after the gate if it has one; None for width times `mlp_ratio`"""
    mlp_norm: bool = False
    """a norm after the activation (arXiv 2210.06423)"""

    # Prefix and positions
    distillation: bool = False
    """distillation token: a second class token, after the first, for a teacher's labels (arXiv 2012.12877)"""
    prefix_positions: Literal["class", "all", "none"] = "class"
    """prefix tokens with learned positions. class: class and distillation token; all: registers too; none"""
    resampling: Resampling = "antialias"
    """interpolation of learned positions for other grids. antialias: bicubic with antialiasing (timm);
    bilinear_antialias (SigLIP 2); bicubic, bilinear: without antialiasing (Hugging Face); bicubic_corners: bicubic with
    aligned corners (torchvision); corners: bilinear with aligned corners (Google); offset: bicubic with 0.1 added to
    the new size (DINO, DINOv2)"""
    resizing: Resampling | None = None
    """the same for changing the model's own size; None: as `resampling` (timm treats FlexiViT and RADIO specially here,
    but not for images of other sizes)"""
    relative: Literal["none", "table", "shared", "both", "decomposed"] = "none"
    """relative position biases. table: a table per block (BEiT); shared: one table for all blocks; both; decomposed:
    products of the query with row and column vectors (arXiv 2112.01526, SAM)"""
    relative_resampling: Literal["geometric", "bilinear"] = "geometric"
    """interpolation of the tables for other grids. geometric: positions in geometric progression (BEiT, timm); bilinear
    (Hugging Face)"""
    rotary: Literal["none", "axial", "centred", "mixed"] = "none"
    """rotary position embedding (RoPE). axial: by row and column (EVA-02); centred: by coordinates from -1 to 1
    (DINOv3); mixed: by learned directions per head (arXiv 2403.13298)"""
    rotary_temperature: float = 10_000.0
    rotary_reference: tuple[int, int] | None = None
    """axial: rows and columns of the reference grid, to which every grid is scaled"""
    rotary_offset: float = 0.0
    """axial: offset of row and column numbers"""
    rotary_first: Literal["rows", "columns"] = "rows"
    """the axis of the first frequencies"""
    rotary_pairs: Literal["neighbours", "halves"] = "neighbours"
    """channels that are rotated together: 2i and 2i + 1 (neighbours), or i and i + half (halves)"""
    window: int = 0
    """windowed attention: side of the windows in patches (SAM); 0 for the whole image"""
    global_blocks: tuple[int, ...] = ()
    """with `window`: indices of the blocks that attend to the whole image"""

    # Merging
    merge: tuple[int, ...] = ()
    """token merging (arXiv 2210.09461): how many patch tokens merge in each block, one number for all or one per block;
    at most half of them do. Empty or 0 for none"""

    # Stem
    stem_blocks: int = 0
    """number of residual blocks (arXiv 1512.03385) after each convolution of `stem` except the first"""
    floor_grid: bool = False
    """ignore pixels on the right and at the bottom that do not fill a patch (SigLIP at 384 pixels); otherwise an
    error"""
    patch_bias: bool = True
    """bias of the patch projection"""
    backbone: Literal["none", "resnetv2", "resnet", "conv"] = "none"
    """network before the patches. resnetv2: the hybrid's ResNet of section 3.1 (group norm, weight standardisation);
    resnet: ResNet-D with batch norm; conv: non-overlapping convolutions (MobileCLIP)"""
    backbone_layers: tuple[int, ...] = ()
    """number of blocks per stage (empty: only the ResNet's first convolution); for conv its widths"""
    backbone_eps: float = 1e-5
    """epsilon of the backbone's norms"""
    backbone_weight_eps: float = 1e-8
    """resnetv2: epsilon of weight standardisation"""
    backbone_weight: Literal["variance", "deviation"] = "variance"
    """resnetv2: whether this epsilon is added to the variance (timm) or to the standard deviation (Google)"""

    # After the blocks
    neck: int | None = None
    """channels of SAM's neck, two convolutions over the patch tokens"""
    pool_prefix: bool = False
    """whether average and attention pooling also read the prefix tokens"""
    pool_heads: int | None = None
    """heads of attention pooling; None: as in the blocks"""
    pool_hidden: int | None = None
    """hidden width of attention pooling's MLP; None: as in the blocks"""
    pool_activation: Activation | None = None
    """activation of attention pooling's MLP; None: as in the blocks"""
    projection: int | None = None
    """width of a linear projection of the pooled vector (CLIP); None for no projection"""
    projection_bias: bool = False
    projection_tanh: bool = False
    """a tanh after the projection (BERT's pooler)"""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                object.__setattr__(self, entry.name, tuple(value))  # JSON has lists instead of tuples
        require_choices(self)
        self._check_the_paper()
        require(self, 0, math.inf, "registers", "stem_blocks", "window")
        sizes = ("neck", "projection", "pool_heads", "pool_hidden")
        require(self, 1, math.inf, "hidden", *(name for name in sizes if getattr(self, name) is not None))
        self._check_stem()
        self._check_tokens()
        self._check_pool()
        self._check_attention()
        self._check_merge()

    def _check_the_paper(self) -> None:
        """Check the paper's fields, with a whole number of patches and a pooling that the paper's model has."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(ViTConfig)}
        require(self, 1, math.inf, "patch")
        if self.floor_grid:
            own["image_size"] = tuple(pixels - pixels % self.patch for pixels in self.image_size)
        ViTConfig(**{**own, "pool": self.pool if self.pool == "token" else "average"})

    def _check_stem(self) -> None:
        if self.stem_blocks and len(self.stem) == 1:
            raise UserError(f"stem_blocks come after the second and later convolutions of a stem: stem is {self.stem}")
        if self.stem and self.backbone != "none":
            raise UserError("stem and backbone both come before the patches: use only one of them")
        if self.backbone == "conv" and not self.backbone_layers:
            raise UserError("backbone='conv' needs backbone_layers: give the widths of its convolutions")

    def _check_tokens(self) -> None:
        if self.pool in ("distilled", "token_average") and not self.class_token:
            raise UserError(f"pool={self.pool!r} needs class_token=True; use pool='average'")
        if self.distillation > self.class_token or (self.pool == "distilled") > self.distillation:
            raise UserError("a distillation token needs a class token, and pool='distilled' needs both")
        if self.window and self.prefix_tokens:
            raise UserError("windowed attention is for patches only: remove class token and registers")
        if self.relative in ("table", "shared", "both") and (self.prefix_tokens != 1 or not self.class_token):
            raise UserError("relative tables need a class token, and no registers or distillation token")
        if self.relative == "decomposed" and self.prefix_tokens:
            raise UserError("decomposed relative positions are for patches only: remove class token and registers")

    def _check_pool(self) -> None:
        if self.neck and self.pool in ("token", "token_average", "distilled"):
            raise UserError(f"a neck gives patches only, and pool={self.pool!r} reads the class token: use 'average'")
        if self.norm_pooled and self.pool == "token_average":
            raise UserError("norm_pooled is a norm of one token's width, and pool='token_average' joins two: use one")
        heads = self.pool_heads or self.heads
        if self.pool == "attention" and self.token_width % heads:
            raise UserError(f"tokens of width {self.token_width} do not divide into {heads} heads: change pool_heads")

    def _check_attention(self) -> None:
        if self.global_blocks and not self.window:
            raise UserError("global_blocks needs window: give the side of the other blocks' windows")
        if beyond := [index for index in self.global_blocks if not 0 <= index < self.depth]:
            last = self.depth - 1
            raise UserError(
                f"global_blocks names block {beyond[0]}, and the model's are 0 to {last}: set --global-blocks"
            )
        if self.relative == "decomposed" and self.kv_heads:
            raise UserError("relative='decomposed' cannot be combined with kv_heads: use only one of them")
        if len(self.kv_heads) not in (0, self.depth):
            raise UserError(f"kv_heads needs a number for each of {self.depth} blocks")
        if wrong := [count for count in self.kv_heads if count < 1 or self.heads % count]:
            raise UserError(f"{self.heads} query heads cannot share {wrong[0]} key heads equally: change kv_heads")
        if self.differential and self.width // self.heads % 2:
            raise UserError(f"differential attention halves a head's {self.width // self.heads} channels: change heads")

    def _check_merge(self) -> None:
        require(self, 0, math.inf, "merge")
        if not all(isinstance(count, int) for count in self.merge):
            raise UserError(f"merge must be whole numbers of tokens, got {self.merge}")
        if len(self.merge) not in (0, 1, self.depth):
            raise UserError(
                f"merge needs one number for all blocks, or one for each of {self.depth}: got {len(self.merge)}"
            )
        if not any(self.merge):
            object.__setattr__(self, "merge", ())
            return
        reasons = {
            "rotary positions turn each patch by its own place": self.rotary != "none",
            "relative position biases are for pairs of patches": self.relative != "none",
            "windows hold a square of patches": self.window > 0,
            f"blocks have the arrangement {self.arrangement}, and not pre": self.arrangement != "pre",
        }
        for reason, there in reasons.items():
            if there:
                raise UserError(f"the tokens of this model cannot merge, since its {reason}: leave out merge")

    @property
    def merged(self) -> tuple[int, ...]:
        """The number of tokens that merge in each block."""
        return self.merge if len(self.merge) == self.depth else self.merge * self.depth or (0,) * self.depth

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
    """The same model as a `VariantConfig`."""
    return config if isinstance(config, VariantConfig) else VariantConfig(**vars(config))


def simplest(config: ViTConfig) -> ViTConfig:
    """The paper's `ViTConfig` if no field of the variant differs from the paper."""
    own = {entry.name: getattr(config, entry.name) for entry in fields(ViTConfig)}
    added = [entry for entry in fields(config) if entry.name not in own]
    if config.pool in ("token", "average") and all(getattr(config, entry.name) == entry.default for entry in added):
        return ViTConfig(**own)
    return config
