"""Scores of frozen features: k nearest neighbours and a linear probe."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.tasks.classify.knn import Neighbours
from vitrail.tasks.classify.linear_probe import linear_probe, scores_of
from vitrail.tasks.values import Features


def knn(train: Features, vectors: Tensor, classes: int) -> Tensor:
    """Log votes [N, K] of the nearest training images for features [N, D], as DINO's k-NN counts them."""
    head = Neighbours(vectors.shape[1], classes, 0)
    head.build_index(*train)
    # In chunks: the similarities to a large training set might not fit in memory.
    return torch.cat([head(chunk) for chunk in vectors.split(1024)])


def probe(train: Features, val: Features, scored: Features, classes: int) -> dict[str, float]:
    """`knn_top1` and `linear_top1` on `scored`, fitted on the training split, with the penalty chosen on `val`."""
    linear = linear_probe(train, val, classes)
    return {
        "knn_top1": scores_of(knn(train, scored.vectors, classes), scored.labels)["top1"],
        "linear_top1": scores_of(linear(scored.vectors), scored.labels)["top1"],
        "linear_strength": linear.strength,
    }
