"""Mimetic initialisation: attention like that of trained transformers, for small data (arXiv 2305.09828)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.vit import Attention


@torch.no_grad()
def mimetic_init(model: nn.Module) -> None:
    """Initialise every attention in `model` (equations 3 to 8).

    Each head's query-key product is near the identity, so that a token first attends to similar tokens; the
    value-output product is near minus the identity.

    Raises:
        UserError: keys have fewer heads than queries, so there is no such product per head.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            if len(module.qkv.weight) != 3 * len(module.out.weight):
                raise UserError(
                    "attention_init='mimetic' cannot be combined with kv_heads: add --attention-init xavier"
                )
            _start(module.qkv, module.out, module.heads)


def _start(qkv: nn.Linear, out: nn.Linear, heads: int) -> None:
    """`qkv` is [3D, D] and `out` [D, D]."""
    width = out.weight.shape[0]
    per_head = width // heads
    query, key, value = qkv.weight.chunk(3)
    for head in range(heads):
        rows = slice(head * per_head, (head + 1) * per_head)
        left, right = _halves(_near_identity(width, noise=0.7, identity=0.7), per_head)
        query[rows], key[rows] = left.T, right
    left, right = _halves(_near_identity(width, noise=0.4, identity=-0.4), width)
    out.weight.copy_(left)
    value.copy_(right)


def _near_identity(width: int, noise: float, identity: float) -> Tensor:
    return noise * torch.randn(width, width) / width**0.5 + identity * torch.eye(width)


def _halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[D, rank] and [rank, D] whose product is the best approximation of `matrix` of that rank."""
    u, s, v = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
