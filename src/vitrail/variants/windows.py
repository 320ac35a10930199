"""Attention inside windows of the image."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitrail.variants.place import Place


def in_windows(attend: Callable[..., Tensor], x: Tensor, place: Place, size: int) -> Tensor:
    """Apply `attend` to each window of size x size patches of [B, N, D].

    If the windows do not divide the image, it is padded with zeros on the right and at the bottom, which are attended
    to, as in SAM.
    """
    rows, columns = place.grid
    image = rearrange(x, "b (h w) d -> b h w d", h=rows)
    image = F.pad(image, (0, 0, 0, -columns % size, 0, -rows % size))
    down = image.shape[1] // size
    windows = rearrange(image, "b (h r) (w c) d -> (b h w) (r c) d", r=size, c=size)
    windows = attend(windows, place=Place((size, size)))
    image = rearrange(windows, "(b h w) (r c) d -> b (h r) (w c) d", b=x.shape[0], h=down, r=size)
    return image[:, :rows, :columns].flatten(1, 2)
