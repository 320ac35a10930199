"""One step of attention and its gradient: PyTorch's fused one, and the products and softmax that it stands for.

    OMP_NUM_THREADS=1 python bench/attention.py

Times are medians over rounds in which both come one after the other, forward and backward, with 64 channels a head.
What is above 1 in `ratio` is how many times as long the fused one takes. On a processor without bf16 of its own that
half says nothing, since nobody trains so there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from vitrail.vit import attention_weights

ROUNDS = 9
SHAPES = {
    "ViT, 4x4 patches": (192, 3, 16, 16),
    "ViT, 7x7 patches": (48, 3, 49, 49),
    "ViT, 8x8 patches and a class token": (64, 3, 65, 65),
    "ViT, 14x14 patches and a class token": (16, 3, 197, 197),
    "ViT, 24x24 patches and a class token": (4, 6, 577, 577),
    "captions, 20 words": (240, 3, 20, 20),
    "five captions over 7x7 patches": (48, 3, 100, 49),
}
"""pictures or captions, heads, queries, keys"""


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_weights(q, k) @ v


def seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], parts: list[Tensor]) -> float:
    """Forward and backward of one layer."""
    # Laid out as a layer's one product for queries, keys and values leaves them.
    q, k, v = (part.detach().requires_grad_().transpose(1, 2) for part in parts)
    start = time.perf_counter()
    attention(q, k, v).transpose(1, 2).flatten(2).sum().backward()
    return time.perf_counter() - start


def measured(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, float]:
    batch, heads, queries, keys = shape
    parts = [torch.randn(batch, tokens, heads, 64, dtype=dtype) for tokens in (queries, keys, keys)]
    times: dict[str, list[float]] = {"fused": [], "products": []}
    for _ in range(ROUNDS):
        times["fused"].append(seconds(F.scaled_dot_product_attention, parts))
        times["products"].append(seconds(products, parts))
    found = {f"{name}_ms": round(1000 * statistics.median(values[1:]), 2) for name, values in times.items()}
    return {**found, "ratio": round(found["fused_ms"] / found["products_ms"], 2)}


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = {
        str(dtype).removeprefix("torch."): {name: measured(shape, dtype) for name, shape in SHAPES.items()}
        for dtype in (torch.bfloat16, torch.float32)
    }
    record("attention", {"threads": torch.get_num_threads(), **rows})
