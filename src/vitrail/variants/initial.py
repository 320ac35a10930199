"""Initial weights of published training code, where they differ from those of the paper's own code (`init_weights`)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from vitrail.vit import Head, PatchEmbedding, ViT

Initial = Literal["google", "big-vision", "deit"]
TRUNCATED = 0.87962566103423978
"""standard deviation of a standard normal that is cut at plus and minus 2, by which JAX divides its own"""


@torch.no_grad()
def initialise(model: nn.Module, initial: Initial) -> None:
    """Give an encoder, or a task with its head, other initial weights than `init_weights`; google changes nothing.

    big-vision: positions with standard deviation 1 / sqrt(width), and truncated normals for the patches and the head's
    hidden layer. deit: DeiT-III's, with standard deviation 0.02 for all matrices, the class token and positions, and
    PyTorch's default for the patches; the head's bias starts at 0.
    """
    if initial == "google":
        return
    for module in model.modules():
        (_big_vision if initial == "big-vision" else _deit)(module)


def _big_vision(module: nn.Module) -> None:
    if isinstance(module, ViT) and module.config.positions == "learned":
        nn.init.normal_(module.positions, std=module.config.width**-0.5)
    if isinstance(module, PatchEmbedding):
        _lecun_normal(module.projection.weight)
    if isinstance(module, Head):
        for linear in (child for child in module.hidden.modules() if isinstance(child, nn.Linear)):
            _lecun_normal(linear.weight)


def _lecun_normal(weight: torch.Tensor) -> None:
    """A truncated normal with variance 1 / (inputs per output), JAX's default."""
    std = math.sqrt(1 / weight[0].numel()) / TRUNCATED
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _deit(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, PatchEmbedding):
        module.projection.reset_parameters()
    if isinstance(module, ViT):
        for table in (module.class_token, getattr(module, "positions", None)):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
