"""One training step of a small ViT against timm's same model: python bench/training_step.py [--device cuda].

Width 192, depth 9, 3 heads, patch 4 on 32x32, batch 128, bf16 autocast and fused AdamW, eager and compiled. The
variants take turns within one process, so what else the machine does falls on all of them; medians are compared.
`--tiny` has two images and one block, and compiles without a compiler.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Parser, Row, in_turns, record
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitrail


def parser() -> Parser:
    parser = Parser(__doc__, rounds=2, batch=2, depth=1, backend="eager")
    parser.set_defaults(depth=9, backend="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=128)
    return parser


def main() -> None:
    asked = parser().parse_args()
    assert parameters(timm_model(asked.depth)) == parameters(vitrail_model(asked.depth)), "not the same model"
    rows: Row = {"device": asked.device, "batch": asked.batch}
    for name, precision in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        steps = {
            f"{library} {mode}": stepper(
                make(asked.depth), asked.backend if mode == "compiled" else None, precision, asked.batch, asked.device
            )
            for library, make in (("timm", timm_model), ("vitrail", vitrail_model))
            for mode in ("eager", "compiled")
        }
        times = in_turns(steps, asked.rounds, warm_up=2, device=asked.device)
        medians = {variant: statistics.median(readings) for variant, readings in times.items()}
        best = {lib: min(v for k, v in medians.items() if k.startswith(lib)) for lib in ("timm", "vitrail")}
        rows[name] = {
            "milliseconds": {variant: round(1000 * value, 1) for variant, value in medians.items()},
            "spread": {v: round(1000 * (max(t) - min(t)), 1) for v, t in times.items()},
        }
        rows[f"{name}, best of timm / best of vitrail"] = round(best["timm"] / best["vitrail"], 3)
        print(name, rows[name], flush=True)
    record("training-step", rows, asked.results)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def timm_model(depth: int) -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=depth, num_heads=3, num_classes=10)


def vitrail_model(depth: int) -> nn.Module:
    return vitrail.create("mini/4", classes=10, depth=depth)


def stepper(
    model: nn.Module, backend: str | None, precision: torch.dtype, batch: int, device: str
) -> Callable[[], None]:
    """A function that makes one step, compiled where a backend is given."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, backend=backend) if backend else model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (batch,), generator=generator).to(device)

    def step() -> None:
        with torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
