"""A target is a column: it is cut, joined, hashed, collated, mixed and split with its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import encoded, folder_of
from torch import Tensor

from vitrail.data.augment import Augment
from vitrail.data.decode import BadImage
from vitrail.data.loader import Batch, Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, Splits, open_data, split_val
from vitrail.data.targets import Fields, Labels, Target, Texts
from vitrail.errors import UserError

CLASSES = ["ant", "bee", "cat"]
LABELS = Labels(torch.tensor([2, 0, 1, 1]), CLASSES)
TEXTS = Texts([["a", "b"], ["c"], ["d"], ["e"]])
NUMBERED = TEXTS.numbered(torch.arange(8).view(4, 2, 1))


def fields_of(target: Target, samples: list[int], training: bool = False) -> Fields:
    return target.collate([target.read(i) for i in samples], torch.tensor(samples), training)


def assert_same(a: Fields, b: Fields) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]


@pytest.mark.parametrize("target", [LABELS, TEXTS, NUMBERED])
def test_a_column_is_cut_and_joined(target: Target) -> None:
    some = target.subset(torch.tensor([3, 1]))
    assert len(some) == 2 and some.classes == target.classes
    assert_same(fields_of(some, [0, 1]), fields_of(target, [3, 1]))
    first, rest = target.subset(torch.tensor([0])), target.subset(torch.tensor([1, 2, 3]))
    both = first.joined(rest)
    assert len(both) == 4 and both.fingerprint() == target.fingerprint() and torch.equal(both.strata(), target.strata())
    assert first.fingerprint() != rest.fingerprint() and rest.joined(first).fingerprint() != target.fingerprint()


def test_fields_of_a_batch() -> None:
    assert torch.equal(fields_of(LABELS, [3, 0], training=True)["label"], torch.tensor([1, 2]))
    assert fields_of(TEXTS, [2, 0]) == {"captions": [["d"], ["a", "b"]]} and fields_of(TEXTS, [2], training=True) == {}
    assert torch.equal(fields_of(NUMBERED, [2, 0], training=True)["label"], torch.tensor([[[4], [5]], [[0], [1]]]))


def test_what_a_report_says_of_a_sample() -> None:
    assert (LABELS.truth(0), TEXTS.truth(0)) == ({"label": "cat"}, {"captions": ["a", "b"]})


def test_mixed_labels_are_soft_targets() -> None:
    share, partner = torch.tensor([0.25, 0.75]), torch.tensor([1, 0])
    mixed = LABELS.mix({"label": torch.tensor([0, 2]), "sample": partner}, partner, share)
    assert mixed["label"].tolist() == [[0.25, 0.0, 0.75], [0.25, 0.0, 0.75]] and mixed["sample"] is partner
    with pytest.raises(UserError, match="and captions have none: set both to 0"):
        NUMBERED.mix({}, partner, share)


def test_a_set_has_one_kind_of_target() -> None:
    images = ImageSet("four", list("abcd"), torch.zeros(4, 3, 2, 2, dtype=torch.uint8), LABELS)
    assert Labels.of(images) is LABELS and images.classes == CLASSES and torch.equal(images.labels, LABELS.labels)
    with pytest.raises(TypeError, match="four has Labels, not Texts"):
        Texts.of(images)
    with pytest.raises(AttributeError):
        images.target = TEXTS  # type: ignore[misc]
    assert Splits(images).fingerprint() != Splits(images.shuffled()).fingerprint()
    assert sorted(images.shuffled().labels.tolist()) == [0, 1, 1, 2]


@given(st.integers(1, 40), st.integers(1, 12))
def test_micro_batches_are_the_batch_in_whole_pairs(size: int, count: int) -> None:
    batch: Batch = {"image": torch.randn(size, 1, 2, 2), "captions": [str(i) for i in range(size)]}
    batch |= {"sample": torch.arange(size), "seed": 3, "epoch": torch.tensor(7)}
    found = NUMBERED.split(batch, count)
    sizes = [len(each["image"]) for each in found]
    assert len(found) <= count and min(sizes) >= 1 and sum(sizes) == size
    assert torch.equal(torch.cat([each["image"] for each in found]), batch["image"])
    assert [text for each in found for text in each["captions"]] == batch["captions"]
    assert all((each["seed"], each["epoch"]) == (3, 7) for each in found)
    if size >= 2 * count:
        assert len(found) == count and all(each % 2 == 0 for each in sizes[:-1])
        assert max(sizes) - min(sizes) <= 3 - (size % 2 == 0)
    else:
        assert max(sizes) - min(sizes) <= 1


def test_open_gives_the_sets_of_a_kind(tmp_path: Path) -> None:
    folder_of(tmp_path / "labelled", {"train/a/s1": 2, "train/b/s2": 2, "test/a/s1": 1, "test/b/s3": 1})
    splits = Labels.open(tmp_path / "labelled")
    assert splits.test is not None and (len(splits.train), len(splits.test)) == (4, 2)
    assert Labels.of(splits.train).classes == ["a", "b"] and Labels.open("digits").train.keys[0] == "digits/train/0"
    (tmp_path / "captions.txt").write_text("0.jpg,caption\n1.jpg,caption\n")
    folder_of(tmp_path, {"images": 2})
    assert Texts.of(Texts.open(tmp_path, val_fraction=0).train).captions == [["caption"]] * 2
    for kind in (Labels, Target):
        with pytest.raises(UserError):
            kind.open(tmp_path / "images")
    with pytest.raises(UserError, match="the group 's1' is in the train split"):
        Labels.open(tmp_path / "labelled", group="parent")


class Spots(Target):
    """Where a bright spot is in each image: a target as masks and boxes are, that is fetched and follows its image."""

    fields = ("spot",)
    spatial = True

    def __init__(self, places: Tensor, bad: frozenset[int] = frozenset()) -> None:
        self.places, self.bad = places, bad
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, places: Tensor) -> Spots:
        return Spots(self.places[places])

    def joined(self, other: Spots) -> Spots:
        return Spots(torch.cat([self.places, other.places]))

    def fingerprint(self) -> bytes:
        return self.places.numpy().tobytes()

    def read(self, i: int) -> Tensor:
        if i in self.bad:
            raise BadImage(f"{i}: no spot")
        return self.places[i]

    def warp(self, value: Tensor, affine: Any) -> Tensor:
        return affine.points(value)

    def collate(self, values: list[Tensor], samples: Tensor, training: bool) -> Fields:
        return {"spot": torch.stack(values).to(samples.device)}


SPOT = 9
"""pixels across"""


def spotted(root: Path, sizes: list[tuple[int, int]], bad: frozenset[int] = frozenset()) -> ImageSet:
    root.mkdir()
    draw, places = np.random.default_rng(0), []
    for i, (height, width) in enumerate(sizes):
        image = np.zeros((height, width, 3), np.uint8)
        top, left = (int(draw.integers(0, side - SPOT)) for side in (height, width))
        image[top : top + SPOT, left : left + SPOT] = 255
        (root / f"{i}.png").write_bytes(encoded(image))
        places.append([left + SPOT / 2, top + SPOT / 2])
    files = sorted(root.iterdir(), key=lambda file: int(file.stem))
    return ImageSet("spots", [file.name for file in files], files, Spots(torch.tensor(places), bad), 3)


def off_by(batch: Batch) -> Tensor:
    """How far the brightest pixels of each image that shows its whole spot are from where the target says, in pixels.

    The spot lies well within the image and its reflections do not count.
    """
    images, spots = batch["image"].mean(dim=1), batch["spot"]
    height, width = images.shape[1:]
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    found = []
    for image, (x, y) in zip(images, spots, strict=True):
        weight = (image + 1).clamp(min=0) * ((rows - y).abs() < 5) * ((columns - x).abs() < 5)
        if 5 <= x <= width - 5 and 5 <= y <= height - 5:
            centre = torch.stack([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
            found.append((centre - torch.stack([x, y])).norm())
    return torch.stack(found) if found else torch.empty(0)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
@pytest.mark.parametrize("sizes", [[(40, 52)] * 12, [(150, 110), (64, 100), (32, 32), (200, 90)] * 3])
def test_a_spatial_target_stays_on_its_pixels(
    tmp_path: Path, memory: bool, workers: int, crop: Literal["none", "shift", "resized"], sizes: list[tuple[int, int]]
) -> None:
    images = spotted(tmp_path / "images", sizes)
    augment = Augment(crop=crop, flip=True, scale=(0.4, 1.0), shift=3)
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "augment": augment, "memory": memory, "workers": workers}
    made = Loader(images, Preprocess((32, 40)), train=True, **settings)
    batches = [batch for batch, _ in zip(made.batches(), range(9), strict=False)]
    off = torch.cat([off_by(batch) for batch in (*batches, *made.evaluation())])
    assert len(off) > 15 and float(off.max()) < 0.8, off
    assert all(len(batch["affine"].matrix) == 4 for batch in batches)
    first, second = images.target.split(batches[0], 2)
    assert torch.equal(torch.cat([first["affine"].matrix, second["affine"].matrix]), batches[0]["affine"].matrix)
    assert second["affine"].image_of.tolist() == [0, 1] and torch.equal(second["spot"], batches[0]["spot"][2:])


@pytest.mark.parametrize("memory", [False, True])
def test_a_target_that_cannot_be_read_leaves_its_image_out(
    tmp_path: Path, memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = spotted(tmp_path / "images", [(40, 52)] * 6, bad=frozenset([2]))
    made = Loader(images, Preprocess((32, 40)), batch_size=3, seed=0, train=True, memory=memory, max_bad=0.5)
    seen = {int(s) for _, batch in zip(range(4), made.batches(), strict=False) for s in batch["sample"]}
    assert 2 not in seen and [int(s) for batch in made.evaluation() for s in batch["sample"]] == [0, 1, 3, 4, 5]
    assert caplog.messages == ["left out: 2: no spot"]


def test_splits_go_by_strata() -> None:
    images = open_data("digits").train
    wordless = ImageSet("plain", images.keys, images.items, Texts([["a"]] * len(images)), 1)
    for whole in (images, wordless):
        train, val = split_val(whole)
        assert len(train) + len(val) == len(whole) and type(val.target) is type(whole.target)
    assert set(split_val(images)[0].labels.tolist()) == set(range(10))
