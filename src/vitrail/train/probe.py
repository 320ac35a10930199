"""Scores of frozen features: k nearest neighbours and a linear probe.

The encoder reads each image once, with the preprocessing of evaluation; both probes use its vectors.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vitrail.data.loader import Loader
from vitrail.tasks.encoder import one_vector
from vitrail.tasks.knn import Neighbours
from vitrail.tasks.linear_probe import linear_probe, scores_of
from vitrail.tasks.task import Task
from vitrail.tasks.values import Features
from vitrail.train.device import autocast


@torch.no_grad()
def features(task: Task, loader: Loader, precision: Literal["auto", "bf16", "fp32"] = "auto") -> Features:
    """The features of a split, kept on the task's device."""
    task.eval()
    vectors, labels = [], []
    for batch in loader.evaluation():
        with autocast(batch["image"].device, precision):
            vectors.append(one_vector(task.encoder.pool(task.features(batch["image"])).float()))
        labels.append(batch["label"])
    return Features(torch.cat(vectors), torch.cat(labels))


def knn(train: Features, vectors: Tensor, classes: int) -> Tensor:
    """Log votes [N, K] of the nearest training images for features [N, D], as DINO's k-NN counts them."""
    head = Neighbours(vectors.shape[1], classes, 0)
    head.build_index(*train)
    # In chunks: the similarities to a large training set might not fit in memory.
    return torch.cat([head(chunk) for chunk in vectors.split(1024)])


def probe(task: Task, train: Loader, val: Loader, scored: Loader) -> dict[str, Any]:
    """`knn_top1` and `linear_top1` on `scored`, fitted on the training split, with the penalty chosen on `val`."""
    fitted, held_out, test = (features(task, loader) for loader in (train, val, scored))
    classes = len(train.set.classes)
    linear = linear_probe(fitted, held_out, classes)
    return {
        "knn_top1": scores_of(knn(fitted, test.vectors, classes), test.labels)["top1"],
        "linear_top1": scores_of(linear(test.vectors), test.labels)["top1"],
        "linear_strength": linear.strength,
        "count": len(test.labels),
    }
