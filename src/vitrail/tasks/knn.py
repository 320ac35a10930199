"""Classification by the nearest of the training images, which the model carries: nothing is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import Encoder, one_vector, pooled_width
from vitrail.tasks.task import Batch

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""as DINO evaluates (arXiv 2104.14294, appendix F, after arXiv 1805.01978)"""


class Neighbours(nn.Module):
    """The votes of the k training images whose features point most nearly the same way.

    A neighbour at cosine similarity s votes for its class with weight exp(s / temperature).
    """

    def __init__(
        self, width: int, classes: int, images: int, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
    ) -> None:
        super().__init__()
        self.classes, self.k, self.temperature = classes, k, temperature
        self.register_buffer("keys", torch.zeros(images, width))
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))
        self.keys: Tensor
        """unit vectors [N, D]"""
        self.labels: Tensor
        """class numbers [N]"""

    def build_index(self, vectors: Tensor, labels: Tensor) -> None:
        """Take the features [N, D] of the training images and their classes [N]."""
        self.keys, self.labels = F.normalize(vectors, dim=1), labels

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] to the logarithm of the votes' shares [B, K]; a class without a vote has that of 1e-9."""
        near, rows = (F.normalize(one_vector(x), dim=1) @ self.keys.T).topk(min(self.k, len(self.keys)), dim=1)
        weights = (near / self.temperature).softmax(dim=1)
        votes = weights.new_zeros(len(x), self.classes).scatter_add_(1, self.labels[rows], weights)
        return votes.clamp(min=1e-9).log()


class KNN(Classify):
    """A classifier, answered by k nearest neighbours. Keys of a batch as there."""

    name = "knn"

    def __init__(self, encoder: Encoder, classes: list[str], preprocess: Preprocess, images: int) -> None:
        """`images` is the number of training images that the head remembers."""
        super().__init__(encoder, classes, preprocess)
        self.head: Neighbours = Neighbours(pooled_width(encoder.config), len(classes), images)  # type: ignore[assignment]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        raise UserError("k nearest neighbours has no loss: load it with classes=N to train a head")

    def config(self) -> dict[str, Any]:
        return {"encoder": super().config()["encoder"], "images": len(self.head.keys)}
