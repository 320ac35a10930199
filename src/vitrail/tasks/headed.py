"""Shared by classification and regression: an encoder, its pooling, and a head with named outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.plain import describe
from vitrail.tasks.encoder import KINDS, Encoder
from vitrail.tasks.task import Task
from vitrail.tasks.values import Portable, Problem
from vitrail.variants import head_for
from vitrail.vit import Head, Tokens, ViTConfig


class Headed(Task):
    """A task that predicts from the head's outputs; each task defines their meaning."""

    problem: Problem | None = None
    """what the outputs mean, in transformers' words; None if there is only one possible meaning"""

    def __init__(
        self, encoder: Encoder, outputs: int, preprocess: Preprocess, hidden: int | None = None, bias: float = 0.0
    ) -> None:
        """`hidden` is the width of the paper's pre-training head; `bias` is the initial bias of the outputs."""
        super().__init__()
        self.encoder = encoder
        config = encoder.config
        if isinstance(config, ViTConfig):  # its pooling may concatenate tokens or return two
            self.head = head_for(config, outputs, hidden, bias)
        else:
            self.head = Head(config.width, outputs, hidden, bias)
        self.preprocess = preprocess
        self.hidden = hidden

    def with_classes(self, classes: list[str]) -> Task:
        from vitrail.tasks.classify import Classify

        return Classify(self.encoder, classes, self.preprocess) if classes else super().with_classes(classes)

    @property
    def portable(self) -> Portable | None:
        return Portable(self.outputs, self.hidden, self.problem)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised images [B, C, H, W] to the head's outputs [B, K]; `keep` is stochastic depth's."""
        return self.head(self.encoder.pool(self.encoder(images) if keep is None else self.encoder(images, keep)))

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def config(self) -> dict[str, Any]:
        return {"encoder": describe(self.encoder.config, KINDS), "hidden": self.hidden}
