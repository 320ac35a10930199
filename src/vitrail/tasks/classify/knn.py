"""k nearest neighbours: a classification head that stores the training images' features. Nothing is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.tasks.encoder import one_vector

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""k and temperature as in DINO's evaluation (arXiv 2104.14294, appendix F, after arXiv 1805.01978)"""


class Neighbours(nn.Module):
    """The votes of the k training images whose features have the highest cosine similarity.

    A neighbour at cosine similarity s votes for its class with weight exp(s / temperature).
    """

    def __init__(
        self, width: int, classes: int, images: int, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
    ) -> None:
        """Allocates the features of `images` training images, [N, `width`]."""
        super().__init__()
        self.classes, self.k, self.temperature = classes, k, temperature
        self.register_buffer("keys", torch.zeros(images, width))
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))
        self.keys: Tensor
        """unit vectors [N, D]"""
        self.labels: Tensor
        """class numbers [N]"""

    def build_index(self, vectors: Tensor, labels: Tensor) -> None:
        """Store the features [N, D] of the training images and their classes [N]."""
        self.keys, self.labels = F.normalize(vectors, dim=1), labels

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] to the logarithms of the vote fractions [B, K]; at least log(1e-9)."""
        near, rows = (F.normalize(one_vector(x), dim=1) @ self.keys.T).topk(min(self.k, len(self.keys)), dim=1)
        weights = (near / self.temperature).softmax(dim=1)
        votes = weights.new_zeros(x.shape[0], self.classes).scatter_add_(1, self.labels[rows], weights)
        return votes.clamp(min=1e-9).log()
