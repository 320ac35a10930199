"""Classification: which of K classes an image shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.classes import outputs_of
from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.tasks.encoder import Encoder
from vitrail.tasks.headed import Headed
from vitrail.tasks.task import Batch, Prediction, finite


@dataclass(frozen=True)
class Classification:
    """How a classifier is learned: fields of a run."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax cross-entropy, or binary cross-entropy for each class (DeiT-III)"""
    smoothing: float = 0.0
    """label smoothing"""
    hidden: int | None = None
    """width of the tanh layer of the paper's pre-training head; None for a linear head"""
    weighted: bool = False
    """weigh each class's loss by the inverse of its count"""
    balanced: bool = False
    """draw each class equally often"""

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, or None for a linear head, got {self.hidden}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing is a share from 0 to below 1, got {self.smoothing}")
        if self.weighted and self.balanced:
            raise UserError("weighted and balanced both make up for rare classes: add --no-balanced or --no-weighted")


class Classify(Headed):
    """An encoder, its pooling and a head with an output for each class.

    Keys of a batch: `image` [B, C, H, W] normalised floats, `label` [B] class numbers or [B, K] soft targets,
    `sample` [B] numbers of the samples.
    """

    name = "classify"
    score = "top1"

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
    ) -> None:
        """`hidden` makes the pre-training head of the paper; `loss="sigmoid"` is DeiT-III's binary cross-entropy.

        `smoothing` and `class_weights` [K] shape the training loss alone.
        """
        bias = -math.log(len(classes)) if loss == "sigmoid" else 0.0
        super().__init__(encoder, len(classes), preprocess, hidden, bias)
        self.classes = classes
        self.loss_kind: Literal["softmax", "sigmoid"] = loss
        self.smoothing = smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor | None

    @property
    def outputs(self) -> list[str]:
        return self.classes

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Sum of the images' losses, and `accuracy`, the number of right first guesses (of the likelier class)."""
        logits = self(batch["image"]).float()
        hard = batch["label"] if batch["label"].ndim == 1 else batch["label"].argmax(dim=1)
        losses = self._losses(logits, batch["label"])
        if self.class_weights is not None:
            losses = losses * self.class_weights[hard]
        correct = (logits.argmax(dim=1) == hard).sum()
        # Filled on the device: a number sent there would wait for all that a GPU has yet to do.
        count = torch.full((), len(logits), device=logits.device)
        return {"loss": losses.sum(), "count": count, "accuracy": correct}

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One loss an image, [B]."""
        classes = logits.shape[1]
        targets = F.one_hot(labels, classes).to(logits) if labels.ndim == 1 else labels
        if self._sigmoid(classes):
            targets = (targets > 0).to(logits)  # both images of a mix are there
        targets = targets * (1 - self.smoothing) + self.smoothing / classes
        if self._sigmoid(classes):
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        return -(targets * logits.log_softmax(dim=1)).sum(dim=1)

    def _sigmoid(self, classes: int) -> bool:
        """Whether each class has a probability of its own. One class alone does: a softmax over it is always 1."""
        return self.loss_kind == "sigmoid" or classes == 1

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, K]: a softmax, or for the sigmoid loss and a single class each class's own probability."""
        logits = logits.float()
        return logits.sigmoid() if self._sigmoid(logits.shape[1]) else logits.softmax(dim=1)

    def answer(self, batch: Batch, top: int = 5) -> list[Prediction]:
        """The `top` likeliest classes of each image, best first."""
        scores, places = self.probabilities(finite(self(batch["image"]))).topk(min(top, len(self.classes)), dim=1)
        return [
            Prediction(labels=[{"label": self.classes[k], "score": p} for p, k in zip(ps, ks, strict=True)])
            for ps, ks in zip(scores.tolist(), places.tolist(), strict=True)
        ]

    def metric(self) -> ClassifyMetric:
        return ClassifyMetric(self)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "loss": self.loss_kind}


class ClassifyMetric:
    """Top-1, top-5, per-class accuracy, confusion matrix, calibration error and cross-entropy, from the logits.

    The cross-entropy is that of their softmax, whatever the loss; the calibration error is of the task's own
    probabilities. Labels are numbers of the data's classes, which may be some of the
    task's, in any order; scores are of all the task's classes, in its own order.
    """

    def __init__(self, task: Classify, classes: Sequence[str] | None = None) -> None:
        """`classes` are the data's; the task's own if left out. UserError where the task does not know one of them."""
        self.task = task
        self.outputs = torch.tensor(outputs_of(task.classes if classes is None else classes, task.classes))
        """the model's class of each class of the data"""
        self.rows: dict[int, tuple[Tensor, int]] = {}

    def update(self, batch: Batch, outputs: Tensor) -> None:
        """Keep each sample's logits; one that was seen before counts once."""
        logits = outputs.detach().float().cpu()
        for sample, row, label in zip(batch["sample"].tolist(), logits, batch["label"].tolist(), strict=True):
            self.rows[sample] = (row, label)

    def state(self) -> dict[str, Tensor]:
        samples = sorted(self.rows)
        return {
            "sample": torch.tensor(samples),
            "logits": torch.stack([self.rows[s][0] for s in samples]),
            "label": torch.tensor([self.rows[s][1] for s in samples]),
        }

    def merge(self, state: dict[str, Tensor]) -> None:
        for sample, row, label in zip(state["sample"].tolist(), state["logits"], state["label"].tolist(), strict=True):
            self.rows[sample] = (row, label)

    def compute(self) -> dict[str, Any]:
        """Scores are fractions. `confusion[i][j]` counts images of the model's class i taken for its class j."""
        state = self.state()
        logits, right = state["logits"], self.outputs[state["label"]]
        classes = logits.shape[1]
        order = logits.argsort(dim=1, descending=True, stable=True)
        hits = order == right[:, None]
        confusion = torch.bincount(right * classes + order[:, 0], minlength=classes * classes).view(classes, classes)
        counts = confusion.sum(dim=1)
        return {
            "top1": hits[:, 0].double().mean().item(),
            "top5": hits[:, :5].any(dim=1).double().mean().item(),
            "cross_entropy": F.cross_entropy(logits, right).item(),
            "calibration_error": calibration_error(self.task.probabilities(logits), right),
            # A class without an image in this split has no accuracy.
            "per_class": [
                c / n if n else None for c, n in zip(confusion.diag().tolist(), counts.tolist(), strict=True)
            ],
            "classes": self.task.classes,
            "confusion": confusion.tolist(),
            "count": len(right),
        }


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (arXiv 1706.04599, equation 3): mean gap of confidence and accuracy over bins."""
    confidence, guess = probabilities.nan_to_num(0).max(dim=1)
    correct = (guess == labels).double()
    place = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, correct - confidence.double())
    return gaps.abs().sum().item() / len(labels)
