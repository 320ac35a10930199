"""Images that an epoch holds several times, each with its own draws."""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 8
"""distance at which a batch's copies are picked up: DeiT's 8 processes, each of which takes every eighth image"""


def repeated(rows: Tensor, repeats: int, batch: int) -> Tensor:
    """Repeated augmentation (arXiv 1901.09335) as DeiT samples it: as many rows as before, each `repeats` times.

    So an epoch shows 1 / `repeats` of the images, and all copies of an image are in one batch, but for those at its
    ends. Within a batch the order is that of DeiT's processes, one after the other: neighbours, which mixup joins, are
    then different images.
    """
    if repeats == 1:
        return rows
    places = torch.arange(len(rows))
    spread = max(SPREAD, repeats)
    order = (places // batch * spread + places % spread).argsort(stable=True)
    return rows.repeat_interleave(repeats)[: len(rows)][order]


def occurrence(rows: Tensor) -> Tensor:
    """The number of earlier occurrences of each entry: [3, 5, 3, 3] gives [0, 0, 1, 2]."""
    order = rows.argsort(stable=True)
    _, counts = rows[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    result = torch.empty_like(rows)
    result[order] = torch.arange(len(rows)) - starts
    return result
