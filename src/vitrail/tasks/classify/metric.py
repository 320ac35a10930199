"""The scores of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.classes import outputs_of
from vitrail.tasks.values import Batch

if TYPE_CHECKING:
    from vitrail.tasks.classify.task import Classify

TOP = 5
"""number of guesses in the score `top5`"""


class ClassifyMetric:
    """Top-1, top-5, per-class accuracy, confusion matrix, calibration error and cross-entropy, from the logits.

    The cross-entropy is that of the softmax, for any training loss; the calibration error uses the task's
    probabilities. Labels are numbers of the data's classes, which may be a subset of the task's in any order; scores
    are over all the task's classes, in its order.
    """

    def __init__(self, task: Classify, classes: Sequence[str] | None = None) -> None:
        """`classes` are the data's; by default the task's. UserError if one of them is not a class of the task."""
        self.task = task
        self.outputs = torch.tensor(outputs_of(task.classes if classes is None else classes, task.classes))
        """the model's class number for each class of the data"""
        self.rows: dict[int, tuple[Tensor, int]] = {}

    def update(self, batch: Batch, outputs: Tensor) -> None:
        """Add the logits of each sample; repeated samples count once."""
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
        """Scores are fractions. `confusion[i][j]` counts images of class i predicted as class j."""
        state = self.state()
        logits, right = state["logits"], self.outputs[state["label"]]
        classes = logits.shape[1]
        order = logits.argsort(dim=1, descending=True, stable=True)
        hits = order == right[:, None]
        confusion = torch.bincount(right * classes + order[:, 0], minlength=classes * classes).view(classes, classes)
        counts = confusion.sum(dim=1)
        return {
            "top1": hits[:, 0].double().mean().item(),
            f"top{TOP}": hits[:, :TOP].any(dim=1).double().mean().item(),
            "cross_entropy": F.cross_entropy(logits, right).item(),
            "calibration_error": calibration_error(self.task.probabilities(logits), right),
            # A class without images in this split has no accuracy.
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
