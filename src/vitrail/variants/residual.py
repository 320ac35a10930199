"""Layer scale on residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.variants.config import VariantConfig


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch, small at first so that deep models start near the identity."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return x * self.scale


def branch_for(config: VariantConfig, scaled: bool = True) -> nn.Module:
    """Empty for the paper's model."""
    if config.layer_scale is None or not scaled:
        return nn.Sequential()
    return nn.Sequential(LayerScale(config.width, config.layer_scale))
