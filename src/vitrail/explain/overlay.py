"""Maps of patches over the original photo, in colours that read on light and dark pages and in print."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.float32]

HEAT = LinearSegmentedColormap.from_list("vitrail", matplotlib.colormaps["plasma"](np.linspace(0.12, 0.97, 256)), N=256)
"""perceptually uniform, without plasma's darkest blue"""
LEAST = 320
"""shortest length in pixels of the longer side of an image under a map: smaller ones are enlarged"""
MANY = 400
"""patches, from which on a few outliers no longer set the range of a map"""
GREY = 0.45
"""how far the photo under a map is faded to white: dark places of a photo stay readable under colours"""


def spread(heat: Tensor) -> Tensor:
    """A map [h, w] scaled to 0 to 1 by its own range. Of many patches, the highest 1 of 200 are 1."""
    flat = heat.float().flatten().sort().values
    high = flat[-1] if len(flat) < MANY else flat[int(0.995 * (len(flat) - 1))]
    return ((heat - flat[0]) / (high - flat[0]).clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1)


def on_image(
    values: Tensor, size: tuple[int, int], frame: Sequence[float], smooth: bool = True
) -> tuple[Pixels, Pixels]:
    """Values of patches [h, w] or [h, w, 3] on the pixels of an image of `size`, and where they are: 1, or 0 outside.

    `frame` is where the model's input lies in the image, (left, top, right, bottom) as shares of its size.
    """
    height, width = size
    left, top, right, bottom = frame
    x = ((torch.arange(width) + 0.5) / width - left) / (right - left)
    y = ((torch.arange(height) + 0.5) / height - top) / (bottom - top)
    at = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flip(-1).float()  # [H, W, (x, y)], from 0 to 1
    planes = values.float()[None, None] if values.ndim == 2 else values.float().permute(2, 0, 1)[None]
    mode = "bilinear" if smooth else "nearest"
    found = F.grid_sample(planes, 2 * at[None] - 1, mode=mode, padding_mode="border", align_corners=False)[0]
    inside = ((at >= 0) & (at <= 1)).all(dim=-1).float()
    return (found[0] if values.ndim == 2 else found.permute(1, 2, 0)).numpy(), inside.numpy()


def faded(photo: Pixels) -> Pixels:
    """A photo [H, W, 3] of floats in light grey, as the ground of a map."""
    grey = photo @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    return np.repeat((GREY + (1 - GREY) * grey)[..., None], 3, axis=2)


def tinted(photo: Pixels, heat: Tensor, frame: Sequence[float], smooth: bool = True) -> Pixels:
    """The photo [H, W, 3] in grey under a map [h, w] of 0 to 1: the stronger a place, the fuller its colour.

    What lies outside of the model's input stays grey, and lighter.
    """
    values, inside = on_image(heat.clamp(0, 1), photo.shape[:2], frame, smooth)
    ground = faded(photo)
    # Colour stands out by brightness and by strength, so that it is read without colour too.
    strength = (inside * (0.04 + 0.7 * values**0.8))[..., None]
    shown = ground * (1 - strength) + HEAT(values)[..., :3].astype(np.float32) * strength
    return np.where(inside[..., None] > 0, shown, 0.4 * ground + 0.6).astype(np.float32)


def coloured(photo: Pixels, colours: Tensor, frame: Sequence[float]) -> Pixels:
    """Colours of patches [h, w, 3] as panes of glass over the photo [H, W, 3]; the photo's light shines through."""
    values, inside = on_image(colours, photo.shape[:2], frame, smooth=False)
    light = faded(photo)
    glass = values * (0.45 + 0.55 * light)
    return np.where(inside[..., None] > 0, glass, 0.4 * light + 0.6).astype(np.float32)


def photo_of(image: NDArray[np.uint8]) -> Pixels:
    """An image [H, W, 3] as floats from 0 to 1, with pixels repeated until the longer side is at least `LEAST`."""
    times = -(-LEAST // max(image.shape[:2]))
    pixels = image.repeat(times, axis=0).repeat(times, axis=1)
    return (pixels / np.float32(255)).astype(np.float32)
