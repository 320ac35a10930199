"""Kernels of attention, and variants of one block of ViT-B/16."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Row, in_turns, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_stages.common import TINY, Bench
from vitrail.sizes import config_for
from vitrail.vit import Block, ViTConfig

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ON_CPU = ("math", "flash")
LENGTHS = (64, 197, 192, 65, 17, 128, 196, 200, 208, 256, 257, 577)
"""tokens; N mod 128 = 64 is where cuDNN's backward pass was seen to fail (pytorch/pytorch#196678)"""
SHIFTS = (0.0, 60.0, -60.0, -120.0)
"""what all logits of a query lie around: softmax does not see it, the rounding of a kernel may"""
MASKS = ("none", "all true", "causal")


def kernels(bench: Bench) -> dict[str, SDPBackend]:
    return {name: KERNELS[name] for name in KERNELS if name in ON_CPU or not bench.tiny}


# ---- attention


def attention(bench: Bench) -> None:
    """Which kernels give finite gradients, how far they are from float64, and how fast they are.

    Every case is finite in float64. Large logits stand for training without a bound on queries and keys.
    """
    found = {name: {"cases": 0, "refused": 0, "not finite": [], "error": 0.0} for name in kernels(bench)}
    cases = itertools.product((17,) if bench.tiny else LENGTHS, MASKS, SHIFTS)
    for length, masked, shift in cases:
        if bench.left() < 12:
            break
        one_case(bench, found, length, masked, shift)
    row: Row = {"kernels": found, "milliseconds, forward and backward": speeds(bench)}
    if "cudnn" in found:
        row["cudnn passes"] = bool(found["cudnn"]["cases"]) and not found["cudnn"]["not finite"]
    bench.keep("attention", row)


def one_case(bench: Bench, found: dict[str, Any], length: int, masked: str, shift: float) -> None:
    """Count a case for every kernel; `error` is the largest relative error, without a shift."""
    x = inputs(bench, 8, 6, length, shift)
    mask = torch.ones(length, length, dtype=torch.bool, device=bench.device) if masked == "all true" else None
    exact = [y.detach().double().requires_grad_() for y in x]
    wanted = gradients(SDPBackend.MATH, exact, mask, masked == "causal")
    for name, kernel in kernels(bench).items():
        own = found[name]
        try:
            given = gradients(kernel, x, mask, masked == "causal")
        except RuntimeError:  # no kernel for this case
            own["refused"] += 1
            continue
        own["cases"] += 1
        bad = [what for what, y in zip("oqkv", given, strict=True) if not y.isfinite().all()]
        if bad:
            own["not finite"].append(f"{length} tokens, mask {masked}, shift {shift:g}: {' '.join(bad)}")
        elif not shift:
            pairs = zip(given, wanted, strict=True)
            errors = [float((y.double() - w).norm() / w.norm().clamp(min=1e-9)) for y, w in pairs]
            own["error"] = round(max(own["error"], *errors), 5)


def inputs(bench: Bench, batch: int, heads: int, length: int, shift: float = 0.0) -> list[Tensor]:
    """Queries, keys and values [B, heads, N, 64] in bf16, whose logits lie around `shift`."""
    torch.manual_seed(0)
    shape = batch, heads, length, 64
    q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3))
    q, k = q * 0.5, k * 0.5
    if shift:
        q[..., 0], k[..., 0] = 1.0, shift * 64**0.5
    return [x.requires_grad_() for x in (q, k, v)]


def gradients(kernel: SDPBackend, x: list[Tensor], mask: Tensor | None, causal: bool) -> list[Tensor]:
    """The output, and the gradients of its sum at queries, keys and values."""
    with sdpa_kernel(kernel):
        q, k, v = x
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return [out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))]


def speeds(bench: Bench) -> Row:
    """Each kernel at the shapes of the recipe `cifar10` and of ViT-B/16."""
    shapes = {"64 tokens": (512, 6, 64), "197 tokens": (256, 12, 197)}
    if bench.tiny:
        shapes = {"17 tokens": (2, 2, 17)}
    rows: Row = {}
    for place, (batch, heads, length) in shapes.items():
        x = inputs(bench, batch, heads, length)
        steps: dict[str, Callable[[], object]] = {}
        for name, kernel in kernels(bench).items():
            try:
                gradients(kernel, x, None, False)
            except RuntimeError:
                continue
            steps[name] = partial(gradients, kernel, x, None, False)
        times = in_turns(steps, bench.rounds, warm_up=2, calls=bench.calls, device=bench.device.type)
        rows[place] = {name: round(1000 * statistics.median(own), 3) for name, own in times.items()}
    return rows


# ---- one block


def block(bench: Bench) -> None:
    """One block of ViT-B/16, compiled, forward, backward and AdamW: milliseconds per 256 images, by variant.

    A step of the whole network takes about twelve times as long. Padded tokens are not masked here, which a network
    would have to do too: this is the most that padding could gain.
    """
    config = config_for("B/16", **(TINY if bench.tiny else {}))
    images, tokens = (2, 17) if bench.tiny else (256, 197)
    plain = {"tokens": tokens, "images": images, "kernel": "flash", "half": False}
    variants: dict[str, Row] = {
        "unchanged": {},
        "efficient attention": {"kernel": "efficient"},
        "cuDNN's attention": {"kernel": "cudnn"},
        "bf16 weights, fp32 masters": {"half": True},
        "200 tokens": {"tokens": 200},
        "208 tokens": {"tokens": 208},
        "256 tokens": {"tokens": 256},
        "512 images": {"images": 512},
        "1024 images": {"images": 1024},
        "unchanged, again": {},
    }
    if bench.tiny:
        variants = {"unchanged": {}, "bf16 weights, fp32 masters": {"half": True}, "20 tokens": {"tokens": 20}}
    row: Row = {}
    for name, changes in variants.items():
        if bench.left() < 10:
            row[name] = "left out: no time"
            continue
        try:
            chosen = {**plain, **changes}
            step = block_step(bench, config, **chosen)
            for _ in range(3):
                step()
            times = [seconds(step, bench.calls, bench.device.type) for _ in range(bench.rounds)]
            row[name] = round(1000 * statistics.median(times) * images / chosen["images"], 3)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row[name] = f"failed: {str(error).splitlines()[0][:80]}"
        finally:
            bench.forget()  # or the ninth variant would not be compiled
        bench.keep("block", row)


def block_step(
    bench: Bench, config: ViTConfig, tokens: int, images: int, kernel: str, half: bool
) -> Callable[[], object]:
    """A step of one block; `half` keeps its weights in bf16, and float32 copies for the optimizer."""
    net = Block(config).to(bench.device)
    masters: list[Tensor] = [p.detach().clone() if half else p for p in net.parameters()]
    net = net.bfloat16() if half else net
    own: list[Tensor] = list(net.parameters())
    # The residual stream is float32 under autocast, as in a whole network.
    dtype = torch.bfloat16 if half else torch.float32
    x, pull = (torch.randn(images, tokens, config.width, device=bench.device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    forward: Callable[[Tensor], Tensor] = net if bench.tiny else torch.compile(net, dynamic=False)

    def step() -> None:
        mixed = nullcontext() if half else torch.autocast(bench.device.type, torch.bfloat16)
        with sdpa_kernel(KERNELS[kernel]):  # it is chosen when the block is traced
            with mixed:
                out = forward(x)
            found = torch.autograd.grad(out, [*own, x], pull)
        for master, gradient in zip(masters, found, strict=False):
            master.grad = gradient.float()
        optimizer.step()
        if half:
            with torch.no_grad():
                torch._foreach_copy_(own, masters)

    return step
