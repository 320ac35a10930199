"""Attention from queries, keys and values; other ways to gather values than one softmax; how attention may start."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_TOKENS = 256
"""of which A is formed to learn faster; of more it takes much memory, and hardly less time"""


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Equation 6: the matrix A [B, heads, N, M] of queries [B, heads, N, d] and keys [B, heads, M, d].

    `mask` is broadcast to A: False (or a large negative number) hides a key from a query.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Equation 7: what each query gathers of the values [B, heads, M, d], [B, heads, N, d].

    This is PyTorch's fused attention, which never forms A, but where a processor trains in bf16: for few tokens that
    takes three to four times as long as the products it stands for (results/attention.json). With a mask it is fused.
    """
    learns = torch.is_grad_enabled() and q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if not learns or attn_mask is not None or max(q.shape[-2], k.shape[-2]) > MOST_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    before = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril() if is_causal else None
    return attention_weights(q, k, before) @ v


class Differential(nn.Module):
    """The difference of two attentions, each on half of every head's channels (arXiv 2410.05258)."""

    def __init__(self, per_head: int, index: int) -> None:
        """`index` is the number of the block: later ones start with a larger share of the second attention."""
        super().__init__()
        self.start = 0.8 - 0.6 * math.exp(-0.3 * index)
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(0.1 * torch.randn(per_head // 2)) for _ in range(4))
        self.norm = nn.RMSNorm(per_head, eps=1e-5)

    def share(self) -> Tensor:
        """The factor on the second attention (lambda, equation 2 of its paper)."""
        return (self.q1 * self.k1).sum().exp() - (self.q2 * self.k2).sum().exp() + self.start

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        """[B, heads, N, d] from queries, keys and values, as PyTorch's own attention."""
        first, second = (
            attend(a, b, v, attn_mask) for a, b in zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        )
        return self.norm(first - self.share().to(q.dtype) * second) * (1 - self.start)


@torch.no_grad()
def mimetic_init(qkv: nn.Linear, out: nn.Linear, heads: int) -> None:
    """Start attention as trained transformers have it (arXiv 2305.09828, equations 3 to 8).

    Each head's query-key product is near the identity, so a token first looks at what resembles it; the value-output
    product is near minus the identity. `qkv` is [3D, D] and `out` [D, D].
    """
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
