"""What a residual branch passes before it is added."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch, small at first so that deep models start near the identity."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return x * self.scale


class StochasticDepth(nn.Module):
    """In training, leave a residual branch out for a picture with a chance `rate`, and scale the rest up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        if not self.training:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)
