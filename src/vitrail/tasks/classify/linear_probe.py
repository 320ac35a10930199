"""Linear probe: logistic regression on frozen features, solved exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.tasks.values import Features

STRENGTHS = tuple(10 ** (-half / 2) for half in range(-2, 13))
"""strengths of the linear probe's L2 penalty: 10 down to 1e-6"""
PATIENCE = 3
"""stop after this many strengths without an improvement; the weakest take longest"""


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on frozen features: logits are `vectors @ weight.T + bias`."""

    weight: Tensor
    """[K, D] float32"""
    bias: Tensor
    """[K] float32"""
    strength: float
    """penalty that was best on the validation split"""
    tried: list[dict[str, float]]
    """each `strength` in the order tried, with `top1` and `cross_entropy` on the validation split"""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Features [N, D] to logits [N, K]."""
        return F.linear(vectors, self.weight, self.bias)


def linear_probe(train: Features, val: Features, classes: int) -> LinearProbe:
    """Logistic regression on the training features, with the penalty's strength chosen on the validation split.

    The features are standardised, because the penalty depends on their scale. Strengths go from strong to weak, each
    initialised with the solution of the last. The choice is by cross-entropy, which on few images is less noisy than
    accuracy.
    """
    # Double precision lets the solver reach the optimum; on accelerators it is slow or missing.
    vectors = train.vectors.double() if train.vectors.device.type == "cpu" else train.vectors
    std, mean = torch.std_mean(vectors, dim=0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)
    x, held_out = (vectors - mean) / std, (val.vectors.to(vectors) - mean) / std
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    best, chosen, tried = float("inf"), (weight, bias, STRENGTHS[0]), []
    for strength in STRENGTHS:
        weight, bias = logistic_regression(x, train.labels, weight, bias, strength)
        scores = scores_of(F.linear(held_out, weight, bias), val.labels)
        tried.append({"strength": strength, **scores})
        if scores["cross_entropy"] < best:
            best, chosen = scores["cross_entropy"], (weight, bias, strength)
        elif len(tried) - 1 - STRENGTHS.index(chosen[2]) >= PATIENCE:
            break
    weight = chosen[0] / std
    return LinearProbe(weight.float(), (chosen[1] - weight @ mean).float(), chosen[2], tried)


def logistic_regression(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """The weight [K, D] and bias [K] that minimise mean cross-entropy + strength / 2 * |weight|^2, by L-BFGS.

    The problem is convex, so the initial `weight` and `bias` change the time and not the result. scikit-learn's C is
    1 / (strength * N).
    """
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    tolerance = 1e-8 if x.dtype == torch.float64 else 1e-5
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=tolerance,
        tolerance_change=1e-2 * tolerance**2,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        objective = F.cross_entropy(F.linear(x, weight, bias), labels) + strength / 2 * weight.square().sum()
        objective.backward()
        return objective

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()


def scores_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1` as a fraction, and `cross_entropy`."""
    return {
        "top1": (logits.argmax(dim=1) == labels).double().mean().item(),
        "cross_entropy": F.cross_entropy(logits, labels).item(),
    }
