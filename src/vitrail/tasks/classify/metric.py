"""The scores of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.classes import outputs_of
from vitrail.tasks.rows import RowMetric

if TYPE_CHECKING:
    from vitrail.tasks.classify.task import Classify

TOP = 5
"""number of guesses in the score `top5`"""
BINS = 15
"""bins of confidence in which the calibration is measured"""
WORST = 12
"""number of the mistakes that are named"""


class ClassifyMetric(RowMetric):
    """Top-1, top-5, per-class accuracy, confusion matrix, calibration error and cross-entropy, from the logits.

    The cross-entropy is that of the softmax, for any training loss; the calibration error uses the task's
    probabilities. Labels are numbers of the data's classes, which may be a subset of the task's in any order; scores
    are over all the task's classes, in its order.
    """

    field = "label"

    def __init__(self, task: Classify, classes: Sequence[str] | None = None) -> None:
        """`classes` are the data's; by default the task's. UserError if one of them is not a class of the task."""
        super().__init__()
        self.task = task
        self.outputs = torch.tensor(outputs_of(task.classes if classes is None else classes, task.classes))
        """the model's class number for each class of the data"""

    def compute(self) -> dict[str, Any]:
        """Scores are fractions. `confusion[i][j]` counts images of class i predicted as class j.

        `calibration` has `count`, mean `confidence` and `accuracy` of each bin of confidence that has images. `worst`
        are the numbers of the wrongly predicted images whose wrong class has the highest probabilities.
        """
        state = self.state()
        logits, right = state["outputs"].float(), self.outputs[state["targets"]]
        classes = logits.shape[1]
        order = logits.argsort(dim=1, descending=True, stable=True)
        hits = order == right[:, None]
        confusion = torch.bincount(right * classes + order[:, 0], minlength=classes * classes).view(classes, classes)
        counts = confusion.sum(dim=1)
        probabilities = self.task.probabilities(logits)
        return {
            "top1": hits[:, 0].double().mean().item(),
            f"top{TOP}": hits[:, :TOP].any(dim=1).double().mean().item(),
            "cross_entropy": F.cross_entropy(logits, right).item(),
            "calibration_error": calibration_error(probabilities, right),
            "calibration": calibration_bins(probabilities, right),
            # A class without images in this split has no accuracy.
            "per_class": [
                c / n if n else None for c, n in zip(confusion.diag().tolist(), counts.tolist(), strict=True)
            ],
            "classes": self.task.classes,
            "confusion": confusion.tolist(),
            "worst": _worst(probabilities, right, state["sample"]),
            "count": len(right),
        }


def _binned(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each image: its confidence, whether its best class is right (1.0 or 0.0), and its bin of confidence."""
    confidence, guess = probabilities.nan_to_num(0).max(dim=1)
    place = (confidence.double() * BINS).ceil().clamp(1, BINS).long() - 1
    return confidence.double(), (guess == labels).double(), place


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (arXiv 1706.04599, equation 3): mean gap of confidence and accuracy over bins."""
    confidence, correct, place = _binned(probabilities, labels)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, correct - confidence)
    return gaps.abs().sum().item() / len(labels)


def calibration_bins(probabilities: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """`count`, mean `confidence` and `accuracy` of the images in each bin of confidence, without empty bins."""
    confidence, correct, place = _binned(probabilities, labels)
    counts, sure, right = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, values)
        for values in (torch.ones_like(correct), confidence, correct)
    )
    return [
        {"count": int(n), "confidence": (s / n).item(), "accuracy": (r / n).item()}
        for n, s, r in zip(counts, sure, right, strict=True)
        if n
    ]


def _worst(probabilities: Tensor, labels: Tensor, samples: Tensor) -> list[int]:
    """The numbers of the most confident mistakes."""
    confidence, guess = probabilities.nan_to_num(0).max(dim=1)
    order = confidence.argsort(descending=True, stable=True)
    wrong: list[int] = samples[order[(guess != labels)[order]]][:WORST].tolist()
    return wrong
