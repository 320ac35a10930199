"""Run-length encoding of masks as COCO writes it: run lengths down the columns, packed into a string.

The lengths alternate between zeros and ones, beginning with zeros. In the packed form each length from the fourth on is
the difference from the one two places before, as a signed number of 5 bits per character, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIRST = 48
"""the character of the value 0"""
BITS, SIGN, MORE = 5, 16, 32
MAX_CHARACTERS = 13
"""characters that hold 64 bits"""


def encode(mask: Tensor) -> dict[str, Any]:
    """A mask, bool [H, W], as {"size": [H, W], "counts": packed lengths}. It is fastest if columns are contiguous."""
    height, width = mask.shape
    flat = mask.cpu().numpy().astype(bool, copy=False).T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]]))
    if flat.size and flat[0]:
        lengths = np.concatenate([[0], lengths])
    return {"size": [height, width], "counts": _pack(lengths)}


def decode(rle: Mapping[str, Any]) -> Tensor:
    """The mask, bool [H, W]. Raises ValueError if the lengths do not fill the size."""
    height, width = rle["size"]
    lengths = lengths_of(rle)
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return torch.from_numpy(flat.reshape(width, height).T.copy())


def places(rle: Mapping[str, Any]) -> NDArray[np.int64]:
    """The places of the ones in the mask that is flattened down its columns. Raises ValueError as `decode` does."""
    lengths = lengths_of(rle)
    ends = np.cumsum(lengths)[1::2]
    ones = lengths[1::2]
    before = np.cumsum(ones) - ones
    return np.arange(ones.sum()) + np.repeat(ends - ones - before, ones)


def lengths_of(rle: Mapping[str, Any]) -> NDArray[np.int64]:
    """The run lengths, packed or as a plain list. Raises ValueError if they do not fill the size."""
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        lengths = _unpack(counts.encode() if isinstance(counts, str) else counts)
    else:
        try:
            lengths = np.asarray(counts, dtype=np.int64).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("the run lengths are neither a text nor whole numbers") from None
    if ((lengths < 0) | (lengths > height * width)).any() or lengths.sum() != height * width:
        raise ValueError(f"the run lengths do not fill {width}x{height} pixels")
    return lengths


def _pack(lengths: NDArray[np.int64]) -> str:
    rest = lengths.copy()
    rest[3:] -= lengths[1:-2]
    characters = np.zeros((len(rest), MAX_CHARACTERS), dtype=np.uint8)
    more = np.ones(len(rest), dtype=bool)
    for i in range(MAX_CHARACTERS):
        low = rest & (MORE - 1)
        rest >>= BITS
        used, more = more, more & np.where(low & SIGN, rest != -1, rest != 0)
        characters[:, i] = np.where(used, (low | MORE * more) + FIRST, 0)
        if not more.any():
            break
    return characters[characters > 0].tobytes().decode()


def _unpack(text: bytes) -> NDArray[np.int64]:
    values = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - FIRST
    if not len(values):
        return values
    if ((values < 0) | (values >= 2 * MORE)).any() or values[-1] & MORE:
        raise ValueError("the run lengths hold an unknown character, or are cut off")
    last = np.flatnonzero(values & MORE == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    sizes = last - first + 1
    if sizes.max() > MAX_CHARACTERS - 1:
        raise ValueError("a run length has more than 60 bits")
    places = np.arange(len(values)) - np.repeat(first, sizes)
    lengths = np.add.reduceat((values & (MORE - 1)) << (BITS * places), first)
    lengths -= np.where(values[last] & SIGN, 1 << (BITS * sizes), 0)
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths
