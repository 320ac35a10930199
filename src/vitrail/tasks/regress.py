"""Regression: numbers predicted from an image, such as an age or an angle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.plain import described
from vitrail.tasks.answers import finite
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for
from vitrail.tasks.headed import Headed
from vitrail.tasks.values import Batch, Checkpoint, Metric, Prediction

if TYPE_CHECKING:
    from vitrail.data.sets import ImageSet

SHOWN = 8
"""values that are explained"""


@dataclass(frozen=True)
class Values(Prediction):
    """The predicted numbers of an image."""

    values: list[dict[str, Any]]
    """`{"name": name, "value": number}`, in the head's order"""

    def row(self) -> dict[str, Any]:
        return {"values": self.values}

    def text(self) -> str:
        """`age 31.4, angle -0.25`."""
        return ", ".join(f"{value['name']} {_short(value['value'])}" for value in self.values)


def _short(number: float) -> str:
    """Four significant digits, or all digits before the decimal point if more."""
    return f"{number:.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:.4g}"


class Regress(Headed):
    """An encoder, its pooling and a head whose outputs are the values. Key of a batch: `image` [B, C, H, W].

    vitrail loads such heads and predicts with them; it does not train or score them yet.
    """

    name = "regress"
    problem = "regression"

    def __init__(
        self, encoder: Encoder, values: list[str], preprocess: Preprocess, *, hidden: int | None = None
    ) -> None:
        """`values` are the names of the outputs."""
        super().__init__(encoder, len(values), preprocess, hidden)
        self.values = values

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        encoder = encoder_for(described(config["encoder"], KINDS, "vit"))
        return cls(encoder, config["values"], Preprocess.from_dict(config["preprocess"]), hidden=config["hidden"])

    @property
    def outputs(self) -> list[str]:
        return self.values

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        raise UserError("vitrail does not train a head for regression: load it with classes=N to train one for classes")

    def answer(self, batch: Batch) -> list[Prediction]:
        """The head's outputs, in its order."""
        return [
            Values([{"name": name, "value": value} for name, value in zip(self.values, row, strict=True)])
            for row in finite(self(batch["image"])).float().tolist()
        ]

    def explained(self, batch: Batch, outputs: Sequence[int] | None = None) -> Tensor:
        """The first value of each image, [B]; or some of the values."""
        values = self(batch["image"])
        return values[:, 0] if outputs is None else values[:, list(outputs)]

    def explainable(self, batch: Batch) -> list[tuple[int, str]]:
        """The values, in the head's order."""
        return list(enumerate(self.values))[:SHOWN]

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> Metric:
        raise UserError(
            f"the head predicts values ({', '.join(self.values[:3])}), which cannot be compared with classes: "
            "score its features with --probe, or load it with classes=N and train it"
        )

    def config(self) -> dict[str, Any]:
        return {**super().config(), "values": self.values}
