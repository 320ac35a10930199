"""One training step of a small ViT against the same model in timm: python bench/training_step.py [--device cuda].

Width 192, depth 9, 3 heads, patch 4 on 32x32, batch 128, bf16 autocast and fused AdamW, eager and compiled. The
variants alternate within one process, so other load on the machine affects all equally; medians are compared.
`--tiny` uses two images and one block, and compiles with the backend `eager`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from harness import Parser, Row, in_turns, record, training_step
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitrail


def parser() -> Parser:
    parser = Parser(__doc__, rounds=2, batch=2, depth=1, backend="eager")
    parser.set_defaults(depth=9, backend="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=128)
    return parser


def main() -> None:
    args = parser().parse_args()
    assert parameters(timm_model(args.depth)) == parameters(vitrail_model(args.depth)), "not the same model"
    rows: Row = {"device": args.device, "batch": args.batch}
    for name, precision in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        steps = {
            f"{library} {mode}": stepper(
                make(args.depth), args.backend if mode == "compiled" else None, precision, args.batch, args.device
            )
            for library, make in (("timm", timm_model), ("vitrail", vitrail_model))
            for mode in ("eager", "compiled")
        }
        times = in_turns(steps, args.rounds, warm_up=2, device=args.device)
        medians = {variant: statistics.median(readings) for variant, readings in times.items()}
        best = {lib: min(v for k, v in medians.items() if k.startswith(lib)) for lib in ("timm", "vitrail")}
        rows[name] = {
            "milliseconds": {variant: round(1000 * value, 1) for variant, value in medians.items()},
            "spread": {v: round(1000 * (max(t) - min(t)), 1) for v, t in times.items()},
        }
        rows[f"{name}, best of timm / best of vitrail"] = round(best["timm"] / best["vitrail"], 3)
        print(name, rows[name], flush=True)
    record("training-step", rows, args.results)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def timm_model(depth: int) -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=depth, num_heads=3, num_classes=10)


def vitrail_model(depth: int) -> nn.Module:
    return vitrail.create("mini/4", classes=10, depth=depth)


def stepper(
    model: nn.Module, backend: str | None, precision: torch.dtype, batch: int, device: str
) -> Callable[[], None]:
    """The training step of a model on random images, compiled if a backend is given."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (batch,), generator=generator).to(device)
    return training_step(model.to(device), images, labels, precision, backend)


if __name__ == "__main__":
    main()
