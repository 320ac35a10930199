"""Regression: numbers that are read from an image, such as an age or an angle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.tasks.encoder import Encoder
from vitrail.tasks.headed import Headed
from vitrail.tasks.task import Batch, Metric, Prediction


class Regress(Headed):
    """An encoder, its pooling and a head whose outputs are the values. Key of a batch: `image` [B, C, H, W].

    vitrail reads such heads and answers with them; it does not train or score them yet.
    """

    name = "regress"
    score = ""

    def __init__(
        self, encoder: Encoder, values: list[str], preprocess: Preprocess, *, hidden: int | None = None
    ) -> None:
        """`values` are the names of the outputs."""
        super().__init__(encoder, len(values), preprocess, hidden)
        self.values = values
        self.classes: list[str] = []

    @property
    def outputs(self) -> list[str]:
        return self.values

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        raise UserError("vitrail does not train a head for regression: load it with classes=N to train one for classes")

    def answer(self, batch: Batch) -> list[Prediction]:
        """The head's outputs as they are, in its order."""
        return [
            Prediction(values=[{"name": name, "value": value} for name, value in zip(self.values, row, strict=True)])
            for row in self(batch["image"]).float().tolist()
        ]

    def metric(self) -> Metric:
        raise UserError("a head for regression has values and no classes to score: load it with classes=N and train it")

    def config(self) -> dict[str, Any]:
        return {**super().config(), "values": self.values}
