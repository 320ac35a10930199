"""The base of metrics that keep one row of outputs, and one of the target, per sample."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vitrail.errors import UserError
from vitrail.tasks.values import Batch


class RowMetric:
    """Keeps the outputs of each sample beside its target: a sample that is repeated counts once."""

    field: ClassVar[str]
    """the target's name in a batch: a tensor [B, ...]"""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, batch: Batch, outputs: Tensor) -> None:
        """Add the outputs [B, ...] of each sample."""
        self._add(batch["sample"], outputs.detach().cpu(), batch[self.field].cpu())

    def state(self) -> dict[str, Tensor]:
        """`sample` int64 [N], rising, with `outputs` [N, ...] and `targets` [N, ...]. UserError without a sample."""
        require_rows(self.rows)
        samples = sorted(self.rows)
        outputs, targets = (torch.stack([self.rows[sample][i] for sample in samples]) for i in range(2))
        return {"sample": torch.tensor(samples), "outputs": outputs, "targets": targets}

    def merge(self, state: dict[str, Tensor]) -> None:
        self._add(**state)

    def _add(self, sample: Tensor, outputs: Tensor, targets: Tensor) -> None:
        rows = zip(outputs, targets, strict=True)
        self.rows |= dict(zip(sample.tolist(), rows, strict=True))


def require_rows(rows: dict[int, Any]) -> None:
    """Raise UserError if an evaluation has read no sample."""
    if not rows:
        raise UserError("no image of the split can be read, so there is nothing to score")
