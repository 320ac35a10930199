"""Scores of segmentation: mIoU, IoU per class and pixel accuracy, from one confusion matrix over a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitrail.data.classes import outputs_of
from vitrail.tasks.rows import require_rows
from vitrail.tasks.values import Batch

WORST = 4
"""number of the worst images that are named"""


class SegmentMetric:
    """Counts pixels by true and predicted class, at the size of each mask as it was read.

    The classes of the data may be some of the model's, in any order. Pixels of no class do not count.
    """

    def __init__(self, classes: Sequence[str], data: Sequence[str] | None = None) -> None:
        """`classes` are the model's, `data` those of the data set. UserError if the model lacks one of them."""
        self.classes = list(classes)
        self.outputs = torch.tensor(outputs_of(self.classes if data is None else data, self.classes))
        """the model's number for each class of the data"""
        self.rows: dict[int, Tensor] = {}
        """of each sample: int64 [3, M], the non-zero entries of its confusion matrix: true, predicted, count"""

    def update(self, batch: Batch, answers: Sequence[Any]) -> None:
        """Add the predicted mask of each sample; repeated samples count once."""
        count = len(self.classes)
        for sample, answer, truth in zip(batch["sample"].tolist(), answers, batch["truth"], strict=True):
            true, predicted = truth.indices.long().flatten(), answer.mask.long().flatten()
            valid = (true >= 0) & (true < len(self.outputs))
            pairs = self.outputs[true[valid]] * count + predicted[valid]
            counts = torch.bincount(pairs, minlength=1)
            places = counts.nonzero()[:, 0]
            self.rows[sample] = torch.stack([places // count, places % count, counts[places]])

    def state(self) -> dict[str, Tensor]:
        rows = [torch.cat([torch.full((1, row.shape[1]), sample), row]) for sample, row in sorted(self.rows.items())]
        empty = torch.tensor([sample for sample, row in sorted(self.rows.items()) if not row.shape[1]])
        return {"rows": torch.cat([torch.zeros(4, 0, dtype=torch.int64), *rows], dim=1), "empty": empty.long()}

    def merge(self, state: dict[str, Tensor]) -> None:
        samples = state["rows"][0]
        self.rows |= {int(sample): state["rows"][1:, samples == sample] for sample in samples.unique()}
        self.rows |= {int(sample): torch.zeros(3, 0, dtype=torch.int64) for sample in state["empty"]}

    def compute(self) -> dict[str, Any]:
        """`miou`, the mean over the classes that occur in a mask or a prediction; `iou` of each class, or None.

        `worst` are the numbers of the images with the smallest shares of right pixels.
        """
        require_rows(self.rows)
        confusion = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        for true, predicted, counts in self.rows.values():
            confusion[true, predicted] += counts
        right, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = [int(r) / int(u) if u else None for r, u in zip(right, union, strict=True)]
        found = [value for value in iou if value is not None]
        total = int(confusion.sum())
        return {
            "miou": sum(found) / len(found) if found else None,
            "pixel_accuracy": int(right.sum()) / total if total else None,
            "iou": iou,
            "confusion": confusion.tolist(),
            "classes": self.classes,
            "worst": self._worst(),
            "count": len(self.rows),
        }

    def _worst(self) -> list[int]:
        shares = {}
        for sample, (true, predicted, counts) in sorted(self.rows.items()):
            wrong = int(counts[true != predicted].sum())
            if wrong:
                shares[sample] = wrong / int(counts.sum())
        return sorted(shares, key=lambda sample: -shares[sample])[:WORST]
