"""The encoder's attention: the attention matrices, and statistics of them.

Shapes are those of `vit.py`, with L layers and T = P + N tokens: the prefix, then the patches row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.tasks.exported import ExportedEncoder, refuse
from vitrail.variants.attention import VariantAttention
from vitrail.variants.place import Place
from vitrail.vit import Attention, ViT, attention_weights

Pool = Literal["token", "average"]


def encoder_of(task: nn.Module) -> ViT:
    """The Vision Transformer inside a task; UserError, which names the model, if there is none."""
    encoder = getattr(task, "encoder", None)
    if isinstance(encoder, ViT):
        if getattr(encoder.config, "merge", ()):
            raise UserError("this model merges tokens, so its attention is not between patches: load it with merge 0")
        return encoder
    if isinstance(encoder, ExportedEncoder):
        refuse(encoder.made_from)
    found = type(encoder if isinstance(encoder, nn.Module) else task).__name__
    raise UserError(f"explain reads the attention of a Vision Transformer, and this model is a {found}: choose a ViT")


@torch.no_grad()
def attention_maps(task: nn.Module, images: Tensor) -> Tensor:
    """The attention matrices (equation 6) for normalised images [B, C, H, W].

    They are [L, B, heads, T, T], float32, on the CPU. Row i is the attention of token i to every token, and sums to
    one. Fused attention never computes these matrices, so hooks compute each again from the layer's input, one layer at
    a time, on the model's device. The model is left unchanged.
    """
    encoder = encoder_of(task)
    layers = [module for module in encoder.blocks.modules() if isinstance(module, Attention)]
    maps: list[Tensor] = []

    def record(layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weights = layer_weights(layer, *args, **kwargs)
        if not maps:  # allocate all layers at once: stacking at the end would need twice the memory
            maps.append(torch.empty(len(layers), *weights.shape))
        maps[0][seen.pop(layer)] = weights.float().cpu()

    seen = {layer: index for index, layer in enumerate(layers)}
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    weight = encoder.patches.projection.weight
    try:
        with _evaluating(encoder):
            encoder(images.to(weight.device, weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return maps[0]


def layer_weights(layer: Attention, x: Tensor, place: Place | None = None) -> Tensor:
    """The matrix A of one layer's attention (equation 6), [B, heads, T, T], for the tokens [B, T, D] that it reads."""
    if isinstance(layer, VariantAttention):
        return layer.weights(x, place=place)
    q, k, _ = layer.project(x)
    return attention_weights(q, k)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, without dropout or moving averages; afterwards restore each module's own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def rollout(maps: Tensor, prefix: int, pool: Pool = "token") -> Tensor:
    """The contribution of each patch to the pooled vector: [B, N] from maps [L, B, heads, T, T] (appendix D.8).

    Attention rollout (arXiv 2005.00928): the mean over the heads, plus the identity for the residual path, each row
    normalised to one, multiplied over the layers. The result is the class token's row, or with `pool="average"` the
    mean of the patches' rows. Its sum over N is one minus the contribution of the `prefix` tokens.
    """
    row = _reader(maps, prefix, pool)
    for attention in maps.flip(0):
        mixed = attention.mean(dim=1) + torch.eye(maps.shape[-1])
        # Only one row of the product is needed, so a vector is multiplied through the layers, last one first.
        row = row @ (mixed / mixed.sum(dim=-1, keepdim=True))
    return row[:, 0, prefix:]


def per_head(maps: Tensor, prefix: int, pool: Pool = "token", layer: int = -1) -> Tensor:
    """Attention of each head of one layer to each patch: [B, heads, N] from maps [L, B, heads, T, T].

    The class token's row, or with `pool="average"` the mean of the patches' rows.
    """
    attention = maps[layer]
    rows = _reader(maps, prefix, pool)[:, None] @ attention
    return rows[:, :, 0, prefix:]


def _reader(maps: Tensor, prefix: int, pool: Pool) -> Tensor:
    """Weights [B, 1, T] of the rows that pooling reads."""
    images, tokens = maps.shape[1], maps.shape[-1]
    if pool == "token" and not prefix:
        raise ValueError("without a prefix there is no class token to read: use pool='average'")
    row = torch.zeros(tokens)
    if pool == "token":
        row[0] = 1
    else:
        row[prefix:] = 1 / (tokens - prefix)
    return row.expand(images, 1, tokens)


def attention_distance(maps: Tensor, grid: tuple[int, ...], patch: int) -> Tensor:
    """Mean distance in pixels between a patch and what it attends to: [L, heads] (figure 7, right).

    Distances are between centres of patches, weighted by attention and averaged over patches and images. Attention to
    prefix tokens, which have no place in the image, is left out, and the rest is normalised to one.
    """
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float() * patch
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")  # the other mode rounds zeros up
    prefix = maps.shape[-1] - rows * columns
    distances = []
    for attention in maps:
        among = attention[..., prefix:, prefix:]
        among = among / among.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(among.dtype).tiny)
        distances.append((among * apart).sum(dim=-1).mean(dim=(0, 2)))
    return torch.stack(distances)
