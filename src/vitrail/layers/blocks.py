"""Blocks in another arrangement than equations 2 and 3, made of finished parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrail.layers.place import Place


class PostNormBlock(nn.Module):
    """The norm stands on the branch's output, so that no branch can outgrow the residual path (arXiv 2111.09883)."""

    def __init__(
        self,
        attention: nn.Module,
        norm1: nn.Module,
        branch1: nn.Module,
        mlp: nn.Module,
        norm2: nn.Module,
        branch2: nn.Module,
    ) -> None:
        super().__init__()
        self.attention, self.norm1, self.branch1 = attention, norm1, branch1
        self.mlp, self.norm2, self.branch2 = mlp, norm2, branch2

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        x = x + self.branch1(self.norm1(self.attention(x, place=place)))
        return x + self.branch2(self.norm2(self.mlp(x)))


class JointBlock(nn.Module):
    """Attention and MLP side by side behind one norm (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, norm1: nn.Module, attention: nn.Module, mlp: nn.Module, branch1: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.mlp, self.branch1 = norm1, attention, mlp, branch1

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        y = self.norm1(x)
        return x + self.branch1(self.attention(y, place=place) + self.mlp(y))


class Branch(nn.Module):
    """One of several residual branches that stand side by side."""

    def __init__(self, norm: nn.Module, inner: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.branch = norm, inner, branch

    def forward(self, x: Tensor, **place: Place | None) -> Tensor:
        """[B, P + N, D] to what is added to it."""
        return self.branch(self.inner(self.norm(x), **place))


class ParallelBlock(nn.Module):
    """Several attentions side by side, then several MLPs (arXiv 2203.09795)."""

    def __init__(self, attentions: Sequence[Branch], mlps: Sequence[Branch]) -> None:
        super().__init__()
        self.attentions, self.mlps = nn.ModuleList(attentions), nn.ModuleList(mlps)

    def _add(self, x: Tensor, parts: nn.ModuleList, **place: Place | None) -> Tensor:
        return x + torch.stack([part(x, **place) for part in parts]).sum(dim=0)

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        return self._add(self._add(x, self.attentions, place=place), self.mlps)
