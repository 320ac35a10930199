"""What all comparisons share: the image sizes, random weights and images, differences, and the format of a row.

A row holds `sizes`, the differences at each size (see `differences`), and `note`, which says where sizes are rounded
or left out. A library's module may add further fields.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]
Pair = tuple[Tensor, Tensor]

OTHERS: tuple[Size, Size] = ((304, 304), (208, 336))
"""height and width of what every model sees beside its own size: with patches of 16, grids of odd numbers"""


def rounded(size: Size, patch: int) -> Size:
    """The size in whole patches that is nearest; a half is rounded up."""
    height, width = ((side + patch // 2) // patch * patch for side in size)
    return height, width


def note_on(sizes: tuple[Size, ...], patch: int) -> str:
    """Says that sizes are rounded, where any is."""
    return "" if all(rounded(size, patch) == size for size in sizes) else f"sizes in whole patches of {patch}"


def by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def random_images(size: Size, channels: int = 3) -> Tensor:
    """Two images [2, C, H, W], the same ones at each call."""
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def differences(tokens: Pair, output: Pair) -> dict[str, float]:
    """Of final tokens, and of the model's output, each given as (vitrail's, the library's).

    `tokens` and `output` are the largest absolute differences. `relative` is the larger of the two, each divided by
    the library's largest absolute value.
    """
    found = {"tokens": absolute(*tokens), "output": absolute(*output)}
    return found | {"relative": max(relative(*tokens), relative(*output))}


def absolute(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference. Raises ValueError for other shapes or where a value is not finite."""
    if ours.shape != theirs.shape:
        raise ValueError(f"vitrail's shape is {tuple(ours.shape)}, the library's {tuple(theirs.shape)}")
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise ValueError("a value is not finite")
    return float((ours.detach() - theirs.detach()).abs().max())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference divided by the library's largest absolute value."""
    return absolute(ours, theirs) / float(theirs.detach().abs().max())


def worst_of(row: dict[str, Any]) -> float:
    """The largest difference of a row, absolute or relative, at any size or in what vitrail has written."""
    return max(value for found in [*row["sizes"].values(), row.get("written", {})] for value in found.values())


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every weight a value that matters, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    pool, start = torch.randn(1_000_003, generator=generator), 0  # a prime: no two rows of a matrix are the same
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            value.zero_()
            continue
        count = value.numel()
        first = start % len(pool)
        repeated = pool.repeat(-(-(first + count) // len(pool)))[first : first + count]
        start += count
        value.copy_(repeated.view(value.shape) * _scale(name, value))
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
        elif value.ndim == 1 and name.endswith("weight"):
            value.add_(1.0)


def _scale(name: str, value: Tensor) -> float:
    """Matrices and filters keep the size of what goes through them; the rest is of the order of one."""
    if value.ndim >= 2 and name.endswith("weight"):
        return float(value[0].numel() ** -0.5)
    if name.startswith("rope."):
        return 1.0
    return 0.3
