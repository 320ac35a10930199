"""LAMB: Adam's update, scaled for each tensor to the size of its weights (arXiv 1904.00962)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, algorithm 2) as DeiT-III uses it: that of apex and timm.

    The trust ratio, the norm of the weights over that of the update with weight decay, scales each tensor that has
    weight decay; tensors without it take Adam's step. Gradients are clipped before, by their norm over all tensors.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        compile: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        if compile:
            self._move = torch.compile(self._move, dynamic=False)  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, closure: None = None, good: Tensor | None = None) -> None:  # type: ignore[override]
        """One step; `good` [] of False leaves weights and moments unchanged, whatever the gradients."""
        device = self.param_groups[0]["params"][0].device
        # As tensors, so that a compiled step is the same at every learning rate.
        rates = torch.tensor([group["lr"] for group in self.param_groups]).to(device, non_blocking=True)
        good = torch.ones((), dtype=torch.bool, device=device) if good is None else good
        for group, rate in zip(self.param_groups, rates.unbind(), strict=True):
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in parameters]
            gradients = [p.grad for p in parameters]
            self._move(parameters, gradients, states, rate, good, group["weight_decay"], group["betas"], group["eps"])

    def _move(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[tuple[Tensor, Tensor, Tensor]],
        rate: Tensor,
        good: Tensor,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        beta1, beta2 = betas
        for p, found, (mean, square, steps) in zip(parameters, gradients, states, strict=True):
            gradient = torch.where(good, found, 0.0)
            steps.add_(good)
            mean.lerp_(gradient, (1 - beta1) * good)
            square.lerp_(gradient * gradient, (1 - beta2) * good)
            # 1 - beta ** steps: in float32 the power would lose the digits of a small difference.
            unbiased, unbiased_square = (-torch.expm1(steps * math.log(beta)) for beta in betas)
            update = mean / unbiased / ((square / unbiased_square).sqrt() + eps)
            if weight_decay:
                update = update + weight_decay * p
                weights, moved = p.norm(), update.norm()
                update = update * torch.where((weights > 0) & (moved > 0), weights / moved, 1.0)
            p.sub_(torch.where(good, update * rate, 0.0))

    def _state(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The means of the gradient and of its square, and the number of steps []."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["steps"] = torch.zeros((), device=parameter.device)
        return state["mean"], state["square"], state["steps"]
