"""How faithful a map is: deletion and insertion curves (arXiv 1806.07421)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops import Grid

BLUR = 8
"""the blurred image of the insertion curve is averaged over this many times fewer pixels per side"""


class Curves(NamedTuple):
    """The score of a model while patches go and come, best patches first: each [B, steps + 1]."""

    deletion: Tensor
    """patches become the mean colour, first those that the map values most; a faithful map makes the score fall fast"""
    insertion: Tensor
    """patches of the image come into its blurred copy; a faithful map makes the score rise fast"""

    def areas(self) -> tuple[Tensor, Tensor]:
        """The area under each curve, [B]: the mean score over the share of changed patches, by the trapezium rule."""
        deletion, insertion = (torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1) for curve in self)
        return deletion, insertion


@torch.no_grad()
def curves(score: Callable[[Tensor], Tensor], images: Tensor, maps: Tensor, grid: Grid, steps: int = 16) -> Curves:
    """The curves of maps [B, N] over the grid's patches of normalised images [B, C, H, W].

    `score` gives [B] for images, such as the probability of the class that the map explains; it is called 2 x (steps +
    1) times. Equal values of a map go in the order of their patches. Normalised images have the mean colour at 0.
    """
    rows, columns = grid
    patches = rows * columns
    steps = min(steps, patches)
    rank = maps.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is the patch that counts most
    grey, blurred = torch.zeros_like(images), _blurred(images)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(steps + 1):
        changed = (rank < round(step * patches / steps)).to(images).unflatten(1, (1, rows, columns))
        mask = F.interpolate(changed, size=images.shape[2:], mode="nearest")
        found[0].append(score(torch.where(mask > 0, grey, images)).float().cpu())
        found[1].append(score(torch.where(mask > 0, images, blurred)).float().cpu())
    return Curves(torch.stack(found[0], dim=1), torch.stack(found[1], dim=1))


def _blurred(images: Tensor) -> Tensor:
    """The images without their detail: averaged over squares, and enlarged smoothly."""
    height, width = images.shape[2:]
    small = F.adaptive_avg_pool2d(images, (max(1, height // BLUR), max(1, width // BLUR)))
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
