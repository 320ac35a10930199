"""An encoder without a head: images to vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.plain import describe, from_description
from vitrail.tasks.answers import finite
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for, one_vector
from vitrail.tasks.exported import Program, whole
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Checkpoint, Metric, Portable, Prediction
from vitrail.vit import Tokens

if TYPE_CHECKING:
    from vitrail.data.sets import ImageSet


@dataclass(frozen=True)
class Embedding(Prediction):
    """The vector of an image."""

    embedding: list[float]

    def row(self) -> dict[str, Any]:
        return {"embedding": self.embedding}

    def text(self) -> str:
        return f"a vector of {len(self.embedding)} numbers (--json prints it)"


class Embed(Task):
    """Key of a batch: `image` [B, C, H, W], normalised floats. It has no loss and no score."""

    name = "embed"
    headless = True

    def __init__(self, encoder: Encoder, preprocess: Preprocess) -> None:
        super().__init__()
        self.encoder = encoder
        self.preprocess = preprocess

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        encoder = encoder_for(from_description(config["encoder"], KINDS, "vit"))
        return cls(encoder, Preprocess.from_dict(config["preprocess"]))

    def with_classes(self, classes: list[str]) -> Task:
        from vitrail.tasks.classify import Classify

        return Classify(self.encoder, classes, self.preprocess) if classes else self

    @property
    def portable(self) -> Portable:
        return Portable()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] to pooled vectors [B, D]."""
        return self.encoder.pool(self.encoder(images))

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        raise UserError("an encoder without a head has no loss: load it with classes=N to train it")

    def answer(self, batch: Batch) -> list[Prediction]:
        return [Embedding(vector) for vector in finite(self(batch["image"])).float().tolist()]

    def explained(self, batch: Batch, outputs: Sequence[int] | None = None) -> Tensor:
        """The length of each image's vector, [B]; or some of its entries."""
        vectors = one_vector(self(batch["image"]))
        return vectors.norm(dim=1) if outputs is None else vectors[:, list(outputs)]

    def programs(self, batch: Batch) -> dict[str, Program]:
        return whole(self, batch, 'answer = " ".join(str(number) for number in outputs[0])\n')

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> Metric:
        raise UserError("an encoder without a head has no score: load it with classes=N and train it")

    def config(self) -> dict[str, Any]:
        return {"encoder": describe(self.encoder.config, KINDS)}
