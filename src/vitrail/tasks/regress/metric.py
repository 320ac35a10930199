"""The scores of a model of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.tasks.values import Batch

if TYPE_CHECKING:
    from vitrail.tasks.regress.task import Regress


class RegressMetric:
    """Mean absolute error and R² of each value and their means over the values, and the loss."""

    def __init__(self, task: Regress) -> None:
        self.task = task
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, batch: Batch, outputs: Tensor) -> None:
        """Add the values of each sample; repeated samples count once."""
        found, right = outputs.detach().double().cpu(), batch["values"].double().cpu()
        for sample, row, own in zip(batch["sample"].tolist(), found, right, strict=True):
            self.rows[sample] = (row, own)

    def state(self) -> dict[str, Tensor]:
        samples = sorted(self.rows)
        return {
            "sample": torch.tensor(samples),
            "outputs": torch.stack([self.rows[s][0] for s in samples]),
            "values": torch.stack([self.rows[s][1] for s in samples]),
        }

    def merge(self, state: dict[str, Tensor]) -> None:
        for sample, row, own in zip(state["sample"].tolist(), state["outputs"], state["values"], strict=True):
            self.rows[sample] = (row, own)

    def compute(self) -> dict[str, Any]:
        """`mae` is in the table's units; `r2` is 1 minus the squared error over the variance of the split's values.

        A value that is the same in all images has no R², and is left out of its mean.
        """
        state, units = self.state(), self.task.units
        outputs, goals = state["outputs"], state["values"]
        right = goals if units is None else units.back(goals)
        mae = (outputs - right).abs().mean(dim=0)
        errors, spread = ((outputs - right) ** 2).sum(dim=0), ((right - right.mean(dim=0)) ** 2).sum(dim=0)
        # Values that were rounded to float32 may differ in their last digits.
        there = (spread / len(right)).sqrt() > 1e-6 * right.abs().amax(dim=0)
        r2 = [float(1 - e / s) if own else None for e, s, own in zip(errors, spread, there, strict=True)]
        known = [value for value in r2 if value is not None]
        own = outputs if units is None else units.away(outputs)
        return {
            "mae": mae.mean().item(),
            "r2": sum(known) / len(known) if known else None,
            "smooth_l1": F.smooth_l1_loss(own, goals).item(),
            "per_value": [
                {"name": name, "mae": error, "r2": share}
                for name, error, share in zip(self.task.values, mae.tolist(), r2, strict=True)
            ],
            "count": len(right),
        }
