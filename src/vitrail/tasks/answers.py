"""What answers of all tasks share: how they are batched, and checks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitrail.data.affine import Affine
from vitrail.errors import UserError
from vitrail.tasks.values import Batch, Prediction

if TYPE_CHECKING:
    from vitrail.data.prepare import Sample
    from vitrail.tasks.task import Task

ANSWERED = 32
"""images of the preprocessing's size, or as many pixels, that are answered at once"""


def answer_all(task: Task, prepared: Sequence[Sample], tell: Callable[[str], None] | None = None) -> list[Prediction]:
    """One answer for each image as `Task.prepare` gives it (see `Task.answers`; `tell` is that of `Task.stream`)."""
    from vitrail.data.prepare import batched  # imports torchvision, which takes seconds

    device = next(task.parameters()).device
    height, width = task.preprocess.size
    found: list[Prediction] = []
    for batch in batched(prepared, lambda sample: sample.images, ANSWERED * height * width):
        # As bytes to the device, which normalises all of them at once.
        images = task.preprocess.normalise(torch.cat([sample.images for sample in batch]).to(device))
        first = [0, *accumulate(len(sample.images) for sample in batch[:-1])]
        samples = torch.tensor([numbered_by_pixels(images[i]) for i in first], device=device)
        affine = Affine.join([sample.affine for sample in batch if sample.affine is not None])
        inputs = {"image": images, "sample": samples, "affine": affine}
        answers = task.answer(inputs if tell is None else {**inputs, "tell": tell})
        if len(answers) != len(batch):
            raise ValueError(f"{len(answers)} answers for {len(batch)} images: `answer` must merge frames")
        found += answers
    return found


def finite(outputs: Tensor) -> Tensor:
    """The outputs of a model, where they are numbers. Raises UserError elsewhere: no answer can be read from them."""
    if not outputs.isfinite().all():
        raise UserError("the model's outputs are not finite: its weights are damaged, or overflow in this precision")
    return outputs


def one_frame_each(batch: Batch) -> Tensor:
    """The images of a batch. Raises ValueError if an image has several frames, which only `answer` can merge."""
    if len(batch["image"]) != len(batch["sample"]):
        raise ValueError(
            f"{len(batch['image'])} frames of {len(batch['sample'])} images: a task with several frames per image is "
            'scored by its answers (metric_reads = "answers"), and its features are not scored'
        )
    images: Tensor = batch["image"]
    return images


ONE_CLASS, OTHERS = 0.98, 0.1
"""fraction of all answers that are one class in a collapsed model, and of the truth that is of other classes"""


def one_class(confusion: Sequence[Sequence[int]], classes: Sequence[str], of: str = "images") -> str | None:
    """In words, that nearly all predictions are of one class although the truth is not; None if they are not.

    `confusion[i][j]` counts what is of class i and predicted as class j.
    """
    predicted = [sum(row[j] for row in confusion) for j in range(len(classes))]
    total = sum(predicted)
    common = max(range(len(classes)), key=predicted.__getitem__, default=0)
    if not total or predicted[common] < ONE_CLASS * total or sum(confusion[common]) > (1 - OTHERS) * total:
        return None
    return f"{predicted[common] / total:.0%} of the {of} are predicted as {classes[common]!r}, whatever they show"


def numbered_by_pixels(image: Tensor) -> int:
    """A sample number for a prepared image that has none: what is drawn for it depends on its pixels alone."""
    return zlib.crc32(image.cpu().numpy().tobytes())
