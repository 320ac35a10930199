"""What the samples of a set carry beside their images."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vitrail.data.affine import Affine


class Target:
    """What the samples of a set carry beside their images: a column with one entry per sample."""

    fields: ClassVar[tuple[str, ...]]
    """names in a batch"""
    spatial: ClassVar[bool] = False
    """follows the affine of its image"""
    noun: ClassVar[str] = "these targets"
    classes: list[str]

    def __len__(self) -> int:
        raise NotImplementedError

    def subset(self, places: Tensor) -> Self:
        raise NotImplementedError

    def joined(self, other: Self) -> Self:
        """These entries and then those of another target of the same kind and classes."""
        raise NotImplementedError

    def strata(self) -> Tensor:
        """int64 [N]: what validation splits and balanced draws go by."""
        return torch.zeros(len(self), dtype=torch.int64)

    def marks(self) -> bytes:
        """What the data hash covers."""
        raise NotImplementedError

    def read(self, i: int) -> Any:
        return None

    def warp(self, value: Any, affine: Affine) -> Any:
        return value

    def collate(self, values: list[Any], samples: Tensor, training: bool) -> dict[str, Any]:
        raise NotImplementedError

    def mix(self, fields: dict[str, Any], partner: Tensor, share: Tensor) -> dict[str, Any]:
        raise NotImplementedError

    def split(self, fields: dict[str, Any], count: int) -> list[dict[str, Any]]:
        columns = {name: value.tensor_split(count) for name, value in fields.items()}
        return [{name: pieces[i] for name, pieces in columns.items()} for i in range(count)]

    def rescale(self, fields: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        return fields
