"""Run-length encoding equals COCO's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vitrail.data import rle

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))


def steps(height: int, width: int, period: int) -> torch.Tensor:
    numbers = torch.arange(height * width)
    return (numbers * numbers % period < period // 3).view(height, width)


FIXED = [
    (torch.zeros(3, 4, dtype=torch.bool), "<"),
    (torch.ones(3, 4, dtype=torch.bool), "0<"),
    (torch.eye(5, dtype=torch.bool), "0150000000"),
    (steps(9, 7, 11), "012021NO0030M01010O0O030M00030M0O"),
    (torch.arange(300 * 200).view(300, 200) % 200 > 150, "dW\\1\\[>"),
]


@pytest.mark.parametrize("mask, counts", FIXED)
def test_strings_that_cocos_code_wrote(mask: torch.Tensor, counts: str) -> None:
    assert rle.encode(mask) == {"size": [*mask.shape], "counts": counts}
    assert torch.equal(rle.decode({"size": [*mask.shape], "counts": counts}), mask)
    assert torch.equal(rle.decode({"size": [*mask.shape], "counts": counts.encode()}), mask)


@given(MASKS, st.integers(1, 40))
def test_a_mask_survives(mask: np.ndarray, scale: int) -> None:
    whole = torch.from_numpy(np.kron(mask, np.ones((scale, 2), dtype=bool)))
    code = rle.encode(whole)
    assert torch.equal(rle.decode(code), whole)
    lengths = rle.lengths_of(code)
    assert torch.equal(rle.decode({"size": code["size"], "counts": lengths.tolist()}), whole)
    flat = np.zeros(whole.numel(), dtype=bool)
    flat[rle.places(code)] = True
    assert (whole.numpy() == flat.reshape(whole.shape[1], -1).T).all()


@given(MASKS)
def test_the_encoding_is_that_of_faster_coco_eval(mask: np.ndarray) -> None:
    peer = pytest.importorskip("faster_coco_eval.core.mask")
    theirs = peer.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = theirs["counts"].decode() if isinstance(theirs["counts"], bytes) else theirs["counts"]
    assert rle.encode(torch.from_numpy(mask))["counts"] == counts
    assert (peer.decode({**theirs, "counts": counts.encode()}) == rle.decode(theirs).numpy()).all()


@pytest.mark.parametrize("counts", ["0", "", "<\x7f", "P", [5, -1, 8], [3, 3], "P" * 20 + "0"])
def test_lengths_that_do_not_fill_the_mask_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match="run length"):
        rle.decode({"size": [3, 4], "counts": counts})
