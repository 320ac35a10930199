"""Where the tokens of a forward pass stand in the picture, for the parts that ask."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitrail.layers.rotary import Rotation


class Place(NamedTuple):
    """Passed from the encoder through its blocks to their attention."""

    grid: tuple[int, ...]
    """(h, w) of the patches"""
    prefix: int = 0
    """tokens before the patches, which have no place"""
    rotation: Rotation | None = None
    """for queries and keys"""
    bias: Tensor | None = None
    """[1, heads, T, T] on the scores, the same in each block"""
    pairs: Tensor | None = None
    """[T, T], what `relative_index` gives, where tables of relative places are read"""
