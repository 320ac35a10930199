"""The norms of variants."""

from __future__ import annotations

from torch import nn

from vitrail.variants.config import VariantConfig


def norm_for(config: VariantConfig, width: int | None = None, eps: float | None = None) -> nn.Module:
    """A norm over `width` channels (by default a token's): layer norm as in the paper, or another kind."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(width or config.width, eps=config.norm_eps if eps is None else eps)
