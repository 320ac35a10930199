"""An image of an explanation: as the model sees it, as people see it, and where the one lies in the other."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from vitrail.data.decode import EncodedImage
from vitrail.data.prepare import Sample, size_of
from vitrail.data.preprocess import AnyImage
from vitrail.explain.packing import Array
from vitrail.tasks.task import Task

MAX_SIDE = 640
"""longer side in pixels of the original image that is shown"""


class ExplainedImage(NamedTuple):
    """An image as the model and as people see it."""

    sample: Sample
    frame: list[float]
    """as `frame_of` gives it"""
    shown: Array
    """the image, uint8 [H, W, 3], with its longer side at most `MAX_SIDE` pixels"""


def explained_image(task: Task, image: AnyImage) -> ExplainedImage:
    """Decode an image for an explanation. Does not run the model. Raises UserError for a file that is not an image."""
    opened = task.preprocess.open(image)
    sample = task.prepare(opened)
    return ExplainedImage(sample, frame_of(task, opened, sample), three_channels(shown_image(task, opened)).numpy())


def frame_of(task: Task, opened: EncodedImage | Tensor, sample: Sample) -> list[float]:
    """Where the model's input lies in the image: left, top, right and bottom, as shares of its size."""
    frame = [0.0, 0.0, 1.0, 1.0]
    if sample.affine is not None:
        height, width = size_of(opened, task.preprocess)
        (a, b, x), (c, d, y) = sample.affine.matrix[0].tolist()
        if not b and not c and a > 0 and d > 0:
            rows, columns = sample.affine.size
            frame = [-x / a / width, -y / d / height, (columns - x) / a / width, (rows - y) / d / height]
    return [round(edge, 6) for edge in frame]


def shown_image(task: Task, opened: EncodedImage | Tensor) -> Tensor:
    """The whole image, uint8 [C, h, w], with its longer side at most `MAX_SIDE` pixels."""
    height, width = size_of(opened, task.preprocess)
    scale = min(1, MAX_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return replace(task.preprocess, size=size, resize="squash", crop_fraction=1.0).prepare(opened)


def three_channels(image: Tensor) -> Tensor:
    """[C, H, W] to [H, W, 3]: the first three channels, or the first one as grey."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).contiguous().cpu()
