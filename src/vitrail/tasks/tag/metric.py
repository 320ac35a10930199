"""The scores of a model of several labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.classes import outputs_of
from vitrail.tasks.rows import RowMetric

if TYPE_CHECKING:
    from vitrail.tasks.tag.task import Tag

log = logging.getLogger("vitrail")


class TagMetric(RowMetric):
    """Average precision of each label and its mean, F1 at the threshold, and binary cross-entropy, from the logits.

    The data's labels may be a subset of the task's in any order; the others are not scored. A label that no image of
    the split has cannot be scored either: it is left out of the means.
    """

    field = "tags"

    def __init__(self, task: Tag, classes: Sequence[str] | None = None) -> None:
        """`classes` are the data's; by default the task's. UserError if one of them is not a label of the task."""
        super().__init__()
        self.task = task
        self.outputs = torch.tensor(outputs_of(task.classes if classes is None else classes, task.classes))
        """the model's label number for each label of the data"""

    def compute(self) -> dict[str, Any]:
        """Scores are fractions. `per_class` has the average precision of each of the task's labels, or None."""
        state = self.state()
        logits, tags = state["outputs"].float()[:, self.outputs], state["targets"]
        there = tags.sum(dim=0) > 0
        found = [average_precision(logits[:, k], tags[:, k]) if there[k] else None for k in range(tags.shape[1])]
        predicted = (self.task.probabilities(logits) >= self.task.option.threshold).double()
        right = 2 * (predicted * tags).sum(dim=0)
        f1 = right / (predicted.sum(dim=0) + tags.sum(dim=0)).clamp(min=1)
        per_class: list[float | None] = [None] * len(self.task.classes)
        for output, value in zip(self.outputs.tolist(), found, strict=True):
            per_class[output] = value
        scored = [value for value in found if value is not None]
        if len(scored) < len(found):
            lacking = [self.task.classes[k] for k in self.outputs[~there].tolist()]
            more = f" and {len(lacking) - 1:,} others" if len(lacking) > 1 else ""
            log.warning(f"no image of this split has the label {lacking[0]}{more}: it is left out of the scores")
        return {
            "mean_ap": sum(scored) / len(scored) if scored else None,
            "f1": f1[there].mean().item() if scored else None,
            "binary_cross_entropy": F.binary_cross_entropy_with_logits(logits, tags).item(),
            "per_class": per_class,
            "classes": self.task.classes,
            "without_label": int((tags.sum(dim=1) == 0).sum()),
            "count": len(tags),
        }


def average_precision(scores: Tensor, right: Tensor) -> float:
    """The sum over the thresholds of precision times the gain in recall, of scores [N] and 0 or 1 [N].

    Images of equal scores are found at once. It is scikit-learn's `average_precision_score`.
    """
    order = scores.argsort(descending=True, stable=True)
    scores, right = scores[order], right[order].double()
    found = right.cumsum(0)
    last = torch.ones_like(scores, dtype=torch.bool)  # of images with equal scores
    last[:-1] = scores[:-1] != scores[1:]
    places = last.nonzero()[:, 0]
    precision, recall = found[places] / (places + 1), found[places] / found[-1]
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum().item()
