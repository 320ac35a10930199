"""Images of a scored split with the predictions of a trained model, for the report of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from vitrail.data.loader import Loader
from vitrail.errors import UserError
from vitrail.tasks.task import Task
from vitrail.train.loop import Components

THUMBNAIL, FIGURE = 160, 480
"""longer sides in pixels of an image in a report, and of an image with its answer drawn into it"""


def examples(components: Components, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Evenly spaced images of the scored split with the model's predictions, for the report, and the worst mistakes.

    `scores` are those of the run's end; the rows of the worst mistakes have `mistake`. Where answers are places in the
    image there are fewer, and the images are larger.
    """
    loader = (components.val if scores["split"] == "val" else components.test) or components.val
    task, count = components.task, len(loader.set)
    spaced = torch.linspace(0, count - 1, min(12 if task.target.spatial else 24, count)).long().tolist()
    worst = scores.get("worst", [])
    rows = [row for i in spaced if (row := _row(task, loader, i)) is not None]
    return rows + [{**row, "mistake": True} for i in worst if (row := _row(task, loader, i)) is not None]


def _row(task: Task, loader: Loader, i: int) -> dict[str, Any] | None:
    """One image with its answer and its truth; None if either is unusable, which the loader has reported."""
    images = loader.set
    if i in loader.bad:
        return None
    try:
        opened, truth = images.image(i, task.preprocess.channels), images.target.truth(i)
        answer = task.answers([task.prepare(images.open(i))])[0]
    except UserError:
        return None
    image = Image.fromarray(opened[:3].permute(1, 2, 0).squeeze(2).numpy() if len(opened) != 2 else opened[0].numpy())
    side = FIGURE if task.target.spatial else THUMBNAIL
    row = {**answer.row(), "image": as_png(image, side), "text": answer.text(), "truth": truth}
    if task.target.spatial:  # the answer lies in the image, and its row does not show it
        row["figure"] = as_png(answer.draw(image), FIGURE)
    return row


def as_png(image: Image.Image, side: int) -> str:
    """The image, its longer side at most `side` pixels, as a PNG in base64."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
