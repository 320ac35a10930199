"""An encoder without a head: images to vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.plain import describe
from vitrail.tasks.encoder import KINDS, Encoder
from vitrail.tasks.task import Batch, Metric, Prediction, Task, finite
from vitrail.vit import Tokens


class Embed(Task):
    """Key of a batch: `image` [B, C, H, W], normalised floats. It has nothing to train and no score of its own."""

    name = "embed"
    score = ""

    def __init__(self, encoder: Encoder, preprocess: Preprocess) -> None:
        super().__init__()
        self.encoder = encoder
        self.preprocess = preprocess
        self.classes: list[str] = []

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] to pooled vectors [B, D]."""
        return self.encoder.pool(self.encoder(images))

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        raise UserError("an encoder without a head has no loss: load it with classes=N to train it")

    def answer(self, batch: Batch) -> list[Prediction]:
        return [Prediction(embedding=vector) for vector in finite(self(batch["image"])).float().tolist()]

    def metric(self) -> Metric:
        raise UserError("an encoder without a head has no score: load it with classes=N and train it")

    def config(self) -> dict[str, Any]:
        return {"encoder": describe(self.encoder.config, KINDS)}
