"""The filters of the first layer, before any attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.vit import ViT


@torch.no_grad()
def patch_filters(encoder: ViT, count: int = 28) -> Tensor:
    """First principal components of the patch projection, largest first: [count, C, patch, patch] (figure 7, left).

    Components have length one, and the sign that makes their largest value positive. After the convolutions of a stem
    or backbone, the projection does not see pixels; then these are the first filters of the first convolution. There
    may be fewer than `count`.
    """
    first = next(layer for layer in encoder.patches.modules() if isinstance(layer, nn.Conv2d))
    if first is not encoder.patches.projection:
        return first.weight[:count].clone().float().cpu()
    weight = encoder.patches.projection.weight.float().cpu()
    flat = weight.flatten(1)
    components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return (components * largest.sign()).unflatten(1, weight.shape[1:])
