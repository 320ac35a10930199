"""Maps of patches over the original photo, in colours that read on light and dark pages and in print."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.float32]

HEAT = LinearSegmentedColormap.from_list("vitrail", ["#ffe45c", "#ff9f1c", "#ef3e2e", "#b8123f", "#8a1048"], N=256)
"""from yellow to a dark red: the stronger, the darker, so that a map is read in a grey print too"""
LEAST = 320
"""shortest length in pixels of the longer side of an image under a map: smaller ones are enlarged"""
MANY = 400
"""patches, from which on a few outliers no longer set the range of a map"""
FADED = 0.5
"""how far the photo under a map is faded to white, so that its dark places are lighter than a strong place of a map"""
COLOUR = 0.35
"""how much of its own colour the photo keeps"""
LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


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


def faded(photo: Pixels, colour: float = COLOUR) -> Pixels:
    """A photo [H, W, 3] of floats, pale and with a share of its colour, as the ground of a map."""
    grey = (photo @ LUMINANCE)[..., None]
    return (FADED + (1 - FADED) * (grey + colour * (photo - grey))).astype(np.float32)


def strength(values: Pixels) -> Pixels:
    """How opaque the colour of a value from 0 to 1 is: nothing at 0, so that what does not matter stays a photo."""
    return (0.85 * np.clip(values / 0.6, 0, 1) ** 1.3).astype(np.float32)


def tinted(photo: Pixels, heat: Tensor, frame: Sequence[float], smooth: bool = True) -> Pixels:
    """The photo [H, W, 3], pale, under a map [h, w] of 0 to 1: the stronger a place, the darker and fuller its colour.

    What lies outside of the model's input is paler still.
    """
    values, inside = on_image(heat.clamp(0, 1), photo.shape[:2], frame, smooth)
    ground, opaque = faded(photo), strength(values)[..., None]
    ink = HEAT(values)[..., :3].astype(np.float32) * (0.8 + 0.2 * (photo @ LUMINANCE)[..., None])
    shown = ground * (1 - opaque) + ink * opaque
    return np.where(inside[..., None] > 0, shown, 0.35 * ground + 0.65).astype(np.float32)


def coloured(photo: Pixels, colours: Tensor, frame: Sequence[float]) -> Pixels:
    """Colours of patches [h, w, 3] as panes of glass over the photo [H, W, 3]; the photo's light shines through."""
    values, inside = on_image(colours, photo.shape[:2], frame, smooth=False)
    light = faded(photo, colour=0)
    glass = values * (0.45 + 0.55 * light)
    return np.where(inside[..., None] > 0, glass, 0.4 * light + 0.6).astype(np.float32)


def photo_of(image: NDArray[np.uint8]) -> Pixels:
    """An image [H, W, 3] as floats from 0 to 1, with pixels repeated until the longer side is at least `LEAST`."""
    times = -(-LEAST // max(image.shape[:2]))
    pixels = image.repeat(times, axis=0).repeat(times, axis=1)
    return (pixels / np.float32(255)).astype(np.float32)
