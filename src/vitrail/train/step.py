"""One training step: forward and backward in micro-batches, clipping, and the optimizers, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch
from vitrail.train.device import autocast
from vitrail.train.optim import Optimizers
from vitrail.train.run import Run


class LossModule(nn.Module):
    """A task whose forward is its loss: what torch.compile and DDP wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        norms = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
        """what the forward pass of training changes: batch norm's running statistics"""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task.loss(batch)


def compile_network(module: LossModule, run: Run, device: torch.device) -> None:
    """Compile the forward and backward pass; with `run.cuda_graphs` on a CUDA device also record them as CUDA graphs.

    A recorded pass writes into the same memory each time, which is right here because nothing of it outlives the step:
    the gradients are made by `autograd.grad` and are no one's `.grad`, and `train_step` returns copies. With
    micro-batches they would (pytorch/pytorch#169545), so `Run` refuses those. Each shape of a batch, such as that of
    `early_size`, is recorded separately. PyTorch runs a pass without a graph if it reads tensors on the CPU.

    Not recorded: the augmentation, clipping, the optimizers, and the running average, which are a few fused kernels
    already; and passes of several processes.
    """
    graphs = run.cuda_graphs and device.type == "cuda"
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
    for micro_batch in module.task.target.split(batch, run.accumulate):
        with autocast(batch["image"].device, run.precision):
            found = module(micro_batch)
        # Not `backward`, which makes a view of the gradient of each parameter.
        seed = None if scale is None else scale.value
        new = torch.autograd.grad(found["loss"], optimizers.parameters, seed, allow_unused=True)
        gradients = added(gradients, new)
        for name, value in found.items():
            totals[name] = totals[name] + value.detach() if name in totals else value.detach()
    with torch.no_grad():
        count = totals.pop("count")
        count = torch.where(count > 0, count, 1)  # a batch without items has zero sums
        means = {name: total / count for name, total in totals.items()}
        given = [gradient for gradient in gradients if gradient is not None]
        divisor = count if scale is None else count * scale.value
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(given))) / divisor
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
        scalars = {**means, "gradient_norm": norm, "finite": good}
        if scale is not None:
            scalars |= {"halved": scale.update(*finite), "loss_scale": scale.value}
    optimizers.step(gradients, factor, good)
    return AsyncScalars(scalars)


def added(sums: list[Tensor | None], new: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of gradients, of which some may be missing."""
    both = [(a, b) for a, b in zip(sums, new, strict=True) if a is not None and b is not None]
    total = iter(torch._foreach_add([a for a, _ in both], [b for _, b in both]) if both else [])
    return [b if a is None else a if b is None else next(total) for a, b in zip(sums, new, strict=True)]
