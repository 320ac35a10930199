"""Blocks with a variant's modules, in the arrangement of equations 2 and 3 or in another one.

Stochastic depth multiplies the branches by `keep` [B, 2] as in `vit.Block`; parallel branches share one factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrail.ops import scale_branch
from vitrail.variants.attention import MergingAttention, VariantAttention
from vitrail.variants.config import VariantConfig
from vitrail.variants.merging import Groups, merge
from vitrail.variants.mlp import GatedMLP, VariantMLP
from vitrail.variants.norms import norm_for
from vitrail.variants.place import Place
from vitrail.variants.residual import branch_for


class PreNormBlock(nn.Module):
    """Equations 2 and 3 (`vit.Block`), with extra modules on the branches."""

    def __init__(
        self,
        norm1: nn.Module,
        attention: nn.Module,
        branch1: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        branch2: nn.Module,
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.branch1 = norm1, attention, branch1
        self.norm2, self.mlp, self.branch2 = norm2, mlp, branch2

    def forward(self, x: Tensor, keep: Tensor | None = None, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        x = x + scale_branch(self.branch1(self.attention(self.norm1(x), place=place)), keep, 0)
        return x + scale_branch(self.branch2(self.mlp(self.norm2(x))), keep, 1)


class MergingBlock(PreNormBlock):
    """The same, and between the branches similar patch tokens merge (arXiv 2210.09461)."""

    def __init__(self, count: int, *modules: nn.Module) -> None:
        """`count` tokens merge, or half of the patch tokens if those are fewer."""
        super().__init__(*modules)
        self.count = count

    def forward(  # type: ignore[override]
        self, x: Tensor, groups: Groups | None, prefix: int, keep: Tensor | None = None
    ) -> tuple[Tensor, Groups | None]:
        """[B, T, D] to [B, T - count, D], with the groups of the tokens before and after; `prefix` tokens stay."""
        mixed, keys = self.attention(self.norm1(x), None if groups is None else groups.size)
        x = x + scale_branch(self.branch1(mixed), keep, 0)
        x, groups = merge(x, keys, groups, prefix, self.count)
        return x + scale_branch(self.branch2(self.mlp(self.norm2(x))), keep, 1), groups


class PostNormBlock(nn.Module):
    """The norm is on the branch's output, so that no branch outgrows the residual path (arXiv 2111.09883)."""

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

    def forward(self, x: Tensor, keep: Tensor | None = None, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        x = x + scale_branch(self.branch1(self.norm1(self.attention(x, place=place))), keep, 0)
        return x + scale_branch(self.branch2(self.norm2(self.mlp(x))), keep, 1)


class JointBlock(nn.Module):
    """Attention and MLP in parallel after one norm (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, norm1: nn.Module, attention: nn.Module, mlp: nn.Module, branch1: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.mlp, self.branch1 = norm1, attention, mlp, branch1

    def forward(self, x: Tensor, keep: Tensor | None = None, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        y = self.norm1(x)
        return x + scale_branch(self.branch1(self.attention(y, place=place) + self.mlp(y)), keep, 0)


class Branch(nn.Module):
    """One of several parallel residual branches."""

    def __init__(self, norm: nn.Module, inner: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.branch = norm, inner, branch

    def forward(self, x: Tensor, **place: Place | None) -> Tensor:
        """[B, P + N, D] to the residual update."""
        return self.branch(self.inner(self.norm(x), **place))


class ParallelBlock(nn.Module):
    """Several attentions in parallel, then several MLPs (arXiv 2203.09795)."""

    def __init__(self, attentions: Sequence[Branch], mlps: Sequence[Branch]) -> None:
        super().__init__()
        self.attentions, self.mlps = nn.ModuleList(attentions), nn.ModuleList(mlps)

    def forward(self, x: Tensor, keep: Tensor | None = None, place: Place | None = None) -> Tensor:
        """[B, P + N, D] to [B, P + N, D]."""
        x = x + scale_branch(torch.stack([branch(x, place=place) for branch in self.attentions]).sum(dim=0), keep, 0)
        return x + scale_branch(torch.stack([branch(x) for branch in self.mlps]).sum(dim=0), keep, 1)


def mlp_for(config: VariantConfig) -> VariantMLP | GatedMLP:
    """The MLP of a block."""
    c = config
    kind = GatedMLP if c.mlp == "gated" else VariantMLP
    mlp = kind(c.width, c.hidden, c.activation, c.dropout, bias=c.output_bias)
    if c.mlp_norm:
        mlp.norm = norm_for(c, c.hidden)
    return mlp


def block_for(config: VariantConfig, index: int) -> nn.Module:
    """Block `index`."""
    c = config
    if c.arrangement == "parallel":
        attentions = [Branch(norm_for(c), VariantAttention(c, index), branch_for(c)) for _ in range(2)]
        return ParallelBlock(attentions, [Branch(norm_for(c), mlp_for(c), branch_for(c)) for _ in range(2)])
    attention, mlp = (MergingAttention if c.merge else VariantAttention)(c, index), mlp_for(c)
    if c.arrangement == "pre":
        modules = norm_for(c), attention, branch_for(c), norm_for(c), mlp, branch_for(c, c.layer_scale_on == "both")
        return MergingBlock(c.merged[index], *modules) if c.merge else PreNormBlock(*modules)
    if c.arrangement == "post":
        return PostNormBlock(attention, norm_for(c), branch_for(c), mlp, norm_for(c), branch_for(c))
    if c.arrangement == "joint_fused":
        mlp.down.register_parameter("bias", None)  # attention's output projection has the bias of both
    return JointBlock(norm_for(c), attention, mlp, branch_for(c))
