"""Token merging (ToMe, arXiv 2210.09461): between the attention and the MLP of a block, similar patch tokens merge.

A token that stands for several is their mean, and counts as often in attention and pooling. Nothing is learned for it.

    B images in the batch    T tokens, of which the prefix never merges    r tokens fewer after a block
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups(NamedTuple):
    """The original tokens that each of the merged tokens stands for."""

    place: Tensor
    """for each original token its place among the merged ones: [B, T], int64"""
    size: Tensor
    """for each merged token the number of original ones, which sum to T: [B, T - r], int64"""


def match(keys: Tensor, prefix: int, count: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (section 3): places of `count` tokens, and of the token that each merges into.

    Every second patch token has one partner among those between: the one with the most similar key, by the cosine of
    the keys' mean over heads. The most similar pairs are chosen. The choice itself has no gradient.

    Args:
        keys: of attention, [B, heads, T, d].
        prefix: the number of first tokens that never merge.
        count: at most half of the patch tokens.

    Returns:
        Two tensors [B, count] of places from 0 to T - 1.
    """
    # Adding up the heads is three times as fast as `sum(1)`, and their sum has the cosine of their mean.
    metric = F.normalize(reduce(torch.add, keys[:, :, prefix:].detach().unbind(1)), dim=-1)
    similarity, partner = (metric[:, ::2] @ metric[:, 1::2].mT).max(dim=-1)
    chosen = similarity.topk(count, dim=-1).indices
    return prefix + 2 * chosen, prefix + 2 * partner.gather(1, chosen) + 1


def merge(x: Tensor, keys: Tensor, groups: Groups | None, prefix: int, count: int) -> tuple[Tensor, Groups | None]:
    """Merge `count` of the patch tokens x [B, T, D], at most half: [B, T - count, D], in their order.

    A merged token is the mean of its original tokens. `groups` is None for tokens that have not merged.
    """
    batch, tokens, width = x.shape
    count = min(count, (tokens - prefix) // 2)
    if count < 1:
        return x, groups
    left = tokens - count
    moved, target = match(keys, prefix, count)
    ones = torch.ones(batch, tokens, dtype=torch.int64, device=x.device)
    stays = ones.scatter(1, moved, 0)
    place = stays.cumsum(1) - 1  # of tokens that stay
    place = place.scatter(1, moved, place.gather(1, target))
    before = ones if groups is None else groups.size
    size = torch.zeros_like(ones[:, :left]).scatter_add(1, place, before)
    kept = torch.zeros_like(size).scatter_add(1, place, stays * torch.arange(tokens, device=x.device))
    # Only what moves is computed: a mean is its first token plus the weighted differences of the others from it.
    flat, to = x.flatten(0, 1), place.gather(1, moved)
    share = (before.gather(1, moved) / size.gather(1, to)).to(x.dtype)
    apart = flat.index_select(0, _rows(moved, tokens)) - flat.index_select(0, _rows(target, tokens))
    x = flat.index_select(0, _rows(kept, tokens)).index_add_(0, _rows(to, left), share.view(-1, 1) * apart)
    return x.view(batch, left, width), Groups(place if groups is None else place.gather(1, groups.place), size)


def unmerge(x: Tensor, groups: Groups | None) -> Tensor:
    """The token of each original one: [B, T, D] from merged tokens [B, T - r, D]."""
    if groups is None:
        return x
    batch, left, width = x.shape
    return x.flatten(0, 1).index_select(0, _rows(groups.place, left)).view(batch, -1, width)


def _rows(place: Tensor, tokens: int) -> Tensor:
    """Places [B, T] among so many tokens as rows of all images' tokens in a row: one axis is far faster than two."""
    return (place + tokens * torch.arange(place.shape[0], device=place.device)[:, None]).flatten()
