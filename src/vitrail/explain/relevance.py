"""Gradient-weighted relevance of patches to any output of a task (arXiv 2012.09838, in the form of 2103.15679)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.explain.trace import Layer, Pause, Trace, encoder_of, evaluating, no_pause, recording
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch

AT_ONCE = 4
"""outputs whose gradients are in memory together, so that the attention of a layer is computed once for them"""
TINY = torch.finfo(torch.float32).tiny
"""a sum to divide by, where all terms are 0"""


@torch.enable_grad()
def relevance(task: Task, batch: Batch, outputs: Sequence[int] | None = None, pause: Pause = no_pause) -> Tensor:
    """How much each patch speaks for what the task answers: [B, N], or [B, outputs, N] for some of its outputs.

    `Task.explained` gives the scalar. Each layer's matrix is the mean over heads of A times its gradient, where that is
    positive (equation 5 of arXiv 2103.15679), with each row normalised to one as in rollout, and relevance passes
    through the layers as R + A R (equation 6). Without the normalisation, which the paper does not have, gradients of a
    few thousandths would leave the residual path alone. The
    paper reads the class token's row. In general, the rows are weighted by how much each final token speaks for the
    output: its product with its gradient, where that is positive. A class token is then the only row, since no other
    token has a gradient. Works under fused attention, one layer at a time. An encoder without attention has the
    weights of its final tokens alone. Only the order and the ratios of values mean something. `pause` is called between
    the steps that follow the forward pass.
    """
    device, weight = next(task.parameters()).device, next(task.parameters()).dtype
    images = batch["image"].to(device, weight).detach().requires_grad_()
    with _recorded(task) as found:
        scalars = task.explained({**batch, "image": images}, outputs)
    columns = scalars[:, None] if outputs is None else scalars
    # Only the gradients of activations: the weights' own are not computed.
    wanted = [found.final, *(layer.mixed for layer in found.layers if layer.mixed is not None)]
    maps: list[Tensor] = []
    for start in range(0, columns.shape[1], AT_ONCE):
        found_for = []
        for number in range(start, min(start + AT_ONCE, columns.shape[1])):
            more = number + 1 < columns.shape[1]
            column = columns[:, number].sum()
            found_for.append(torch.autograd.grad(column, wanted, retain_graph=more, allow_unused=True))
            pause()
        maps += _propagate(found, found_for, pause)
    joined = torch.stack(maps, dim=1)
    return joined[:, 0] if outputs is None else joined


class _Recorded:
    """The final tokens [B, P + N, D] in the graph, and the layers before them; none for other encoders than a ViT."""

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.tokens: list[Tensor] = []
        self.prefix = 0

    @property
    def layers(self) -> list[Layer]:
        return [] if self.trace is None else self.trace.layers

    @property
    def final(self) -> Tensor:
        if self.trace is not None:
            # A task may use the norm for tokens of its own; those of the image are as many as the encoder embedded.
            self.prefix, first = self.trace.prefix, self.trace.layers[0].tokens.shape[1]
            fitting = [tokens for tokens in self.trace.normed if tokens.shape[1] == first]
            if not fitting:
                raise UserError("the encoder's last layer has other tokens than its first: explain cannot follow it")
            return fitting[-1]
        if not self.tokens:
            raise UserError("this task does not pass the image through its encoder: there is nothing to explain")
        return self.tokens[-1]


@contextmanager
def _recorded(task: Task) -> Iterator[_Recorded]:
    found = _Recorded()
    try:
        encoder = encoder_of(task)
    except UserError:
        if not isinstance(task.encoder, nn.Module):
            raise
    else:
        with recording(encoder, graph=True) as found.trace, evaluating(task):
            yield found
        return

    def keep(_: nn.Module, __: Any, tokens: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        found.tokens.append(torch.cat([tokens.prefix, tokens.patches], dim=1))
        found.prefix = tokens.prefix.shape[1]
        split = found.tokens[-1].split([found.prefix, tokens.patches.shape[1]], dim=1)
        return type(tokens)(*split, tokens.grid)

    hook = task.encoder.register_forward_hook(keep)
    try:
        with evaluating(task):
            yield found
    finally:
        hook.remove()


@torch.no_grad()
def _propagate(found: _Recorded, gradients: Sequence[Sequence[Tensor | None]], pause: Pause) -> list[Tensor]:
    """Relevance [B, N] for each output, from the gradients of the final tokens and of each layer's output."""
    rows = [_weights_of_rows(found.final, final) for final, *_ in gradients]
    for layer, *mixed in zip(reversed(found.layers), *(reversed(own) for _, *own in gradients), strict=True):
        used = [own for own in mixed if own is not None]
        matrices = iter(layer.relevance(used).unbind(1) if used else ())
        rows = [_sized(row, layer.tokens.shape[1], found.prefix) for row in rows]
        rows = [
            row if own is None else row + row @ _normalised(next(matrices))
            for row, own in zip(rows, mixed, strict=True)
        ]
        pause()
    return [row[:, 0, found.prefix :].cpu() for row in rows]


def _normalised(matrices: Tensor) -> Tensor:
    """Each row with a sum of one."""
    return matrices / matrices.sum(dim=-1, keepdim=True).clamp_min(TINY)


def _weights_of_rows(tokens: Tensor, gradient: Tensor | None) -> Tensor:
    """How much each final token speaks for an output, [B, 1, P + N]; the sum is one."""
    if gradient is None:
        raise UserError("the output does not depend on the image's tokens: there is nothing to explain")
    speaks = (tokens * gradient).float().sum(dim=-1)  # [B, P + N]
    positive = speaks.clamp(min=0)
    # Where no token speaks for the output, those that matter most still explain it.
    positive = torch.where(positive.any(dim=1, keepdim=True), positive, speaks.abs())
    return (positive / positive.sum(dim=1, keepdim=True).clamp_min(TINY))[:, None]


def _sized(row: Tensor, tokens: int, prefix: int) -> Tensor:
    """Relevance [B, 1, T] for a layer with another number of tokens: a task may add its own after the prefix."""
    before = row.shape[2]
    if tokens > before:
        return torch.cat([row[..., :prefix], row.new_zeros(*row.shape[:2], tokens - before), row[..., prefix:]], dim=2)
    return torch.cat([row[..., :prefix], row[..., prefix + before - tokens :]], dim=2) if tokens < before else row
