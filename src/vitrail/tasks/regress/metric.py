"""The scores of a model of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from vitrail.tasks.rows import RowMetric

if TYPE_CHECKING:
    from vitrail.tasks.regress.task import Regress


class RegressMetric(RowMetric):
    """Mean absolute error and R² of each value and their means over the values, and the loss."""

    field = "values"

    def __init__(self, task: Regress) -> None:
        super().__init__()
        self.task = task

    def compute(self) -> dict[str, Any]:
        """`mae` is in the table's units; `r2` is 1 minus the squared error over the variance of the split's values.

        A value that is the same in all images has no R², and is left out of its mean.
        """
        state, units = self.state(), self.task.units
        outputs, goals = state["outputs"].double(), state["targets"].double()
        right = goals if units is None else units.denormalise(goals)
        mae = (outputs - right).abs().mean(dim=0)
        errors, spread = ((outputs - right) ** 2).sum(dim=0), ((right - right.mean(dim=0)) ** 2).sum(dim=0)
        # Values that were rounded to float32 may differ in their last digits.
        there = (spread / len(right)).sqrt() > 1e-6 * right.abs().amax(dim=0)
        r2 = [float(1 - e / s) if own else None for e, s, own in zip(errors, spread, there, strict=True)]
        known = [value for value in r2 if value is not None]
        own = outputs if units is None else units.normalise(outputs)
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
