"""Frozen features: the encoder reads each image once, with the preprocessing of evaluation."""

from __future__ import annotations

from typing import Any

import torch

from vitrail.data.loader import Loader
from vitrail.errors import UserError
from vitrail.tasks.encoder import one_vector
from vitrail.tasks.task import Task
from vitrail.tasks.values import Features
from vitrail.train.device import Precision, autocast
from vitrail.train.parallel import ALONE, World


@torch.no_grad()
def features(task: Task, loader: Loader, precision: Precision = "auto", world: World = ALONE) -> Features:
    """The features of a split, kept on the task's device.

    Each rank of `world` computes those of its share of the split, and gets all. Raises UserError if the target of the
    split has no row per image, and if no image can be read.
    """
    labels = loader.target.per_image()
    task.eval()
    vectors, samples = [], []
    for batch in loader.evaluation():
        if len(batch["image"]) != len(batch["sample"]):
            raise UserError("features are those of one frame per image, and an option asks for several: leave it out")
        with autocast(batch["image"].device, precision):
            vectors.append(one_vector(task.encoder.pool(task.features(batch["image"])).float()))
        samples.append(batch["sample"])
    own = {"vectors": torch.cat(vectors), "samples": torch.cat(samples)} if vectors else {}
    every = world.joined_rows(own, loader.device)
    if not every:
        raise UserError(f"no image of {loader.set.name} can be read")
    rows, places = every["vectors"], every["samples"]
    if world.size > 1:
        order = places.argsort()
        rows, places = rows[order], places[order]
    return Features(rows, labels.to(rows.device)[places])


def probe(task: Task, train: Loader, val: Loader, scored: Loader) -> dict[str, Any]:
    """The scores of the features of `scored` (see `Task.probe`), and `count`, its number of images."""
    fitted, held_out, test = (features(task, loader) for loader in (train, val, scored))
    return {**task.probe(fitted, held_out, test, len(train.set.classes)), "count": len(test.labels)}
