"""Positions of the tokens of a forward pass, for the modules that need them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.variants.rotary import Rotation


class Place(NamedTuple):
    """Passed from the encoder through its blocks to their attention."""

    grid: tuple[int, ...]
    """(h, w) of the patches"""
    prefix: int = 0
    """number of prefix tokens, which have no place in the image"""
    rotation: Rotation | None = None
    """rotations of queries and keys"""
    bias: Tensor | None = None
    """relative position biases [1, heads, T, T] on the scores, the same in each block"""
    pairs: Tensor | None = None
    """indices [T, T] of `relative_index`, if there are relative position tables"""


def locate(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    place: Place | None,
    relative: Callable[[Tensor, Place], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and mask with positional terms: rotations, and biases on the scores.

    Unchanged without a place. `relative` computes the biases of a single block.
    """
    if place is None:
        return q, k, mask
    if place.rotation is not None:
        q, k = (place.rotation.apply(y, place.prefix) for y in (q, k))
    bias = place.bias
    if relative is not None:
        own = relative(q, place)
        bias = own if bias is None else bias + own
    if bias is None or mask is None:
        return q, k, mask if bias is None else bias.to(q.dtype)
    return q, k, (bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask).to(q.dtype)
