"""Boxes follow their images, those that a crop leaves out are dropped, and a batch keeps each image's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitrail.data.affine import Affine, flip, tiles
from vitrail.data.boxes import Boxes
from vitrail.errors import UserError

CLASSES = ["ant", "bee"]


def boxes_of(*rows: list[list[float]], visible: float = 0.1) -> Boxes:
    """Images with boxes; each box's class is 0, 1, 0, 1, ..."""
    labels = [torch.arange(len(row)) % 2 for row in rows]
    names = [f"{i}.jpg" for i in range(len(rows))]
    return Boxes([torch.tensor(row) for row in rows], labels, names, CLASSES, visible)


def crop(top: float, left: float, height: float, width: float) -> Affine:
    """Of an image of 100x80 to 40x20 pixels."""
    return Affine.crop(torch.tensor([[top, left, height, width]]), torch.tensor([[80, 100]]), (20, 40))


def test_boxes_are_clipped_and_become_shares_of_the_input() -> None:
    boxes = boxes_of([[0, 0, 50, 40], [25, 20, 75, 60]])
    (found,) = boxes.warp(boxes.read(0), crop(20, 25, 40, 50))
    assert found.boxes.tolist() == [[0, 0, 0.5, 0.5], [0, 0, 1, 1]] and found.labels.tolist() == [0, 1]
    flipped = crop(20, 25, 40, 50).then(flip(torch.tensor([True]), 40))
    assert boxes.warp(boxes.read(0), flipped)[0].boxes.tolist() == [[0.5, 0, 1, 0.5], [0, 0, 1, 1]]


@pytest.mark.parametrize("visible, left", [(0.0, [1, 0]), (0.2, [1, 0]), (0.25, [1, 0]), (0.26, [0]), (1.0, [0])])
def test_boxes_of_which_too_little_is_left_are_dropped(visible: float, left: list[int]) -> None:
    # The first is outside, a quarter of the second is inside, the third is whole.
    boxes = boxes_of([[0, 0, 20, 20], [15, 10, 35, 30], [30, 30, 50, 60]], visible=visible)
    (found,) = boxes.warp(boxes.read(0), crop(20, 25, 40, 50))
    assert found.labels.tolist() == left


def test_a_batch_holds_each_images_own_boxes() -> None:
    boxes = boxes_of([[0, 0, 100, 80]], [], [[0, 0, 50, 40], [50, 40, 100, 80], [0, 0, 10, 10]])
    whole = crop(0, 0, 80, 100)
    samples = torch.tensor([2, 1, 0, 2])
    values = [boxes.warp(boxes.read(i), whole) for i in samples.tolist()]
    fields = boxes.collate(values, samples, True)
    assert fields["box"].shape == (4, 3, 4) and fields["box_class"].tolist() == [
        [0, 1, 0],
        [-1, -1, -1],
        [0, -1, -1],
        [0, 1, 0],
    ]
    assert fields["box"][2].tolist() == [[0, 0, 1, 1], [0] * 4, [0] * 4]
    for count in (1, 2, 3, 4):
        pieces = boxes.split(fields, count)
        for name in boxes.fields:
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), fields[name])
        assert all(len(piece["box"]) == len(piece["box_class"]) for piece in pieces)
    # The shapes do not depend on which images share a batch.
    assert boxes.collate(values[1:2], samples[1:2], True)["box"].shape == (1, 3, 4)


def test_several_frames_of_an_image_have_boxes_of_their_own() -> None:
    boxes = boxes_of([[0, 0, 10, 80], [90, 0, 100, 80]])
    frames = tiles((80, 100), (80, 80))
    values = boxes.warp(boxes.read(0), frames)
    assert [found.labels.tolist() for found in values] == [[0], [1]]
    assert boxes.collate([values], torch.tensor([0]), False)["box_class"].tolist() == [[0, -1], [1, -1]]


@pytest.mark.parametrize(
    "box, label, reason",
    [
        ([5.0, 5, 5, 9], 0, "the box .5.0, 5.0, 5.0, 9.0. has no area"),
        ([5.0, 9, 8, 5], 0, "has no area"),
        ([0.0, 0, float("nan"), 5], 0, "not a finite number"),
        ([0.0, 0, 5, float("inf")], 0, "not a finite number"),
        ([0.0, 0, 5, 5], 2, "a box has the class 2, but there are 2, from 0"),
        ([0.0, 0, 5, 5], -1, "a box has the class -1"),
    ],
)
def test_wrong_boxes_are_refused_by_name(box: list[float], label: int, reason: str) -> None:
    with pytest.raises(UserError, match=f"^cat.jpg: .*{reason}"):
        Boxes([torch.tensor([box])], [torch.tensor([label])], ["cat.jpg"], CLASSES)
    with pytest.raises(UserError, match=r"^cat.jpg: 1 boxes have 2 classes"):
        Boxes([torch.ones(1, 4)], [torch.zeros(2)], ["cat.jpg"], CLASSES)
    with pytest.raises(UserError, match="visible"):
        Boxes([], [], [], CLASSES, 1.5)


def test_subsets_and_marks() -> None:
    boxes = boxes_of([[0, 0, 1, 1]], [], [[0, 0, 2, 2], [1, 1, 2, 2]])
    some = boxes.subset(torch.tensor([2, 1]))
    assert len(some) == 2 and len(some.read(0).boxes) == 2 and some.names == ["2.jpg", "1.jpg"]
    assert boxes.subset(torch.tensor([1, 0])).most == 1
    both = boxes.joined(some)
    assert len(both) == 5 and torch.equal(both.read(3).boxes, boxes.read(2).boxes)
    other = Boxes(boxes.boxes, [1 - row for row in boxes.labels], boxes.names, CLASSES)
    apart = boxes_of([[0, 0, 1, 1]], [[0, 0, 2, 2]], [[1, 1, 2, 2]])
    assert len({found.fingerprint() for found in (boxes, some, both, other, apart)}) == 5
    assert boxes.strata().tolist() == [0, 0, 0]


def test_shares_need_no_rescaling_and_mixing_is_refused() -> None:
    boxes = boxes_of([[0, 0, 1, 1]])
    fields: dict[str, Tensor] = {"box": torch.rand(2, 1, 4), "box_class": torch.zeros(2, 1)}
    assert torch.equal(boxes.rescale(fields, (7, 9))["box"], fields["box"])
    with pytest.raises(UserError, match="boxes cannot follow mixup or cutmix"):
        boxes.mix(fields, torch.tensor([1, 0]), torch.ones(2))
