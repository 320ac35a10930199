"""Bounding boxes with classes, as a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vitrail.data.affine import Affine
from vitrail.data.targets import Target
from vitrail.errors import UserError

VISIBLE = 0.1
"""A box is dropped, in training and evaluation, if a smaller fraction of its area than this is in the input."""
NOTHING = -1
"""the class of padding, where there is no box"""


class Marked(NamedTuple):
    """The boxes of one image or frame."""

    boxes: Tensor
    """float32 [M, 4]: left, top, right and bottom, in pixels of the upright original as read, or in a frame as
    fractions of the input's width and height"""
    labels: Tensor
    """int64 [M]"""


class Boxes(Target):
    """Boxes [M, 4] (left, top, right, bottom, in pixels of the upright image), each with a class; M may be 0.

    A batch of B images is padded to M, the largest number of boxes per image in the set, so that shapes are the same
    in every batch: `box` float32 [B, M, 4], as fractions of the input's width and height (0 to 1), clipped to the
    input; `box_class` int64 [B, M], -1 for padding, which comes last. A box is dropped if a crop leaves less than the
    fraction `visible` of its area.
    """

    fields = ("box", "box_class")
    spatial = True
    noun = "boxes"

    def __init__(
        self,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        names: Sequence[str],
        classes: list[str],
        visible: float = VISIBLE,
    ) -> None:
        if not len(boxes) == len(labels) == len(names):
            raise ValueError(f"{len(boxes)} lists of boxes have {len(labels)} lists of classes and {len(names)} names")
        if not 0 <= visible <= 1:
            raise UserError(f"visible must be a fraction from 0 to 1, got {visible}")
        self.boxes = [torch.as_tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in boxes]
        self.labels = [torch.as_tensor(row, dtype=torch.int64) for row in labels]
        self.names, self.classes, self.visible = names, classes, visible
        self.most = max((len(rows) for rows in self.boxes), default=0)
        for name, rows, row in zip(names, self.boxes, self.labels, strict=True):
            if reason := _wrong(rows, row, len(classes)):
                raise UserError(f"{name}: {reason}")

    def __len__(self) -> int:
        return len(self.boxes)

    def subset(self, places: Tensor) -> Self:
        boxes, labels, names = (
            [column[i] for i in places.tolist()] for column in (self.boxes, self.labels, self.names)
        )
        return type(self)(boxes, labels, names, self.classes, self.visible)

    def joined(self, other: Self) -> Self:
        boxes, labels = self.boxes + other.boxes, self.labels + other.labels
        return type(self)(boxes, labels, [*self.names, *other.names], self.classes, self.visible)

    def fingerprint(self) -> bytes:
        columns = zip(self.boxes, self.labels, strict=True)
        return b"\0".join(rows.numpy().tobytes() + row.numpy().tobytes() for rows, row in columns)

    def read(self, i: int) -> Marked:
        return Marked(self.boxes[i], self.labels[i])

    def warp(self, value: Marked, affine: Affine) -> list[Marked]:
        """The boxes in each frame of their image."""
        size = torch.tensor([affine.size[1], affine.size[0]]).repeat(2)
        found = []
        for frame in range(len(affine)):
            boxes, visible = affine.boxes(value.boxes, frame)
            keep = (visible >= self.visible) & (visible > 0)
            found.append(Marked((boxes / size)[keep], value.labels[keep]))
        return found

    def collate(self, values: list[list[Marked]], samples: Tensor, training: bool) -> dict[str, Any]:
        frames = [frame for value in values for frame in value]
        box = torch.zeros(len(frames), self.most, 4)
        box_class = torch.full((len(frames), self.most), NOTHING)
        for i, (boxes, labels) in enumerate(frames):
            box[i, : len(boxes)] = boxes
            box_class[i, : len(labels)] = labels
        columns = {"box": box, "box_class": box_class}
        return {name: column.to(samples.device, non_blocking=True) for name, column in columns.items()}

    def mix(self, fields: dict[str, Any], partner: Tensor, share: Tensor) -> dict[str, Any]:
        raise UserError("boxes cannot follow mixup or cutmix, which join two images: set --mixup 0 and --cutmix 0")


def _wrong(boxes: Tensor, labels: Tensor, classes: int) -> str | None:
    """What is wrong with the boxes of an image, or None."""
    if labels.shape != (len(boxes),):
        return f"{len(boxes)} boxes have {labels.numel()} classes"
    if not bool(boxes.isfinite().all()):
        return "a box has a coordinate that is not a finite number"
    if bool((bad := (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)).any()):
        row = [round(number, 2) for number in boxes[bad][0].tolist()]
        return f"the box {row} has no area: it must be left, top, right, bottom in pixels"
    if bool((bad := (labels < 0) | (labels >= classes)).any()):
        return f"a box has the class {int(labels[bad][0])}, but there are {classes}, from 0"
    return None
