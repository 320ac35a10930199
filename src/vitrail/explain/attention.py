"""Numbers from attention matrices: maps of heads and patches, rollout, and mean attention distance.

`maps` is a tensor [L, B, heads, T, T], or `Trace.maps`, which computes one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.explain.trace import Maps, Pool, trace

AllMaps = Tensor | Sequence[Tensor]

MAPS_BYTES = 4 << 30
"""the largest matrices of all layers that `attention_maps` returns"""


@torch.no_grad()
def attention_maps(task: nn.Module, images: Tensor) -> Tensor:
    """The attention matrices (equation 6) for normalised images [B, C, H, W].

    They are [L, B, heads, T, T], float32, on the CPU. Row i is the attention of token i to every token, and sums to
    one. Fused attention never computes these matrices, so each is computed again from the layer's input, one layer at a
    time, on the model's device. The model is left unchanged. UserError if they would take more than `MAPS_BYTES`:
    `trace(task, images).maps` gives one layer at a time.
    """
    maps = trace(task, images).maps
    first = maps[0].float().cpu()
    if (size := 4 * len(maps) * first.numel()) > MAPS_BYTES:
        raise UserError(
            f"the attention of all {len(maps)} layers takes {size / 2**30:.1f} GiB, and at most {MAPS_BYTES >> 30} GiB "
            "are returned: give fewer images, or read one layer at a time from trace(task, images).maps"
        )
    found = torch.empty(len(maps), *first.shape)  # stacking at the end would need twice the memory
    for layer in range(len(maps)):
        found[layer] = maps[layer] if layer else first
    return found


@torch.no_grad()
def rollout(maps: AllMaps, prefix: int, pool: Pool = "token", patches: Sequence[int] | None = None) -> Tensor:
    """The contribution of each patch to the pooled vector: [B, N] from maps [L, B, heads, T, T] (appendix D.8).

    Attention rollout (arXiv 2005.00928): the mean over the heads, plus the identity for the residual path, each row
    normalised to one, multiplied over the layers. The result is the class token's row, or with `pool="average"` the
    mean of the patches' rows. Its sum over N is one minus the contribution of the `prefix` tokens. With the numbers of
    some `patches`, the contribution to each of their tokens: [B, patches, N].
    """
    rows = _reader(maps[0], prefix, pool) if patches is None else _rows(maps[0], prefix, patches)
    for layer in reversed(range(len(maps))):
        mixed = maps[layer].mean(dim=1)
        mixed = mixed + torch.eye(mixed.shape[-1], device=mixed.device)
        # Only some rows of the product are needed, so they are multiplied through the layers, last one first.
        rows = rows @ (mixed / mixed.sum(dim=-1, keepdim=True))
    found = rows[..., prefix:].cpu()
    return found[:, 0] if patches is None else found


@torch.no_grad()
def per_head(maps: AllMaps, prefix: int, pool: Pool = "token", layer: int = -1) -> Tensor:
    """Attention of each head of one layer to each patch: [B, heads, N] from maps [L, B, heads, T, T].

    The class token's row, or with `pool="average"` the mean of the patches' rows.
    """
    attention = maps[layer]
    return (_reader(attention, prefix, pool)[:, None] @ attention)[:, :, 0, prefix:].cpu()


@torch.no_grad()
def from_patches(maps: AllMaps, prefix: int, layer: int, patches: Sequence[int] | None = None) -> Tensor:
    """The attention of patches, by default of all, to each patch: [B, heads, patches, N]."""
    rows = maps[layer][:, :, prefix:, prefix:]
    return (rows if patches is None else rows[:, :, list(patches)]).cpu()


def _reader(attention: Tensor, prefix: int, pool: Pool) -> Tensor:
    """Weights [B, 1, T] of the rows of [B, heads, T, T] that pooling reads."""
    images, tokens = attention.shape[0], attention.shape[-1]
    if pool == "token" and not prefix:
        raise ValueError("without a prefix there is no class token to read: use pool='average'")
    row = torch.zeros(tokens, device=attention.device)
    if pool == "token":
        row[0] = 1
    else:
        row[prefix:] = 1 / (tokens - prefix)
    return row.expand(images, 1, tokens)


def _rows(attention: Tensor, prefix: int, patches: Sequence[int]) -> Tensor:
    """Weights [B, patches, T] that are one at each patch's own token."""
    tokens = attention.shape[-1]
    if wrong := [patch for patch in patches if not 0 <= patch < tokens - prefix]:
        raise UserError(f"there is no patch {wrong[0]}: the image has patches 0 to {tokens - prefix - 1}")
    rows = torch.eye(tokens, device=attention.device)[[prefix + patch for patch in patches]]
    return rows.expand(len(attention), -1, -1)


@torch.no_grad()
def attention_distance(maps: AllMaps, grid: tuple[int, ...], patch: int) -> Tensor:
    """Mean distance in pixels between a patch and what it attends to: [L, heads] (figure 7, right).

    Distances are between centres of patches, weighted by attention and averaged over patches and images. Attention to
    prefix tokens, which have no place in the image, is left out, and the rest is normalised to one.
    """
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float() * patch
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")  # the other mode rounds zeros up
    distances = []
    for layer in range(len(maps)):
        among = maps[layer]
        prefix = among.shape[-1] - rows * columns
        among = among[..., prefix:, prefix:]
        among = among / among.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(among.dtype).tiny)
        distances.append((among * apart.to(among.device)).sum(dim=-1).mean(dim=(0, 2)).cpu())
    return torch.stack(distances)


__all__ = ["Maps", "attention_distance", "attention_maps", "from_patches", "per_head", "rollout"]
