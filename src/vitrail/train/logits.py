"""The largest attention logits of an encoder. Without a bound they grow under Muon until a kernel fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitrail.tasks.task import Task

IMAGES = 8
"""images of a batch that are looked at"""


class Largest(TorchFunctionMode):
    """Notes the largest attention logit of every call of fused attention while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]
            self.found.append((q.float() @ k.float().mT).abs().amax() * q.shape[-1] ** -0.5)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def largest_logits(task: Task, images: Tensor) -> list[float]:
    """max |q k| / sqrt(d) of each layer of the encoder, for the first few of a batch of images; [] without attention.

    Whatever a mask hides counts too.
    """
    training = task.training
    task.eval()
    with Largest() as largest:
        task.features(images[:IMAGES])
    task.train(training)
    return torch.stack(largest.found).tolist() if largest.found else []
