"""Numbers that are not finite: steps that moved no weights, where it began, and when a run stops for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.errors import RunError
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch
from vitrail.train.device import autocast
from vitrail.train.progress import Progress
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, LossModule

log = logging.getLogger("vitrail")

REQUESTS = ("stop", "preempt", "save")
MAX_IN_A_ROW = 10
"""steps in a row whose loss or gradient is not finite, after which a run stops"""
LOWER_RATE = "start again with a lower --lr (and --muon-lr), or with --clip 1"


class Pending(NamedTuple):
    """A step whose scalars are not read yet."""

    step: int
    scalars: AsyncScalars
    batch: Batch
    lr: float


class Watch:
    """Reads the scalars of each step one step later, so that no GPU waits, and counts the steps that moved nothing."""

    def __init__(self, run: Run, task: Task, progress: Progress, module: LossModule, moved: bool = False) -> None:
        """`moved`: whether the run has moved its weights before, as one that is resumed."""
        self.run, self.task, self.progress, self.module, self.world = run, task, progress, module, module.world
        self.in_a_row, self.moved = 0, moved
        self.requests: dict[str, bool] = {}
        """what any of several processes requested in the step that was read last: to stop, or to save"""
        self._pending: Pending | None = None

    def follow(self, step: int, scalars: AsyncScalars, batch: Batch, lr: float) -> None:
        """Take in the step number `step`, and read the one before it."""
        self.read()
        self._pending = Pending(step, scalars, batch, lr)

    def read(self, last: bool = False) -> None:
        """Read the step that is left. Raises RunError after `MAX_IN_A_ROW` steps in a row that moved nothing.

        Also at the `last` step, if no step ever moved anything. A step that only halved the scale of the loss, as fp16
        needs from time to time, is none of them: after a few of them the scale is at its floor.
        """
        if self._pending is None:
            return
        step, scalars, batch, lr = self._pending
        self._pending = None
        row = scalars.read()
        self.requests = {name: bool(row.pop(name)) for name in REQUESTS if name in row}
        images = len(batch["image"]) * self.world.size
        if row.pop("halved", 0):
            self.progress.skip(images, "overflows")
            if last and not self.moved:
                log.warning("no weight was moved: the scale of the loss was still too large for fp16 at the last step")
            return
        if row.pop("finite"):
            self.in_a_row, self.moved = 0, True
            self.progress.step({**row, "lr": lr}, images)
            return
        self.in_a_row += 1
        self.progress.skip(images)
        what = f"the loss is {row['loss']} and the norm of the gradient {row['gradient_norm']} at step {step}"
        if self.in_a_row >= MAX_IN_A_ROW or (last and not self.moved):
            many = "" if self.in_a_row == 1 else f", the last of {self.in_a_row} such steps in a row"
            half = "the range of fp16 is small: --precision fp32 may help" if "loss_scale" in row else ""
            self.module.gather_whole()
            # Of all ranks' batches: most often one of them has the image, or the caption, that it began with.
            own = (first_non_finite(self.run, self.task, batch) or "").encode()
            found = next(filter(None, self.world.all_gather(own)), FINITE.encode()).decode()
            remedy = "" if found in (IMAGES, FINITE) else f"; {half or LOWER_RATE}"
            raise RunError(f"{what}{many}; {found}{remedy}")
        if self.in_a_row == 1:
            log.warning(f"{what}: no weight was moved")


@torch.no_grad()
def not_finite(task: nn.Module) -> str | None:
    """The name of the first weights that are not finite numbers."""
    named = dict(task.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).tolist()
    return next((name for name, good in zip(named, finite, strict=True) if not good), None)


def non_finite_weights(name: str) -> str:
    return f"the weights of {name} are no longer finite"


def not_numbers(task: Task, scores: Mapping[str, Any], split: str) -> str | None:
    """In words, that the outputs for a split are not numbers, which have scores as any others; None if they are.

    Of outputs that are all NaN the largest is the first, so the score would be the share of the first class.
    """
    loss = scores.get(task.val_loss)
    if isinstance(loss, float) and math.isnan(loss):
        return f"the outputs for {split} are not numbers ({task.val_loss} is nan)"
    return None


IMAGES = "the images hold numbers that are not finite: check the data"
FINITE = "every number is finite when the step is repeated in its precision, without compiling: --no-compile may help"
FULL = "the GPU's memory is too full to repeat the step, which would name the layer"


def first_non_finite(run: Run, task: Task, batch: Batch) -> str | None:
    """In words, the first layer with a number that is not finite for this batch, in the forward or backward pass.

    The step is repeated as it was, in the run's precision and micro-batches: a kernel that fails in bf16 is not used in
    float32, where one batch may not fit in memory either. None if every number is finite.
    """
    if (name := not_finite(task)) is not None:
        return non_finite_weights(name)
    if not batch["image"].isfinite().all():
        return IMAGES
    assert run.accumulate != "auto", "a run begins with a number: see train/fitting.py"
    try:
        found = (_in_micro_batch(run, task, each) for each in task.target.split(batch, run.accumulate))
        return next(filter(None, found), None)
    except torch.OutOfMemoryError:  # compiled, it took less
        return FULL


def _in_micro_batch(run: Run, task: Task, batch: Batch) -> str | None:
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    leaves = [(name, m) for name, m in task.named_modules() if not list(m.children())]
    # What goes through nothing comes from the layer around it: fused attention is a function, no module.
    handles = [
        module.register_forward_hook(look(name.rpartition(".")[0] if isinstance(module, nn.Identity) else name))
        for name, module in leaves
    ]
    try:
        with autocast(batch["image"].device, run.precision):
            sums = task.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"it began in the layer {found[0]}"
    if not sums["loss"].isfinite():
        return "every layer is finite, the loss itself is not"
    return _non_finite_gradient(task, sums["loss"] / sums["count"].clamp(min=1))  # the mean: fp16 has no room for a sum


def _non_finite_gradient(task: Task, loss: Tensor) -> str | None:
    """The last parameters, in the order of the forward pass, whose gradient is not finite: there it began."""
    named = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    bad = [name for name, grad in zip(named, found, strict=True) if grad is not None and not grad.isfinite().all()]
    if not bad:
        return None
    return f"every value is finite, but not the gradient of {bad[-1]}"
