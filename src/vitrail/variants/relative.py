"""Relative position biases: attention scores get a bias by the offset of two tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.ops import sampling_matrix
from vitrail.variants.place import Place


class RelativeTable(nn.Module):
    """A learned bias per offset and head (BEiT): `table` is [(2h - 1) * (2w - 1) + 3, heads].

    The last three rows are for class token to patch, patch to class token, and class token to itself.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(self, grid: tuple[int, int], heads: int, resampling: str) -> None:
        super().__init__()
        self.grid, self.resampling = grid, resampling
        self.table = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))

    def forward(self, q: Tensor | None, place: Place) -> Tensor:
        """Biases [1, heads, T, T] for T tokens, the first of which is the class token."""
        table = resize_table(self.table, self.grid, place.grid, self.resampling)
        return table[place.pairs].permute(2, 0, 1)[None]

    def resize(self, grid: tuple[int, int]) -> None:
        """Interpolate the table for another grid."""
        self.table = nn.Parameter(resize_table(self.table.detach(), self.grid, grid, self.resampling))
        self.grid = grid


def relative_index(grid: tuple[int, ...]) -> Tensor:
    """Row of the table for each pair of tokens: [1 + h * w, 1 + h * w]."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    down = y.flatten()[:, None] - y.flatten() + rows - 1
    right = x.flatten()[:, None] - x.flatten() + columns - 1
    places = (2 * rows - 1) * (2 * columns - 1)
    index = F.pad(down * (2 * columns - 1) + right, (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = places, places + 1, places + 2
    return index


def resize_table(table: Tensor, old: tuple[int, ...], new: tuple[int, ...], resampling: str) -> Tensor:
    """The table of a `RelativeTable`, interpolated from one grid to another."""
    if old == new:
        return table
    source, target = ([2 * n - 1 for n in grid] for grid in (old, new))
    patches, special = table[:-3].float(), table[-3:]
    image = patches.T.unflatten(1, source)
    if resampling == "geometric":
        down, right = (geometric(a, b).to(image) for a, b in zip(source, target, strict=True))
        image = down @ image @ right.T
    else:
        image = F.interpolate(image[None], size=target, mode="bilinear")[0]
    return torch.cat([image.flatten(1).T.to(table.dtype), special])


def geometric(source: int, target: int) -> Tensor:
    """Weights [target, source] that interpolate a table at positions in geometric progression, as in BEiT.

    The source's positions are 0, 1, 1 + q, 1 + q + q^2 and so on, with q such that the last one is the target's last
    position: small offsets keep their values and large ones are stretched. Interpolation is linear.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (source // 2)) / (1 - q) > target // 2 else (q, high)
    steps = torch.tensor([sum(q**j for j in range(i + 1)) for i in range(source // 2)])
    places = torch.cat([-steps.flip(0), torch.zeros(1), steps])
    wanted = torch.arange(-(target // 2), target // 2 + 1).float()
    right = torch.bucketize(wanted, places).clamp(max=source - 1)
    left = (right - 1).clamp(min=0)
    before, after = (wanted - places[left]).clamp(min=0), (places[right] - wanted).clamp(min=0)
    share = torch.where(before + after > 0, before / (before + after), 0.5)
    weights = torch.zeros(target, source)
    weights.scatter_add_(1, left[:, None], 1 - share[:, None])
    return weights.scatter_add_(1, right[:, None], share[:, None])


class DecomposedBias(nn.Module):
    """Products of the query with a learned vector for the distance in rows and one for that in columns (SAM)."""

    no_decay: ClassVar[tuple[str, ...]] = ("rows", "columns")

    def __init__(self, grid: tuple[int, int], per_head: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(2 * grid[0] - 1, per_head))
        self.columns = nn.Parameter(torch.zeros(2 * grid[1] - 1, per_head))

    def forward(self, q: Tensor, place: Place) -> Tensor:
        """[B, heads, T, T] from queries [B, heads, T, d], without a prefix."""
        if q.shape[2] != place.grid[0] * place.grid[1]:
            raise UserError("SAM's positions are for patches only and need all of them: leave none out")
        q = q.unflatten(2, place.grid)
        down = torch.einsum("bnhwd,hkd->bnhwk", q, _vectors(self.rows, place.grid[0]))
        right = torch.einsum("bnhwd,wkd->bnhwk", q, _vectors(self.columns, place.grid[1]))
        return (down[..., :, None] + right[..., None, :]).flatten(4).flatten(2, 3)

    def resize(self, grid: tuple[int, int]) -> None:
        """Interpolate the vectors for another grid."""
        self.rows, self.columns = (
            nn.Parameter(_stretch(x.detach(), n).contiguous())  # FSDP2 shares out no others
            for x, n in zip((self.rows, self.columns), grid, strict=True)
        )


def _stretch(vectors: Tensor, size: int) -> Tensor:
    """[2 * size - 1, d], linearly interpolated."""
    if isinstance(size, torch.SymInt):
        return (sampling_matrix(vectors.shape[0], 2 * size - 1, "bilinear").to(vectors) @ vectors.float()).to(vectors)
    if len(vectors) == 2 * size - 1:
        return vectors
    return F.interpolate(vectors.T[None].float(), size=2 * size - 1, mode="linear")[0].T.to(vectors.dtype)


def _vectors(vectors: Tensor, size: int) -> Tensor:
    """[size, size, d]: the vectors for each pair of positions."""
    places = torch.arange(size, device=vectors.device)
    return _stretch(vectors, size)[places[:, None] - places + size - 1]
