"""Rotary position embedding: rotate queries and keys by their position, so that scores depend on offsets."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.variants.config import VariantConfig


class Rotation(NamedTuple):
    """Sines and cosines of the angles for N patches."""

    cos: Tensor
    """[N, d] for d channels of a head, or [heads, N, d]"""
    sin: Tensor
    halves: bool
    """rotate channels i and i + d/2 together, instead of 2i and 2i + 1"""

    def apply(self, x: Tensor, prefix: int) -> Tensor:
        """Rotate [B, heads, prefix + N, d]; the prefix has no position and is unchanged."""
        first, patches = x[:, :, :prefix], x[:, :, prefix:]
        if patches.shape[2] != self.cos.shape[-2]:
            raise UserError(
                f"rotary positions for {self.cos.shape[-2]} patches, got {patches.shape[2]}: give all of them"
            )
        if self.halves:
            a, b = patches.chunk(2, dim=-1)
            turned = torch.cat([-b, a], dim=-1)
        else:
            turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        patches = (patches * self.cos + turned * self.sin).to(x.dtype)
        return torch.cat([first, patches], dim=2) if prefix else patches


class Rotary(nn.Module):
    """The rotations of every block for a grid, of the kind in `VariantConfig.rotary`."""

    no_decay: ClassVar[tuple[str, ...]] = ("frequencies",)

    def __init__(self, variant: VariantConfig, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.variant, self.depth = variant, depth
        self.per_head = width // heads
        if self.per_head % 4:
            raise UserError(f"rotary positions need a head width that is divisible by 4, got {self.per_head}")
        if variant.rotary == "mixed":
            self.frequencies = nn.Parameter(random_frequencies(variant, heads, depth, self.per_head))

    def forward(self, grid: tuple[int, ...], device: torch.device) -> list[Rotation]:
        """One rotation per block."""
        halves = self.variant.rotary_pairs == "halves"
        if self.variant.rotary == "mixed":
            y, x = _rows_and_columns(grid, device)
            first, second = (x, y) if self.variant.rotary_first == "columns" else (y, x)
            directions = self.frequencies.float()
            angles = first[:, None] * directions[0][..., None, :] + second[:, None] * directions[1][..., None, :]
            return [_rotation(angles[i], halves) for i in range(self.depth)]
        return [_rotation(fixed_angles(self.variant, grid, self.per_head).to(device), halves)] * self.depth


def fixed_angles(variant: VariantConfig, grid: tuple[int, ...], per_head: int) -> Tensor:
    """Angles [h * w, d/2] of the kinds without weights: half of them for each axis."""
    rows, columns = _rows_and_columns(grid, torch.device("cpu"))
    exponents = torch.arange(per_head // 4, dtype=torch.float32) / (per_head // 4)
    frequencies = variant.rotary_temperature**-exponents
    if variant.rotary == "centred":
        rows, columns = (2 * (x + 0.5) / size - 1 for x, size in zip((rows, columns), grid, strict=True))
        frequencies = 2 * math.pi * frequencies
    else:
        rows, columns = rows + variant.rotary_offset, columns + variant.rotary_offset
        if variant.rotary_reference is not None:
            rows, columns = (
                x / size * reference
                for x, size, reference in zip((rows, columns), grid, variant.rotary_reference, strict=True)
            )
    order = (rows, columns) if variant.rotary_first == "rows" else (columns, rows)
    return torch.cat([places[:, None] * frequencies for places in order], dim=1)


def random_frequencies(variant: VariantConfig, heads: int, depth: int, per_head: int) -> Tensor:
    """[2, depth, heads, d/2]: frequencies per axis: axial ones, rotated by a random angle per head."""
    sizes = variant.rotary_temperature ** -(torch.arange(0, per_head, 4) / per_head)
    angles = torch.rand(depth, heads, 1) * 2 * math.pi
    both = torch.cat([angles.expand(-1, -1, len(sizes)), angles.expand(-1, -1, len(sizes)) + math.pi / 2], dim=-1)
    return torch.stack([both.cos(), both.sin()]) * sizes.repeat(2)


def _rows_and_columns(grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    if len(grid) != 2:
        raise UserError(f"rotary positions are for images, got a grid of {len(grid)} axes")
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return rows.flatten().float(), columns.flatten().float()


def _rotation(angles: Tensor, halves: bool) -> Rotation:
    cos, sin = angles.cos(), angles.sin()
    if halves:
        return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1), True)
    return Rotation(cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1), False)
