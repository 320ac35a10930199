"""How good an encoder's features are as they stand: k nearest neighbours, and a linear classifier on them.

The encoder reads each image once, prepared as for evaluation; both probes work on the vectors that it gave.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vitrail.data.loader import Loader
from vitrail.tasks.encoder import one_vector
from vitrail.tasks.knn import Neighbours
from vitrail.tasks.linear_probe import linear_probe, scores_of
from vitrail.tasks.task import Features, Task
from vitrail.train.device import autocast


@torch.no_grad()
def features(task: Task, loader: Loader, precision: Literal["auto", "bf16", "fp32"] = "auto") -> Features:
    """Read a split once. The vectors are kept on the device of the task."""
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
    # In parts: the similarities to a large training set would not fit at once.
    return torch.cat([head(part) for part in vectors.split(1024)])


def probe(task: Task, train: Loader, val: Loader, part: Loader) -> dict[str, Any]:
    """`knn_top1` and `linear_top1` on a part, learned from the training part, with the penalty chosen on `val`."""
    known, held_out, asked = (features(task, loader) for loader in (train, val, part))
    classes = len(train.set.classes)
    linear = linear_probe(known, held_out, classes)
    return {
        "knn_top1": scores_of(knn(known, asked.vectors, classes), asked.labels)["top1"],
        "linear_top1": scores_of(linear(asked.vectors), asked.labels)["top1"],
        "linear_strength": linear.strength,
        "count": len(asked.labels),
    }
