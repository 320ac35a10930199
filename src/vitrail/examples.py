"""Images of a scored split with the predictions of a trained model, for the report of a run."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image

from vitrail.errors import UserError
from vitrail.train.loop import Components

THUMBNAIL, FIGURE = 160, 480
"""longer sides in pixels of an image in a report, and of an image with its answer drawn into it"""


def examples(components: Components) -> list[dict[str, Any]]:
    """Evenly spaced images of the test or validation split with the model's predictions, for the report.

    Where answers are places in the image there are fewer, and the images are larger.
    """
    loader = components.test or components.val
    task, chosen = components.task, loader.set
    count, side = (12, FIGURE) if task.target.spatial else (24, THUMBNAIL)
    rows = []
    numbers = torch.linspace(0, len(chosen) - 1, min(count, len(chosen))).long().tolist()
    for i in numbers:
        try:
            opened = chosen.image(i, task.preprocess.channels)
            answer = task.answers([task.prepare(chosen.open(i))])[0]
        except UserError:
            continue  # the loader has already reported an unreadable image
        image = Image.fromarray(
            opened[:3].permute(1, 2, 0).squeeze(2).numpy() if len(opened) != 2 else opened[0].numpy()
        )
        row = {
            "image": as_png(image, side),
            "text": answer.text(),
            "truth": chosen.target.truth(i),
        }
        row = {**answer.row(), **row}
        if task.target.spatial:  # the answer lies in the image, and its row does not show it
            row["figure"] = as_png(answer.draw(image), FIGURE)
        rows.append(row)
    return rows


def as_png(image: Image.Image, side: int) -> str:
    """The image, its longer side at most `side` pixels, as a PNG in base64."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
