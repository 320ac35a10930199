"""Evaluation and prediction of frames that differ in size from image to image."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import toys
from PIL import Image

from vitrail.data.loader import Loader
from vitrail.data.masks import Masks
from vitrail.data.prepare import prepare, size_of
from vitrail.data.sets import ImageSet
from vitrail.examples import examples
from vitrail.tasks.task import Task
from vitrail.train.loop import Components, evaluate


class Whole(toys.Dense):
    """Sees each image whole, at its own aspect ratio."""

    def frames(self, image: Any) -> Any:
        opened = self.preprocess.open(image)
        height, width = (2 * round(side / 4) for side in size_of(opened, self.preprocess))
        return prepare(opened, replace(self.preprocess, size=(height, width), resize="squash"))


def test_frames_of_different_sizes_are_answered_together_as_alone() -> None:
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(12, 20), (12, 20), (8, 8), (30, 14)]]
    task = Whole()
    together, alone = task.predict(images), [task.predict([image])[0] for image in images]
    for one, other, image in zip(together, alone, images, strict=True):
        assert isinstance(one, toys.Segments) and isinstance(other, toys.Segments)
        assert torch.equal(one.mask, other.mask) and one.mask.shape == image.shape[1:]


def test_evaluation_joins_frames_of_one_size_up_to_the_pixels_of_a_batch() -> None:
    sizes = [(12, 20)] * 5 + [(8, 8)] * 3 + [(12, 20)] + [(64, 64)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    masks = Masks([torch.ones(size, dtype=torch.uint8) for size in sizes], list("abcdefghij"), ["dark", "light"])
    data = ImageSet("any", list("abcdefghij"), images, masks)
    task = Whole()
    loader = Loader(data, task.preprocess, batch_size=2, seed=0, train=False, prepare=task.preparation(train=False))
    batches = list(loader.evaluation())
    assert [batch["sample"].tolist() for batch in batches] == [[0, 1], [2, 3], [4], [5, 6, 7], [8], [9]]
    for batch in batches:
        pixels = batch["image"].shape[0] * batch["image"].shape[2] * batch["image"].shape[3]
        assert pixels <= 2 * 8 * 8 or len(batch["sample"]) == 1
        assert batch["affine"].size == tuple(batch["image"].shape[-2:]) and len(batch["truth"]) == len(batch["sample"])
    scores = evaluate(task, {"val": loader}, "val")
    answers = [(task.predict([image])[0].mask == 1) for image in images]  # type: ignore[attr-defined]
    assert scores["pixel_accuracy"] == sum(int(a.sum()) for a in answers) / sum(a.numel() for a in answers)


def test_a_report_shows_answers_that_lie_in_the_image() -> None:
    """By default: the figures that the task draws, with their text."""
    images = [torch.full((3, 12, 20), 40, dtype=torch.uint8) for _ in range(4)]
    for image in images:
        image[:, :, 10:] = 200
    masks = Masks([torch.ones(12, 20, dtype=torch.uint8)] * 4, list("abcd"), ["dark", "light"])
    data, task = ImageSet("any", list("abcd"), images, masks), toys.Dense()
    loader = Loader(data, task.preprocess, batch_size=2, seed=0, train=False, prepare=task.preparation(train=False))
    components = Components(task, loader, loader, None)
    rows = examples(components, {"split": "val"})
    assert [row["text"] for row in rows] == ["2 segments"] * 4
    *spaced, worst, next_worst = examples(components, {"split": "val", "worst": [3, 1]})
    assert spaced == rows and [worst, next_worst] == [{**rows[i], "mistake": True} for i in (3, 1)]
    shown, figure = (Image.open(io.BytesIO(base64.b64decode(rows[0][name]))) for name in ("image", "figure"))
    assert shown.getextrema() == ((40, 200),) * 3
    assert figure.size == (20, 12) and figure.getextrema() == ((0, 255),) * 3
    (section,) = Task.report(SimpleNamespace(examples=rows))
    assert section.html.count("<img") == 4 and rows[1]["figure"] in section.html and "2 segments" in section.html
