"""Rows of renaming tables, and values inferred from weight shapes without a config."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from vitrail.data import imagenet
from vitrail.errors import UserError
from vitrail.zoo.source import Files, Weight


def linear(table: dict[str, Weight], own: str, theirs: str, bias: bool = True) -> None:
    """A module with a weight and a bias: a linear map, a convolution or a norm."""
    for end in ("weight", "bias")[: 1 + bias]:
        table[f"{own}.{end}"] = Weight((f"{theirs}.{end}",))


def joined(names: Iterable[str]) -> Weight:
    """Several tensors, concatenated along the first axis."""
    return Weight(tuple(names), lambda *tensors: torch.cat(tensors), "joined")


def reshaped(name: str, shape: tuple[int, ...]) -> Weight:
    """The same numbers in another shape."""
    return Weight((name,), lambda value: value.reshape(shape), "reshaped")


def blocks_in(files: Files, pattern: str) -> int:
    """The number of blocks, from a name pattern with a placeholder for the index."""
    depth = 0
    while pattern.format(depth) in files.shapes:
        depth += 1
    return depth


def heads_for(width: int) -> int:
    """Published ViTs have heads of 64 channels, except ViT-H with its heads of 80 and ViT-g of 88."""
    return 16 if width in (1280, 1408) else max(1, width // 64)


def class_names(count: int, notes: list[str]) -> list[str]:
    """Class names if the files have none: ImageNet's, with a note, for the same number of classes; else numbers."""
    if count != len(imagenet.names()):
        return [str(i) for i in range(count)]
    notes.append(f"the files do not name the {count:,} classes: assuming ImageNet's")
    return imagenet.names()


def square(files: Files, name: str, prefix: int) -> int:
    """The side of the square grid of learned positions [1, prefix + N, D]."""
    count = files.shapes[name][1] - prefix
    side = math.isqrt(max(0, count))
    if side < 1 or side * side != count:
        raise UserError(
            f"{files.path}: {name} is for {count} patches, which do not form a square: choose another checkpoint"
        )
    return side
