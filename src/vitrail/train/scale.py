"""The scale of the loss in fp16, whose range is small: without it small gradients would become zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrail.train.device import Precision, number_format

GROW_EVERY = 2000
"""steps in a row without an overflow after which the scale doubles"""


class LossScale:
    """A power of two that multiplies the loss, and that the gradient is divided by.

    As in PyTorch's gradient scaler it halves when a gradient overflows and doubles after `GROW_EVERY` steps, but the
    steps never wait for it: all of it stays on the device. A loss is a sum over the images of a step, so for the mean
    the scale starts at 2^16, and stays between 1 and 2^24.
    """

    def __init__(self, images: int, device: torch.device) -> None:
        mean = 0.5 ** round(math.log2(images))
        self.floor, self.ceiling = mean, 2.0**24 * mean
        self.value = torch.full((), 2.0**16 * mean, device=device)
        self.steps = torch.zeros((), device=device)
        """steps since the last overflow or doubling"""

    def update(self, finite_loss: Tensor, finite_gradient: Tensor) -> Tensor:
        """Halve or double the scale after a step; returns [], whether it was halved.

        Only an overflow of the gradient counts, and only above the floor: a smaller scale helps against nothing else.
        """
        halved = finite_loss & ~finite_gradient & (self.value > self.floor)
        self.steps.add_(1).mul_(finite_loss & finite_gradient)
        doubled = self.steps >= GROW_EVERY
        self.value.mul_(1 + doubled.float() - 0.5 * halved.float()).clamp_(max=self.ceiling)
        self.steps.mul_(~doubled)
        return halved

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value.copy_(state["value"])
        self.steps.copy_(state["steps"])


def loss_scale(device: torch.device, precision: Precision, images: int) -> LossScale | None:
    """The scale for steps of so many images, where training is in fp16; None elsewhere."""
    return LossScale(images, device) if number_format(device, precision) == torch.float16 else None
