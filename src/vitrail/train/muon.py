"""Muon: orthogonalised momentum for matrices (Keller Jordan, 2024)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from vitrail.train.device import native_bf16


class Stack(NamedTuple):
    """Parameters of one shape and group, which are orthogonalised together."""

    parameters: list[Tensor]
    buffer: Tensor
    """their momentum, [K, *shape]; the optimizer's state holds views of it"""
    group: int


class Muon(torch.optim.Optimizer):
    """Muon: orthogonalised momentum (Keller Jordan, 2024), scaled to updates of AdamW's size (arXiv 2502.16982).

    Takes matrices [R, C] and filters of convolutions [O, C, h, w], which are matrices [O, C h w]. Those of one shape
    are orthogonalised together: the blocks of a ViT share four shapes, so a step takes four products instead of four
    per block. The products are in bf16 if the device supports it natively, else in float32. The numbers are those of
    `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, to bf16's rounding; PyTorch has it from 2.9 on.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        steps: int = 5,
        compile: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})
        self._stacks: list[Stack] = []
        bf16 = native_bf16(self.param_groups[0]["params"][0].device)
        self.precision = torch.bfloat16 if bf16 else torch.float32
        if compile:
            self._move = torch.compile(self._move, dynamic=False)  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, closure: None = None, good: Tensor | None = None) -> None:  # type: ignore[override]
        """One step; `good` [] of False leaves weights and momentum unchanged, whatever the gradients."""
        stacks = self._stacked()
        if not stacks:
            return
        device = stacks[0].buffer.device
        groups = [self.param_groups[stack.group] for stack in stacks]
        # As tensors, so that a compiled step is the same at every learning rate. One per stack, chosen on the host: an
        # index on a GPU would be copied there, and the host would wait for it.
        rates = torch.tensor([group["lr"] for group in groups]).to(device, non_blocking=True)
        good = torch.ones((), dtype=torch.bool, device=device) if good is None else good
        self._move(
            [stack.parameters for stack in stacks],
            [[p.grad for p in stack.parameters] for stack in stacks],
            [stack.buffer for stack in stacks],
            list(rates.unbind()),
            [(group["weight_decay"], group["momentum"], group["steps"]) for group in groups],
            good,
        )

    def _move(
        self,
        parameters: list[list[Tensor]],
        gradients: list[list[Any]],
        buffers: list[Tensor],
        rates: list[Tensor],
        settings: list[tuple[float, float, int]],
        good: Tensor,
    ) -> None:
        for own, found, buffer, peak, setting in zip(parameters, gradients, buffers, rates, settings, strict=True):
            weight_decay, momentum, steps = setting
            gradient = torch.where(good, torch.stack(found), 0.0)
            buffer.lerp_(gradient, (1 - momentum) * good)
            update = orthogonal(gradient.lerp(buffer, momentum).flatten(2), steps, self.precision)
            rate = peak * good
            # An orthogonal matrix of this shape has entries of size 1 / sqrt(max); AdamW's updates are near 0.2.
            moves = update.float() * (-0.2 * math.sqrt(max(update.shape[1:])) * rate)
            torch._foreach_mul_(own, 1 - rate * weight_decay)
            torch._foreach_add_(own, list(moves.to(own[0].dtype).view_as(buffer).unbind()))

    def _stacked(self) -> list[Stack]:
        """The stacks of the parameters that have a gradient, which in most runs are the same in every step."""
        shapes: dict[tuple[int, torch.Size], list[Tensor]] = {}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault((number, parameter.shape), []).append(parameter)
        if [[*map(id, members)] for members in shapes.values()] != [[*map(id, s.parameters)] for s in self._stacks]:
            self._stacks = [self._stack(members, number) for (number, _), members in shapes.items()]
        return self._stacks

    def _stack(self, members: list[Tensor], group: int) -> Stack:
        buffers = [self.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in members]
        buffer = torch.stack(buffers)
        for parameter, view in zip(members, buffer.unbind(), strict=True):
            self.state[parameter]["momentum_buffer"] = view
        return Stack(members, buffer, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._stacks = []


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""coefficients of the quintic iteration, chosen by its author for fast convergence; singular values end in [0.7,
1.2]"""


def orthogonal(matrices: Tensor, steps: int = 5, precision: torch.dtype = torch.float32) -> Tensor:
    """[K, R, C] to the nearest semi-orthogonal matrices, roughly: singular values come near 1 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    x = matrices.to(precision)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
