"""One step of attention and its gradient: PyTorch's fused kernel against explicit products and softmax.

    OMP_NUM_THREADS=1 python bench/attention.py

Times are medians over rounds in which the two alternate, forward and backward, with 64 channels per head. `ratio` is
the time of the fused kernel divided by that of the products. Ignore the bf16 rows of a CPU without native bf16, since
nobody trains in bf16 there. Both ways must give the same values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import Parser, Row, in_turns, record
from torch import Tensor

from vitrail.vit import attention_weights

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SHAPES = {
    "ViT, 4x4 patches": (192, 3, 16, 16),
    "ViT, 7x7 patches": (48, 3, 49, 49),
    "ViT, 8x8 patches and a class token": (64, 3, 65, 65),
    "ViT, 14x14 patches and a class token": (16, 3, 197, 197),
    "ViT, 24x24 patches and a class token": (4, 6, 577, 577),
    "captions, 20 words": (240, 3, 20, 20),
    "five captions over 7x7 patches": (48, 3, 100, 49),
}
"""images or captions, heads, queries, keys"""


def parser() -> Parser:
    parser = Parser(__doc__, shapes={"tiny": (2, 2, 5, 3)}, rounds=2)
    parser.set_defaults(shapes=SHAPES, rounds=8)
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.manual_seed(0)
    rows: Row = {"threads": torch.get_num_threads()}
    for dtype in (torch.bfloat16, torch.float32):
        found = {name: measured(shape, dtype, args.rounds) for name, shape in args.shapes.items()}
        rows[str(dtype).removeprefix("torch.")] = found
    record("attention", rows, args.results)


def measured(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    batch, heads, queries, keys = shape
    # The memory layout that a layer's joint projection of queries, keys and values gives.
    leaves = [torch.randn(batch, tokens, heads, 64, dtype=dtype).requires_grad_() for tokens in (queries, keys, keys)]

    def forward(attention: Attention) -> Tensor:
        return attention(*(leaf.transpose(1, 2) for leaf in leaves)).transpose(1, 2).flatten(2)

    def step(attention: Attention) -> None:
        torch.autograd.grad(forward(attention).sum(), leaves)

    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(forward(fused), forward(products), rtol=tolerance, atol=tolerance)
    times = in_turns({"fused": partial(step, fused), "products": partial(step, products)}, rounds)
    found = {f"{name}_ms": round(1000 * statistics.median(seconds), 2) for name, seconds in times.items()}
    return {**found, "ratio": round(found["fused_ms"] / found["products_ms"], 2)}


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_weights(q, k) @ v


if __name__ == "__main__":
    main()
