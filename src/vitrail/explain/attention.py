"""What the encoder attends to: the attention matrices, and what follows from them.

Shapes are those of `vit.py`, and L layers, and T = P + N tokens: the prefix, then the patches row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.variants.attention import VariantAttention
from vitrail.variants.place import Place
from vitrail.vit import Attention, ViT, attention_weights

Pool = Literal["token", "average"]


def encoder_of(task: nn.Module) -> ViT:
    """The Vision Transformer inside a task; a model without one is a UserError that names it."""
    encoder = getattr(task, "encoder", None)
    if isinstance(encoder, ViT):
        return encoder
    found = type(encoder if isinstance(encoder, nn.Module) else task).__name__
    raise UserError(f"explain reads the attention of a Vision Transformer, and this model is a {found}: choose a ViT")


@torch.no_grad()
def attention_maps(task: nn.Module, images: Tensor) -> Tensor:
    """The attention matrices (equation 6) for normalised images [B, C, H, W].

    They are [L, B, heads, T, T], float32, on the CPU. Row i holds what token i takes from every token, and sums to one.
    Fused attention never forms these matrices, so hooks compute each again from the layer's input, one layer at a time
    on the model's device. The model is left as it was.
    """
    encoder = encoder_of(task)
    layers = [module for module in encoder.blocks.modules() if isinstance(module, Attention)]
    maps: list[Tensor] = []

    def record(layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weights = layer_weights(layer, *args, **kwargs)
        if not maps:  # all layers in one tensor from the start: a stack at the end would hold everything twice
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
    """Evaluation mode, without dropout or moving averages; then each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def rollout(maps: Tensor, prefix: int, pool: Pool = "token") -> Tensor:
    """How much of each patch reaches the image's vector: [B, N] from maps [L, B, heads, T, T] (appendix D.8).

    Attention rollout (arXiv 2005.00928): the mean over the heads, plus the identity for the residual path, each row
    scaled to one, multiplied through the layers. Read in the class token's row, or with `pool="average"` as the mean of
    the patches' rows. The sum over N is one less what stays with the `prefix` tokens.
    """
    row = _reader(maps, prefix, pool)
    for attention in maps.flip(0):
        mixed = attention.mean(dim=1) + torch.eye(maps.shape[-1])
        # Only one row of the product is read, so a vector goes through the layers, last one first.
        row = row @ (mixed / mixed.sum(dim=-1, keepdim=True))
    return row[:, 0, prefix:]


def per_head(maps: Tensor, prefix: int, pool: Pool = "token", layer: int = -1) -> Tensor:
    """What each head of one layer takes from each patch: [B, heads, N] from maps [L, B, heads, T, T].

    The class token's row, or with `pool="average"` the mean of the patches' rows.
    """
    attention = maps[layer]
    rows = _reader(maps, prefix, pool)[:, None] @ attention
    return rows[:, :, 0, prefix:]


def _reader(maps: Tensor, prefix: int, pool: Pool) -> Tensor:
    """Weights [B, 1, T] of the rows that the pooling reads."""
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

    Distances are between centres of patches, weighted by attention and averaged over patches and images. What goes to
    prefix tokens, which have no place, is left out and the rest scaled to one.
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
