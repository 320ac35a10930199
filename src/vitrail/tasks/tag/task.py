"""Tagging: which of K labels an image has, each for itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.data.targets import Tags
from vitrail.errors import UserError
from vitrail.plain import from_description
from vitrail.tasks.answers import finite
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for
from vitrail.tasks.exported import Program, whole
from vitrail.tasks.headed import Headed
from vitrail.tasks.tag.metric import TagMetric
from vitrail.tasks.tag.settings import Tagging, TagOptions
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Checkpoint, Prediction, Score, Section

if TYPE_CHECKING:
    from vitrail.data.sets import ImageSet, Splits

RAREST = 1e-3
"""the least and, from 1, the largest probability that a head starts with"""
EXAMPLE = """\
answer = ", ".join(name for name, logit in zip(config["classes"], outputs[0]) if logit >= 0) or "no label"
"""
"""see `Program.answer`: the labels whose probability is 0.5 or more"""
BEST = 5
"""labels that are drawn, whatever their probability"""


@dataclass(frozen=True)
class PredictedLabels(Prediction):
    """The labels that an image has."""

    labels: list[dict[str, Any]]
    """`{"label": name, "score": probability}` of those above the threshold, best first"""
    ranking: list[tuple[str, float]] = field(repr=False, compare=False)
    """the most probable labels, whatever their probability, for the figure"""

    def row(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def text(self) -> str:
        """`cat 93.1%, dog 71.0%`, or the most probable label with the word that it is not enough."""
        if self.labels:
            return ", ".join(f"{label['label']} {label['score']:.1%}" for label in self.labels)
        name, score = self.ranking[0]
        return f"no label (the most probable: {name} {score:.1%})"

    def draw(self, image: Image.Image) -> Image.Image:
        """The image with one bar per label below it."""
        from vitrail.tasks.figures import with_bars

        return with_bars(image, [(each["label"], each["score"]) for each in self.labels] or self.ranking)


class Tag(Headed):
    """An encoder, its pooling and a head with one output per label, each with a probability of its own.

    Keys of a batch: `image` [B, C, H, W] normalised floats, `tags` [B, K] from 0 to 1, `sample` [B] numbers of the
    samples; in training `key` (see `Task.keep`).
    """

    name = "tag"
    settings = Tagging
    options = TagOptions
    target = Tags
    score = Score("mean_ap", label="mAP")
    val_loss = "binary_cross_entropy"
    problem = "multi_label_classification"

    def __init__(
        self,
        encoder: Encoder,
        classes: list[str],
        preprocess: Preprocess,
        *,
        hidden: int | None = None,
        smoothing: float = 0.0,
        share: float = 0.5,
    ) -> None:
        """`classes` are the names of the labels; `share` is the probability of each that the head starts with."""
        if not classes:
            raise UserError("a model of several labels needs at least one label")
        share = min(max(share, RAREST), 1 - RAREST)
        super().__init__(encoder, len(classes), preprocess, hidden, bias=math.log(share / (1 - share)))
        self.classes, self.smoothing = classes, smoothing

    @classmethod
    def create(cls, settings: Tagging, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        target = Tags.of(splits.train)
        share = target.values.mean().item()
        how = {"hidden": settings.hidden, "smoothing": settings.smoothing, "share": share}
        return cls(encoder, target.classes, preprocess, **how)  # type: ignore[arg-type]

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        encoder = encoder_for(from_description(config["encoder"], KINDS, "vit"))
        return cls(encoder, config["classes"], Preprocess.from_dict(config["preprocess"]), hidden=config["hidden"])

    @property
    def outputs(self) -> list[str]:
        return list(self.classes)

    @property
    def flips(self) -> bool:
        return bool(self.option.flip)

    def with_classes(self, classes: list[str]) -> Task:
        if not classes:
            return super().with_classes(classes)
        return self if classes == self.classes else Tag(self.encoder, classes, self.preprocess)

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Sum of the images' losses: of each, the mean binary cross-entropy of its labels."""
        logits = self(batch["image"], self.keep(batch)).float()
        goals = batch["tags"] * (1 - self.smoothing) + self.smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, goals, reduction="none").mean(dim=1)
        # Created on the device: copying a number there would wait for the GPU's queued work.
        return {"loss": losses.sum(), "count": torch.full((), len(logits), device=logits.device)}

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of each label [B, K], independent of the others."""
        return logits.float().sigmoid()

    def answer(self, batch: Batch) -> list[Prediction]:
        """The labels of each image above the threshold, best first."""
        option = self.option
        scores, numbers = self.probabilities(finite(self.outputs_for(batch))).sort(dim=1, descending=True, stable=True)
        found: list[Prediction] = []
        for row, order in zip(scores.tolist(), numbers.tolist(), strict=True):
            ranked = [(self.classes[k], p) for p, k in zip(row, order, strict=True)]
            listed = [{"label": name, "score": p} for name, p in ranked if p >= option.threshold][: option.top]
            found.append(PredictedLabels(listed, ranked[:BEST]))
        return found

    def programs(self, batch: Batch) -> dict[str, Program]:
        return whole(self, batch, EXAMPLE)

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> TagMetric:
        """For data whose labels are the model's or some of them, also under other spellings."""
        return TagMetric(self, None if data is None else data.classes)

    @classmethod
    def printed_scores(cls, scores: Mapping[str, Any]) -> dict[str, float]:
        """With the average precision of each label under `ap NAME`."""
        each = zip(scores.get("classes", ()), scores.get("per_class", ()), strict=True)
        return {**super().printed_scores(scores), **{f"ap {name}": value for name, value in each if value is not None}}

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        from vitrail.tasks.tag.report import sections

        return sections(run)
