"""Classification: which of K classes an image shows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.plain import from_description
from vitrail.tasks.answers import finite, one_class
from vitrail.tasks.classify.knn import Neighbours
from vitrail.tasks.classify.linear_probe import linear_probe, scores_of
from vitrail.tasks.classify.metric import TOP, ClassifyMetric
from vitrail.tasks.classify.settings import Classification, ClassifyOptions
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for, pooled_width
from vitrail.tasks.headed import Headed
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Checkpoint, Features, Portable, Prediction, Problem, Score, Section
from vitrail.variants import DistilledHead
from vitrail.vit import Head

if TYPE_CHECKING:
    from vitrail.data.sets import ImageSet, Splits

log = logging.getLogger("vitrail")

SHOWN = 3
"""number of classes in the text of an answer"""


@dataclass(frozen=True)
class Classes(Prediction):
    """The most probable classes of an image."""

    labels: list[dict[str, Any]]
    """`{"label": name, "score": probability}`, best first"""
    shown: int = field(default=SHOWN, repr=False, compare=False)
    """number of labels in the text"""

    def row(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def text(self) -> str:
        return ", ".join(f"{label['label']} {label['score']:.1%}" for label in self.labels[: self.shown])

    def draw(self, image: Image.Image) -> Image.Image:
        """The image with one bar per class below it."""
        from vitrail.tasks.figures import with_bars

        return with_bars(image, [(label["label"], label["score"]) for label in self.labels])


class Classify(Headed):
    """An encoder, its pooling and a head with one output per class.

    Keys of a batch: `image` [B, C, H, W] normalised floats, `label` [B] class numbers or [B, K] soft targets,
    `sample` [B] numbers of the samples; in training `key` (see `Task.keep`).
    """

    name = "classify"
    settings = Classification
    options = ClassifyOptions
    score = Score("top1", label="accuracy")
    val_loss = "cross_entropy"
    train_score = "accuracy"
    head: Head | Neighbours  # type: ignore[assignment]
    solved = ("linear", "knn")
    unused_when_frozen = ("smoothing", "balanced")

    def __init__(
        self,
        encoder: Encoder,
        classes: list[str],
        preprocess: Preprocess,
        *,
        hidden: int | None = None,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        neighbours: int | None = None,
    ) -> None:
        """`hidden` is the width of the paper's pre-training head; `loss="sigmoid"` is binary cross-entropy (DeiT-III).
        `smoothing` and `class_weights` [K] affect only the training loss. With `neighbours`, the head is k nearest
        neighbours over this number of training images, and nothing is trained.
        """
        bias = -math.log(len(classes)) if loss == "sigmoid" else 0.0
        super().__init__(encoder, len(classes), preprocess, hidden, bias)
        self.classes = classes
        self.loss_kind: Literal["softmax", "sigmoid"] = loss
        self.smoothing = smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor | None
        self.neighbours = neighbours
        if neighbours is not None:
            self.head = Neighbours(pooled_width(encoder.config), len(classes), neighbours)
        self.option = ClassifyOptions()

    @classmethod
    def create(cls, settings: Classification, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        return cls(
            encoder,
            splits.train.classes,
            preprocess,
            hidden=settings.hidden,
            loss=settings.loss,
            smoothing=settings.smoothing,
            class_weights=_class_weights(settings, splits.train),
        )

    @classmethod
    def adopt(cls, settings: Classification, loaded: Task, splits: Splits, preprocess: Preprocess) -> Self:
        """The classifier `loaded` itself, if its classes and its head are the requested ones."""
        same = isinstance(loaded, Classify) and loaded.neighbours is None and loaded.classes == splits.train.classes
        if not (same and settings.hidden in (None, loaded.hidden)):
            return cls.create(settings, loaded.encoder, splits, preprocess)
        assert isinstance(loaded, cls)
        loaded.preprocess, loaded.loss_kind, loaded.smoothing = preprocess, settings.loss, settings.smoothing
        loaded.class_weights = _class_weights(settings, splits.train)
        return loaded

    @classmethod
    def check(cls, settings: Classification, method: str) -> None:
        """Refuse settings that a solved head or k nearest neighbours do not use."""
        if method not in cls.solved:
            return
        plain = Classification(smoothing=settings.smoothing, balanced=settings.balanced)  # the recipe's own
        for entry in fields(plain):
            if getattr(settings, entry.name) != getattr(plain, entry.name):
                raise UserError(f"method {method} does not use --{entry.name}: remove it, or choose another --method")

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        encoder = encoder_for(from_description(config["encoder"], KINDS, "vit"))
        preprocess, classes = Preprocess.from_dict(config["preprocess"]), config["classes"]
        hidden, loss, neighbours = config["hidden"], config["loss"], config["neighbours"]
        return cls(encoder, classes, preprocess, hidden=hidden, loss=loss, neighbours=neighbours)

    @property
    def portable(self) -> Portable | None:
        return super().portable if self.neighbours is None else None

    @property
    def outputs(self) -> list[str]:
        return list(self.classes)

    @property
    def problem(self) -> Problem | None:  # type: ignore[override]
        if self.loss_kind == "sigmoid":
            return "multi_label_classification"
        return "single_label_classification" if len(self.classes) > 1 else None  # a head with one output

    @property
    def flips(self) -> bool:
        return bool(self.option.flip)

    def with_classes(self, classes: list[str]) -> Task:
        return self if self.classes == classes else super().with_classes(classes)

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Sum of the images' losses, and `accuracy`, the number of correct predictions (of the more likely class)."""
        if self.neighbours is not None:
            raise UserError("k nearest neighbours has no loss: load it with classes=N to train a head")
        logits = self(batch["image"], self.keep(batch)).float()
        hard = batch["label"] if batch["label"].ndim == 1 else batch["label"].argmax(dim=1)
        losses = self._weighted(logits, batch["label"])
        correct = (logits.argmax(dim=1) == hard).sum()
        # Created on the device: copying a number there would wait for the GPU's queued work.
        count = torch.full((), len(logits), device=logits.device)
        return {"loss": losses.sum(), "count": count, "accuracy": correct}

    def _weighted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One loss per image, [B], to which each of its classes contributes by its weight."""
        if self.class_weights is None:
            return self._losses(logits, labels)
        if labels.ndim == 1:
            return self._losses(logits, labels) * self.class_weights[labels]
        shares = labels * self.class_weights
        weights = shares.sum(dim=1)
        return self._losses(logits, shares / weights[:, None]) * weights

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One loss per image, [B]."""
        classes = logits.shape[1]
        targets = F.one_hot(labels, classes).to(logits) if labels.ndim == 1 else labels
        if self._sigmoid(classes):
            targets = (targets > 0).to(logits)  # soft targets of mixup and cutmix
        targets = targets * (1 - self.smoothing) + self.smoothing / classes
        if self._sigmoid(classes):
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        return -(targets * logits.log_softmax(dim=1)).sum(dim=1)

    def _sigmoid(self, classes: int) -> bool:
        """Whether each class has its own probability. A single class does: its softmax is always 1."""
        return self.loss_kind == "sigmoid" or classes == 1

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities [B, K]: a softmax, or a sigmoid per class for the sigmoid loss or a single class."""
        logits = logits.float()
        return logits.sigmoid() if self._sigmoid(logits.shape[1]) else logits.softmax(dim=1)

    def answer(self, batch: Batch) -> list[Prediction]:
        """The most probable classes of each image, best first."""
        top, shown = min(self.option.top or TOP, len(self.classes)), self.option.top or SHOWN
        scores, numbers = self.probabilities(finite(self.outputs_for(batch))).topk(top, dim=1)
        return [
            Classes([{"label": self.classes[k], "score": p} for p, k in zip(ps, ks, strict=True)], shown)
            for ps, ks in zip(scores.tolist(), numbers.tolist(), strict=True)
        ]

    def prepare_to_solve(self, method: str, images: int) -> None:
        if method == "knn":
            self.neighbours = images
            self.head = Neighbours(pooled_width(self.encoder.config), len(self.classes), images)

    def solve(self, method: str, train: Features, val: Callable[[], Features]) -> list[dict[str, float]]:
        """Fit k nearest neighbours or the linear probe as the head. Returns one row per penalty of the probe."""
        if method == "knn":
            assert isinstance(self.head, Neighbours)
            self.head.build_index(*train)
            return []
        probe = linear_probe(train, val(), len(self.classes))
        kind = DistilledHead if isinstance(self.head, DistilledHead) else Head
        head = kind(train.vectors.shape[1], len(self.classes)).to(probe.weight.device)
        # DeiT's two heads, each on its own token, are averaged: equal heads give the output for the tokens' mean.
        for linear in (module for module in head.modules() if isinstance(module, torch.nn.Linear)):
            linear.load_state_dict({"weight": probe.weight, "bias": probe.bias})
        self.head, self.hidden, self.loss_kind = head, None, "softmax"
        own = scores_of(F.linear(train.vectors, probe.weight, probe.bias), train.labels)
        rows = []
        for row in probe.tried:
            rows.append(
                {"strength": row["strength"], "cross_entropy": row["cross_entropy"]}
            )  # no score: none is the best
            if row["strength"] == probe.strength:
                rows[-1] |= {"train_loss": own["cross_entropy"], "train_accuracy": own["top1"]}
        return rows

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> ClassifyMetric:
        """For data whose classes are the model's or some of them, also under other spellings."""
        metric = ClassifyMetric(self, None if data is None else data.classes)
        if data is not None and len(data.classes) < len(self.classes):
            log.warning(
                f"the data has {len(data.classes):,} of the model's {len(self.classes):,} classes: a prediction is one "
                f"of all {len(self.classes):,}, and correct only if it is the image's own"
            )
        return metric

    @classmethod
    def collapsed(cls, scores: Mapping[str, Any]) -> str | None:
        return one_class(scores["confusion"], scores["classes"]) if "confusion" in scores else None

    @classmethod
    def printed_scores(cls, scores: Mapping[str, Any]) -> dict[str, float]:
        """Without `top5` for at most five classes, where it is always 1."""
        few = len(scores.get("per_class", ())) <= TOP
        found = super().printed_scores(scores)
        return {name: value for name, value in found.items() if not (few and name == f"top{TOP}")}

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        from vitrail.tasks.classify.report import sections

        return sections(run)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "loss": self.loss_kind, "neighbours": self.neighbours}


def _class_weights(settings: Classification, train: ImageSet) -> Tensor | None:
    if not settings.weighted:
        return None
    counts = torch.bincount(train.labels, minlength=len(train.classes)).clamp(min=1)
    return len(train.labels) / (len(train.classes) * counts.float())
