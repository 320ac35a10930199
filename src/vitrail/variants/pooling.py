"""Pooling: from the final tokens to the vector that represents the image."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionPool(nn.Module):
    """A learned query reads the tokens, then an MLP (the MAP head of arXiv 2106.04560)."""

    no_decay: ClassVar[tuple[str, ...]] = ("probe",)

    def __init__(self, width: int, attention: nn.Module, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.attention, self.norm, self.mlp = attention, norm, mlp

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] to [B, D]."""
        x = self.attention(self.probe.expand(tokens.shape[0], -1, -1), tokens)
        return (x + self.mlp(self.norm(x)))[:, 0]


def pooled(prefix: Tensor, patches: Tensor, kind: str, prefix_too: bool, attention: AttentionPool | None) -> Tensor:
    """One vector per image, pooled as `VariantConfig` explains for `pool`: [B, P, D] and [B, N, D] to [B, D].

    Exceptions: distilled gives [B, 2, D], one row per head, and token_average gives [B, 2D].
    """
    read = torch.cat([prefix, patches], dim=1) if prefix_too else patches
    if kind == "distilled":
        return prefix[:, :2]
    if attention is not None:
        return attention(read)
    if kind == "average":
        return read.mean(dim=1)
    if kind == "token_average":
        return torch.cat([prefix[:, 0], read.mean(dim=1)], dim=1)
    return read.amax(dim=1) if kind == "max" else 0.5 * (read.amax(dim=1) + read.mean(dim=1))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, h, w]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Neck(nn.Sequential):
    """SAM's neck: a linear map of each patch and a 3x3 convolution, each with a norm (arXiv 2304.02643)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(width, channels, 1, bias=False),
            ChannelNorm(channels, eps=1e-6),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            ChannelNorm(channels, eps=1e-6),
        )


class Projection(nn.Linear):
    """A linear map of the pooled vector, to CLIP's joint space of images and text, or BERT's pooler with its tanh."""

    def __init__(self, width: int, out: int, bias: bool, tanh: bool) -> None:
        super().__init__(width, out, bias=bias)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to [B, out]."""
        x = F.linear(x, self.weight, self.bias)
        return x.tanh() if self.tanh else x
