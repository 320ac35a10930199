"""Values of every type become 8 bits by one rule, wherever they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import encoded, tiff
from PIL import Image

from vitrail.data.decode import BadImage, decode
from vitrail.data.pixels import Doubts, Source, channel_axis, scaled
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError

WHOLE = ["int8", "int16", "int32", "int64", "uint32", "uint64"]


def readings(values: list[float], kind: str, folder: Path) -> list[list[int]]:
    """A row of values as an array, a TIFF, a tensor and, where PIL has the type, a PIL image is read."""
    row = np.array([values], kind)
    np.save(folder / "row.npy", row)
    asis = Preprocess(row.shape, channels=1)
    found = [decode(folder / "row.npy", 1), decode(tiff(row[..., None]), 1)]
    if kind not in ("uint32", "uint64"):  # torch computes little with them
        found.append(asis.prepare(torch.from_numpy(row)[None]))
    if kind in ("int32", "float32"):
        image = Image.fromarray(row)
        found += [asis.prepare(image), decode(encoded(image, "TIFF"), 1)]
    return [image.flatten().tolist() for image in found]


@pytest.mark.parametrize("kind", ["float32", "float64", "float16"])
def test_floats(kind: str, tmp_path: Path) -> None:
    for row in readings([0, 0.25, 0.5, 1, np.nan, np.inf, -np.inf], kind, tmp_path):
        assert row == [0, 64, 128, 255, 0, 255, 0]
    for row in readings([0, 32, 64.4, 224, np.nan, np.inf, -np.inf], kind, tmp_path):
        assert row == [0, 32, 64, 224, 0, 255, 0]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_are_of_0_to_255(kind: str, tmp_path: Path) -> None:
    for row in readings([0, 32, 127], kind, tmp_path):
        assert row == [0, 32, 127]


def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    for row in readings([0, 255, 256, 4095, 65535], "uint16", tmp_path):
        assert row == [0, 0, 1, 15, 255]


@pytest.mark.parametrize(
    "values, kind",
    [
        ([-1000, -100, 0, 3000], "int16"),
        ([-1, 200], "int32"),
        ([0, 9000], "int64"),
        ([0, 3000], "int16"),
        ([0, 500, 9000], "float32"),
        ([-2.1, 0, 2.6], "float32"),
        ([-0.5, 0.5], "float64"),
        ([0, 1.5], "float32"),
        ([-128, 127], "int8"),
        ([1j], "complex64"),
    ],
)
def test_values_of_no_known_range_are_refused(values: list[float], kind: str, tmp_path: Path) -> None:
    row = np.array([values], kind)
    np.save(tmp_path / "row.npy", row)
    for data in (tmp_path / "row.npy", tiff(row[..., None])):
        with pytest.raises(BadImage, match=r"have no known range|are not pixels|complex") as caught:
            decode(data, 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not fit the model"):
        Preprocess(channels=1).prepare(torch.from_numpy(row)[None])


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for array in (np.array([["a"]]), np.zeros((2, 2), "M8[s]"), np.zeros((2, 2), [("r", "u1")])):
        np.save(tmp_path / "row.npy", array)
        with pytest.raises(BadImage, match=r"row\.npy: values of type .* are not pixels"):
            decode(tmp_path / "row.npy", 1)


@given(st.lists(st.integers(0, 255), min_size=1), st.sampled_from([*WHOLE[1:], "uint8", "float32", "float64"]))
def test_the_same_image_in_another_type_is_the_same(values: list[int], kind: str) -> None:
    """Also for floats, unless the image is darker than any that means 0 to 255."""
    wanted = np.array(values, np.uint8)
    if kind.startswith("float") and max(values) == 1:
        return
    assert np.array_equal(scaled(wanted.astype(kind)), wanted)


def test_what_looks_wrong_about_the_values_of_some_images() -> None:
    assert Doubts([]).text() is None and Doubts([Source(), Source()]).text() is None
    assert "values up to 4,095 of 65,535" in str(Doubts([Source("uint16", 4095), Source("uint16", 0)]).text())
    assert Doubts([Source("uint16", 4095), Source("uint16", 50_000)]).text() is None
    assert "floats" in str(Doubts([Source("float32", 0.9), Source("float64", 200)]).text())
    assert "some images have 5 pages" in str(Doubts([Source(), Source(pages=5)]).text())
    assert Doubts([Source("float32", 0), Source("float32", 200)]).text() is None, "a black image is black in both"


@pytest.mark.parametrize(
    "shape, channels, axis",
    [((9, 8), 3, None), ((9, 8, 3), 3, 2), ((3, 9, 8), 3, 0), ((9, 8, 4), 3, 2), ((4, 9, 8), 3, 0), ((2, 9, 3), 1, 2)],
)
def test_which_axis_of_an_array_counts_channels(shape: tuple[int, ...], channels: int, axis: int | None) -> None:
    assert channel_axis(shape, channels) == axis


def test_an_array_that_cannot_be_written_is_read_and_not_changed() -> None:
    array = np.asarray(Image.new("RGB", (8, 8), (1, 2, 3)))
    assert not array.flags.writeable
    assert Preprocess((8, 8)).prepare(array).unique().tolist() == [1, 2, 3], "and PyTorch does not warn"


def test_arrays_that_are_no_image_get_a_line_that_says_what_to_save(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(BadImage, match="an array of Python objects is not read, .*: save numbers"):
        decode(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(BadImage, match=r"shape \[1, 8, 8, 3\] .* \[H, W\], \[H, W, C\] or \[C, H, W\]"):
        decode(tmp_path / "a.npy")
