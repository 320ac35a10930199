"""Positions that are added to tokens: fixed ones, and learned ones for another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitrail.errors import UserError, warn_once

RESAMPLINGS = {
    "antialias": ("bicubic", False, True),
    "bilinear_antialias": ("bilinear", False, True),
    "bicubic": ("bicubic", False, False),
    "bilinear": ("bilinear", False, False),
    "bicubic_corners": ("bicubic", True, False),
    "corners": ("bilinear", True, False),
}
"""mode, whether corners stay corners, and whether every old place counts where the grid shrinks"""


def sine_positions(grid: tuple[int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2-D positions [h * w, D]: a quarter each for sin x, cos x, sin y and cos y (arXiv 2205.01580)."""
    if width % 4:
        raise UserError(f"2-D sine positions need a width that 4 divides, got {width}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    steps = torch.arange(width // 4, dtype=torch.float64) / max(width // 4 - 1, 1)
    frequencies = temperature**-steps
    x = columns.flatten()[:, None] * frequencies
    y = rows.flatten()[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, resampling: str = "antialias"
) -> Tensor:
    """Learned positions [1, prefix + N, D] of one grid for another, by their 2-D places (section 3.2).

    `resampling` is one of those that `Variant` explains: every library has its own, and their results differ.
    """
    first, grid = positions[:, :prefix], positions[:, prefix:]
    image = rearrange(grid, "1 (h w) d -> 1 d h w", h=old[0]).float()
    if resampling == "offset":
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        mode, corners, antialias = RESAMPLINGS[resampling]
        image = F.interpolate(image, size=new, mode=mode, align_corners=corners, antialias=antialias)
    return torch.cat([first, rearrange(image, "1 d h w -> 1 (h w) d").to(grid.dtype)], dim=1)


def with_gap(positions: Tensor, placed: int, prefix: int) -> Tensor:
    """Positions [1, placed + N, D] for prefix + N tokens: zeros for those of the prefix that have none (registers)."""
    if placed == prefix:
        return positions
    gap = positions.new_zeros(1, prefix - placed, positions.shape[2])
    return torch.cat([positions[:, :placed], gap, positions[:, placed:]], dim=1)


def fit_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, resampling: str
) -> Tensor:
    """`resize_positions` for pictures of another size than the model's, which is said once."""
    message = f"positions interpolated from {old[0]}x{old[1]} patches to {new[0]}x{new[1]}"
    # `torch.compiler.disable` would say it in compiled models too, but imports the compiler, which takes seconds.
    if not torch.compiler.is_compiling():
        warn_once(message)
    return resize_positions(positions, old, new, prefix, resampling)
