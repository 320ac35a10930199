"""Images of shapes in a colour of their own, with the masks and boxes that mark them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from images import smooth
from torch import Tensor


class Scene(NamedTuple):
    image: np.ndarray
    """uint8 [H, W, 3]: no red but in the shape"""
    mask: Tensor
    """uint8 [H, W]: 1 in the shape"""
    box: Tensor
    """float32 [1, 4] around it"""


def scene(height: int, width: int, seed: int, round_shape: bool = True) -> Scene:
    """A red ellipse, or rectangle, in green and blue waves and noise. It is off the middle, and not symmetric."""
    draw = np.random.default_rng(seed)
    image = smooth(height, width, seed)
    image = np.clip(image + draw.integers(-20, 20, image.shape), 0, 255).astype(np.uint8)
    image[..., 0] = 0
    # Whole pixels, at least a third of each side.
    sides = [int(draw.integers(whole // 3, whole // 2 + 1)) for whole in (height, width)]
    top, left = (int(draw.integers(0, whole - side + 1)) for whole, side in zip((height, width), sides, strict=True))
    y, x = np.mgrid[0:height, 0:width] + 0.5
    down, across = (y - top) / sides[0] * 2 - 1, (x - left) / sides[1] * 2 - 1
    inside = down**2 + across**2 <= 1 if round_shape else np.maximum(abs(down), abs(across)) <= 1
    image[inside] = (255, 40, 40)
    box = torch.tensor([[left, top, left + sides[1], top + sides[0]]], dtype=torch.float32)
    return Scene(image, torch.from_numpy(inside.astype(np.uint8)), box)


def red(images: Tensor) -> Tensor:
    """Where normalised images [..., 3, h, w] (mean and std 0.5) show the shape."""
    return (images[..., 0, :, :] - images[..., 1, :, :] > 0.85) & (images[..., 0, :, :] > 0)


def iou(a: Tensor, b: Tensor) -> float:
    """Of boolean tensors; 1 where both are empty."""
    return float((a & b).sum() / (a | b).sum()) if bool((a | b).any()) else 1.0


def around(mask: Tensor) -> Tensor:
    """The box around the true pixels of [h, w], float32 [4]."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def apart(a: Tensor, b: Tensor, reach: int) -> Tensor:
    """Where boolean [h, w] differ further than `reach` pixels from an edge of `a`, or of the image."""
    padded = F.pad(a[None, None].float(), (reach,) * 4, value=0.5)
    near = F.unfold(padded, 2 * reach + 1).view(-1, *a.shape)
    return (a != b) & (near.amin(0) == near.amax(0))
