"""One training step of a small ViT against timm's same model: python bench/training_step.py [--device cuda].

Width 192, depth 9, 3 heads, patch 4 on 32x32, batch 128, bf16 autocast and fused AdamW, eager and compiled. The
variants take turns within one process, so what else the machine does falls on all of them; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from record import record
from torch import Tensor, nn

import vitrail


def timm_model() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=9, num_heads=3, num_classes=10
    )


def vitrail_model() -> nn.Module:
    return vitrail.create("mini/4", classes=10)


def stepper(model: nn.Module, compiled: bool, precision: torch.dtype, batch: int, device: str) -> Callable[[], float]:
    """A function that makes one step and returns its seconds."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if compiled else model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (batch,), generator=generator).to(device)

    def step() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            loss: Tensor = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    rows: dict[str, object] = {}
    for name, precision in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        steps = {
            f"{library} {mode}": stepper(make(), mode == "compiled", precision, options.batch, options.device)
            for library, make in (("timm", timm_model), ("vitrail", vitrail_model))
            for mode in ("eager", "compiled")
        }
        for step in steps.values():
            step(), step()
        seconds: dict[str, list[float]] = {variant: [] for variant in steps}
        for _ in range(options.rounds):
            for variant, step in steps.items():
                seconds[variant].append(step())
        medians = {variant: statistics.median(times) for variant, times in seconds.items()}
        best = {lib: min(v for k, v in medians.items() if k.startswith(lib)) for lib in ("timm", "vitrail")}
        rows[name] = {
            "milliseconds": {variant: round(1000 * value, 1) for variant, value in medians.items()},
            "spread": {v: round(1000 * (max(t) - min(t)), 1) for v, t in seconds.items()},
        }
        rows[f"{name}, best of timm / best of vitrail"] = round(best["timm"] / best["vitrail"], 3)
        print(name, rows[name], flush=True)
    record("training-step", {"device": options.device, "batch": options.batch, **rows})


if __name__ == "__main__":
    main()
