"""Whether this processor computes the convolutions of a model correctly in bf16."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.train.device import number_format
from vitrail.train.run import Run

log = logging.getLogger("vitrail")
TOLERANCE = 0.05
"""largest relative error of a convolution: that of bf16's rounding is about 0.003"""


def with_reliable_format(run: Run, model: nn.Module, device: torch.device) -> Run:
    """The run, in float32 where its bf16 would compute a convolution of `model` wrongly; a warning says so.

    On CPUs with AMX, PyTorch 2.15 gives values that have nothing to do with the right ones for a few shapes, such as 16
    channels in patches of 4. UserError if the run asks for bf16 itself.
    """
    if device.type != "cpu" or number_format(device, run.precision) != torch.bfloat16:
        return run
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and _error(module) > TOLERANCE:
            wrong = f"this processor computes the convolution {name} wrongly in bf16"
            if run.precision == "bf16":
                raise UserError(f"{wrong}: remove --precision, or give it fp32")
            log.warning(f"{wrong}: training in fp32")
            return replace(run, precision="fp32")
    return run


@torch.no_grad()
def _error(convolution: nn.Conv2d) -> float:
    """The relative error of a convolution in bf16, for noise of four kernels along a side."""
    height, width = (4 * size for size in convolution.kernel_size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, convolution.in_channels, height, width, generator=generator)
    right: Tensor = convolution(noise)
    with torch.autocast("cpu", torch.bfloat16):
        found: Tensor = convolution(noise)
    return float((found.float() - right).norm() / right.norm().clamp_min(1e-12))
