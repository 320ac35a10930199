"""What several processes compute over all images of a batch or a split: batch norm's statistics, and scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.tasks.values import Batch, Metric
from vitrail.train.parallel import Together, World, received, refusal


class _Sum(torch.autograd.Function):
    """A sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        numbers = numbers.clone()
        dist.all_reduce(numbers)
        return numbers

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class JoinedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all ranks. PyTorch's SyncBatchNorm does this on a GPU only.

    Sums are in float64: so one message holds mean and variance, without loss of digits.
    """

    world: World

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] to the same shape."""
        if not (self.training and self.world.stepping):
            return super().forward(input)
        return self._joined(input)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _joined(self, input: Tensor) -> Tensor:
        x = input.float()
        own, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
        own, mean = own.double(), mean.double()
        number = mean.new_full((1,), x.numel() / x.shape[1])  # not copied from the host, which would wait for a GPU
        sums = _Sum.apply(torch.cat([mean * number, (own + mean.square()) * number, number]))
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = square - mean.square()
        self._follow(mean.detach(), variance.detach(), sums[-1].detach())
        shape = (1, -1, *(1 for _ in range(2, x.ndim)))
        scale = (variance + self.eps).rsqrt().float()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean.float() * scale
        if self.bias is not None:
            shift = shift + self.bias
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics, as PyTorch's batch norm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def join_statistics(module: nn.Module, world: World) -> None:
    """Batch norms inside a module take their statistics over all ranks from now on; their weights stay in place."""
    for member in module.modules() if world.size > 1 else ():
        if isinstance(member, nn.modules.batchnorm._BatchNorm) and not isinstance(member, nn.SyncBatchNorm):
            member.__class__ = JoinedBatchNorm
            member.__dict__["world"] = world


class JoinedMetric:
    """A metric whose scores are those of all ranks' images. Each counts once, since states are keyed by sample."""

    def __init__(self, metric: Metric, world: World) -> None:
        self.metric, self.world = metric, world
        self.filled = False

    def update(self, batch: Batch, outputs: Any) -> None:
        self.filled = True
        self.metric.update(batch, outputs)

    def state(self) -> dict[str, Tensor]:
        return self.metric.state()

    def merge(self, state: dict[str, Tensor]) -> None:
        self.metric.merge(state)

    def compute(self) -> dict[str, Any]:
        """The scores, computed on rank 0 alone: some take seconds of Java."""
        world = self.world
        own = save({k: v.contiguous() for k, v in self.state().items()}) if self.filled else b""
        others = [received(message) for message in world.all_gather(b"+" + own)]

        def scores() -> bytes:
            for rank, data in enumerate(others):
                if rank != world.rank and data:
                    self.metric.merge(load(data))
            return json.dumps(self.metric.compute()).encode()

        found: dict[str, Any] = json.loads(world.broadcast(scores))
        return found


def scores_of_all(
    world: World, make: Callable[[], Metric], score: Callable[[Callable[[], Metric]], dict[str, Any]]
) -> dict[str, Any]:
    """The scores that `score` computes with metrics from `make`, over the images of all ranks.

    An error of one rank, such as too many bad images, is raised on all.
    """
    used: list[JoinedMetric] = []

    def joined() -> Metric:
        used.append(JoinedMetric(make(), world))
        return used[-1]

    try:
        scores = score(joined)
    except Together:
        raise
    except UserError as error:
        for message in world.all_gather(refusal(error)):
            received(message)
        raise
    if not used:
        raise ValueError("a task that evaluates without a metric has `whole_split`: each process sees the whole split")
    return scores
