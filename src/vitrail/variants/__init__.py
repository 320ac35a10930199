"""What later papers changed in the Vision Transformer, built on `vit.py` by subclassing, one idea per file."""

from vitrail.variants.config import VariantConfig, as_variant, simplest
from vitrail.variants.encoder import DistilledHead, VariantViT, head_for, resize
from vitrail.variants.stems import patches_for

__all__ = [
    "DistilledHead",
    "VariantConfig",
    "VariantViT",
    "as_variant",
    "head_for",
    "patches_for",
    "resize",
    "simplest",
]
