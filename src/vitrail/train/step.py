"""One training step: forward and backward in micro-batches, clipping, and the optimizers, without waiting for a GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch
from vitrail.train.device import autocast
from vitrail.train.optim import Average, Optim, Optimizers
from vitrail.train.parallel import ALONE, World
from vitrail.train.run import Run
from vitrail.train.scale import LossScale

log = logging.getLogger("vitrail")


class LossModule(nn.Module):
    """A task whose forward is its loss: what torch.compile wraps, and where several processes meet."""

    def __init__(self, task: Task, world: World = ALONE) -> None:
        super().__init__()
        self.task, self.world = task, world
        self.requests: dict[str, bool] = {}
        """what this process asks of all, which is summed with the losses of a step: to stop, or to save"""
        norms = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
        """what the forward pass of training changes: batch norm's running statistics"""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if self.world.size > 1 and self.task.whole_batch:
            return self.task.loss(batch, self.world.gather)
        return self.task.loss(batch)

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor], scale: Tensor | None, last: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of `scale` times the loss of a micro-batch, the `last` one of its step or an earlier one."""
        # Not `backward`, which makes a view of the gradient of each parameter.
        return torch.autograd.grad(loss, parameters, scale, allow_unused=True)

    def over_ranks(
        self, totals: dict[str, Tensor], gradients: list[Tensor | None], parameters: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """The sums of a step over all processes: once, after the last micro-batch. The totals hold the requests."""
        return self.world.sum_named(totals, self.requests), self.world.sum_given(gradients, parameters)

    def optimizers(self, optim: Optim, compile: bool, scale: LossScale | None) -> Optimizers:
        """Optimizers of the weights that are trained."""
        return Optimizers(self.task, optim, compile=compile, scale=scale)

    def average(self, decay: float) -> Average:
        """A running average of the weights that are trained."""
        return Average(self.task, decay)

    def gather_whole(self) -> None:
        """Bring the task that is evaluated and saved up to date, if it is not the one that is trained."""

    def scatter_whole(self) -> None:
        """The reverse, after a state was loaded."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients, as one vector."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))


def compile_network(module: LossModule, run: Run, device: torch.device) -> None:
    """Compile the forward and backward pass; with `run.cuda_graphs` on a CUDA device also record them as CUDA graphs.

    A recorded pass writes into the same memory each time, which is right here because nothing of it outlives the step:
    the gradients are made by `autograd.grad` and are no one's `.grad`, and `train_step` returns copies. With
    micro-batches they would (pytorch/pytorch#169545), so `Run` refuses those. Each shape of a batch, such as that of
    `early_size`, is recorded separately. PyTorch runs a pass without a graph if it reads tensors on the CPU.

    Not recorded: the augmentation, clipping, the optimizers, and the running average, which are a few fused kernels
    already; and passes of several processes.
    """
    graphs = run.cuda_graphs and device.type == "cuda" and module.world.size == 1
    if run.cuda_graphs and not graphs and module.world.is_main:
        log.warning("--cuda-graphs has no effect: only one process on a CUDA device records graphs")
    module.compile(dynamic=False, mode="reduce-overhead" if graphs else None)


class AsyncScalars:
    """Scalars copied from the device asynchronously: reading them does not wait for work that was queued later."""

    def __init__(self, numbers: dict[str, Tensor]) -> None:
        self.names = list(numbers)
        stacked = torch.stack([number.float() for number in numbers.values()])
        self.values = stacked.to("cpu", non_blocking=stacked.is_cuda)
        self.event = torch.cuda.Event() if stacked.is_cuda else None
        if self.event is not None:
            self.event.record()

    def read(self) -> dict[str, float]:
        """The scalars; waits for the copy."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def train_step(run: Run, module: LossModule, batch: Batch, optimizers: Optimizers, factor: float) -> AsyncScalars:
    """One step on one batch, in `run.accumulate` micro-batches; `factor` is the schedule's.

    A loss is a sum over items, and so is the gradient that micro-batches add up to; both are divided once, by the
    number of items of the whole batch, which for captions only the last micro-batch makes known. If the loss or the
    gradient is not finite, neither weights nor statistics move. Returns the means of what the loss counts, the norm of
    the gradient before clipping, and whether the step was `finite`; in fp16 also the next `loss_scale`, and whether it
    was `halved`, since that of this step was too large.
    """
    scale = optimizers.scale
    totals: dict[str, Any] = {}
    gradients: list[Tensor | None] = [None] * len(optimizers.parameters)
    before = [statistic.clone() for statistic in module.statistics]
    assert run.accumulate != "auto", "a run begins with a number: see train/fitting.py"
    micro_batches = module.task.target.split(batch, run.accumulate)
    for number, micro_batch in enumerate(micro_batches, 1):
        with autocast(batch["image"].device, run.precision), module.world.step():
            found = module(micro_batch)
        factor_of_loss = None if scale is None else scale.value
        new = module.gradients(found["loss"], optimizers.parameters, factor_of_loss, last=number == len(micro_batches))
        gradients = added(gradients, new)
        for name, value in found.items():
            totals[name] = totals[name] + value.detach() if name in totals else value.detach()
    with torch.no_grad():
        totals, gradients = module.over_ranks(totals, gradients, optimizers.parameters)
        requests = {name: totals.pop(name) for name in module.requests}
        count = totals.pop("count")
        count = torch.where(count > 0, count, 1)  # a batch without items has zero sums
        means = {name: total / count for name, total in totals.items()}
        given = [gradient for gradient in gradients if gradient is not None]
        divisor = count if scale is None else count * scale.value
        norm = module.norm(given) / divisor
        finite = means["loss"].isfinite(), norm.isfinite()
        good = finite[0] & finite[1]
        multiplier = 1 / divisor
        if run.optim.clip:
            multiplier = multiplier * (run.optim.clip / (norm + 1e-6)).clamp(max=1)
        # Not in place: two parameters may share one tensor as their gradient.
        scaled = iter(torch._foreach_mul(given, multiplier))
        gradients = [None if gradient is None else next(scaled) for gradient in gradients]
        for statistic, old in zip(module.statistics, before, strict=True):
            statistic.copy_(torch.where(good, statistic, old))
        scalars = {**means, "gradient_norm": norm, "finite": good, **requests}
        if scale is not None:
            scalars |= {"halved": scale.update(*finite), "loss_scale": scale.value}
    optimizers.step(gradients, factor, good)
    return AsyncScalars(scalars)


def added(sums: list[Tensor | None], new: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of gradients, of which some may be missing."""
    both = [(a, b) for a, b in zip(sums, new, strict=True) if a is not None and b is not None]
    total = iter(torch._foreach_add([a for a, _ in both], [b for _, b in both]) if both else [])
    return [b if a is None else a if b is None else next(total) for a, b in zip(sums, new, strict=True)]
