"""How good an encoder's features are as they stand: k nearest neighbours, and a linear classifier on them.

The encoder reads each image once, prepared as for evaluation; both probes work on the vectors that it gave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.loader import Loader
from vitrail.errors import UserError
from vitrail.tasks.encoder import one_vector
from vitrail.tasks.knn import Neighbours
from vitrail.tasks.task import Task
from vitrail.train.device import autocast

STRENGTHS = tuple(10 ** (-half / 2) for half in range(-2, 13))
"""of the linear probe's penalty: 10 down to 1e-6"""
PATIENCE = 3
"""strengths in a row without a better one, after which weaker ones, which take longest, are not tried"""


class Features(NamedTuple):
    """A part of a set as an encoder sees it."""

    vectors: Tensor
    """[N, D] float32, pooled"""
    labels: Tensor
    """class numbers [N]; of captioners the numbered captions, [N, K, T]"""


@torch.no_grad()
def features(task: Task, loader: Loader, precision: Literal["auto", "bf16", "fp32"] = "auto") -> Features:
    """Read a part once. The vectors are kept on the device of the task."""
    encoder = getattr(task, "encoder", None)
    if encoder is None:
        raise UserError(f"the model of task {task.name} has no encoder whose features could be scored")
    task.eval()
    vectors, labels = [], []
    for batch in loader.evaluation():
        with autocast(batch["image"].device, precision):
            vectors.append(one_vector(encoder.pool(task.features(batch["image"])).float()))
        labels.append(batch["label"])
    return Features(torch.cat(vectors), torch.cat(labels))


def knn(train: Features, vectors: Tensor, classes: int) -> Tensor:
    """Log votes [N, K] of the nearest training images for features [N, D], as DINO's k-NN counts them."""
    head = Neighbours(vectors.shape[1], classes, 0)
    head.build_index(*train)
    # In parts: the similarities to a large training set would not fit at once.
    return torch.cat([head(part) for part in vectors.split(1024)])


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features as they are: logits are `vectors @ weight.T + bias`."""

    weight: Tensor
    """[K, D] float32"""
    bias: Tensor
    """[K] float32"""
    strength: float
    """of the penalty that was best on the validation part"""
    tried: list[dict[str, float]]
    """each `strength` in the order tried, with `top1` and `cross_entropy` on the validation part"""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Features [N, D] to logits [N, K]."""
        return F.linear(vectors, self.weight, self.bias)


def linear_probe(train: Features, val: Features, classes: int) -> LinearProbe:
    """Logistic regression on the training features, with the penalty's strength chosen on the validation part.

    The features are standardised, or the penalty would weigh them by their units. Strengths go from strong to weak,
    each begun at the solution of the last. The choice is by cross-entropy, which on few images is less noisy than
    accuracy.
    """
    # Double precision lets the solver reach the optimum; on accelerators it is slow or not there.
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

    The problem is convex, so where `weight` and `bias` begin changes the time and not the result. scikit-learn's C is
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


def probe(task: Task, train: Loader, val: Loader, part: Loader) -> dict[str, Any]:
    """`knn_top1` and `linear_top1` on a part, learned from the training part, with the penalty chosen on `val`."""
    known, held_out, asked = (features(task, loader) for loader in (train, val, part))
    classes = len(train.set.classes)
    linear = linear_probe(known, held_out, classes)
    return {
        "knn_top1": scores_of(knn(known, asked.vectors, classes), asked.labels)["top1"],
        "linear_top1": scores_of(linear(asked.vectors), asked.labels)["top1"],
        "linear_strength": linear.strength,
        "count": len(asked.labels),
    }
