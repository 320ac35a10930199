"""The scores of a model and of its export on the same images, and images to calibrate int8 on."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from torch import Tensor

from vitrail.errors import UserError
from vitrail.tasks.task import Task

log = logging.getLogger("vitrail")

CALIBRATED = 300
"""images that int8 is calibrated on"""
LOST = 0.005
"""of a score, or that share of one above 1: an export that loses more says so"""


class Scores(NamedTuple):
    """The score that chooses the task's checkpoints."""

    name: str
    split: str
    images: int
    model: float
    export: float
    lost: float
    """by how much the export is worse; below 0 where it is better"""

    def text(self) -> str:
        """In one line, with a remedy where it loses more than `LOST`."""
        found = (
            f"{self.name} on {self.images} images of {self.split}: model {self.model:.4f}, export {self.export:.4f} "
            f"({self.export - self.model:+.4f})"
        )
        if self.lost <= LOST * max(1.0, abs(self.model)):
            return found
        return f"{found}, which is more than {LOST}: try another format, or --precision fp32"


def check_data(task: Task, data: str) -> None:
    """UserError for data that the task cannot be scored on, before minutes of tracing and calibration."""
    if task.score is None:
        return
    from vitrail.train.build import open_for

    splits = open_for(task, data, task.data_options())
    task.metric(next(found for found in (splits.test, splits.val, splits.train) if found))


def score_both(
    task: Task, engine: Task, source: str, data: str, split: str | None, images: int | None
) -> Scores | None:
    """The scores of both on a split of the data; None for a task that has no score."""
    if task.score is None:
        return None
    from vitrail.start import score

    found: list[dict[str, Any]] = []
    for model in (task, engine):
        name, scores = score(model, source, data, split, images=images)
        found.append(scores)
    of = task.score.name
    own, others = found[0][of], found[1][of]
    lost = own - others if task.score.best == "max" else others - own
    return Scores(of, name, found[0]["count"], own, others, lost)


def cost_of_merging(scores: Scores, plain: Task, source: str, data: str, split: str | None, images: int | None) -> str:
    """In one line, what the same model scores when no tokens merge, `plain`."""
    from vitrail.start import score

    found = score(plain, source, data, split, images=images)[1][scores.name]
    return f"{scores.name} without merging {found:.4f}: merging changes it by {scores.model - found:+.4f}"


def calibration_images(task: Task, data: str) -> list[Tensor]:
    """Normalised images [1, C, H, W] of the training split, as evaluation prepares them.

    Warns of unreadable ones. UserError if all are.
    """
    from vitrail.data.decode import BadImage
    from vitrail.train.build import open_for

    splits = open_for(task, data, task.data_options())
    there = next(found for found in (splits.train, splits.val, splits.test) if found)
    chosen = there.spread(CALIBRATED)
    found = []
    for i in range(len(chosen)):
        try:
            image = task.preprocess.prepare(chosen.open(i))
        except BadImage as error:
            log.warning(f"{error}; int8 is calibrated without it")
            continue
        found.append(task.preprocess.normalise(image)[None])
    if not found:
        raise UserError(f"int8 is calibrated on images, and none of {data} can be read: choose another --data")
    return found
