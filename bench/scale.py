"""What an image costs: measured over 64 to 4,096 tokens on one CPU core, simulated over devices and nodes.

    OMP_NUM_THREADS=1 python bench/scale.py

**Measured**: seconds of one core for a training step (forward, backward, AdamW) of a small Vision Transformer whose
image has 64, 256, 576, 1,024, 2,304 or 4,096 patches, in rounds in turn; the fastest round of each counts. It is the
time of this process, not the clock's, so other load on the machine matters little. `operations` counts the work.

**Simulated**, for devices that nobody here has: seconds of a step of 4,096 images are those of the computation, and
those of the gradients' sum that backward cannot hide.

    computation = images per device x operations / (peak x used)
    sum         = 2 (d - 1) / d x bytes of the gradients / bandwidth of the slowest link    (ring all-reduce)
    step        = computation + max(0, sum - 2/3 computation)                               (backward is 2/3 of it)

`ASSUMED` has the numbers: they are of the kind that vendors publish, and no measurement. Loading, evaluation, slow
nodes and failures cost nothing in this formula, so it gives an upper bound.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import torch
from harness import Parser, Row, record, training_step

import vitrail
from vitrail.sizes import SIZES
from vitrail.vit import ViT, ViTConfig

PATCH = 4
ASSUMED = {
    "peak in Tflop/s": 989,
    "share of the peak that is used": 0.4,
    "devices in a node": 8,
    "bandwidth in a node in GB/s": 450,
    "bandwidth between nodes in GB/s per device": 50,
    "bytes of a gradient": 4,
    "images per step": 4096,
}
"""of an accelerator of 2022 in bf16, whose nodes are joined by 400 Gb/s per device"""
MODELS = {"S/16": 224, "B/16": 224, "L/16": 224, "L/16 at 512": 512}
"""and the height and width of their images"""


def parser() -> Parser:
    parser = Parser(__doc__, sides=[4, 8], width=32, depth=1, batch=2, rounds=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 24, 32, 48, 64], help="patches along a side")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    return parser


def main() -> None:
    args = parser().parse_args()
    rows: Row = {
        "width": args.width,
        "depth": args.depth,
        "threads": torch.get_num_threads(),
        "measured": measure(args.sides, args.width, args.depth, args.batch, args.rounds),
        "assumed": ASSUMED,
        "simulated": [simulated(name, devices) for name in MODELS for devices in (1, 8, 64, 256)],
    }
    for row in rows["measured"]:
        print(f"{row['tokens']:>5} tokens: {1000 * row['seconds per image']:.1f} ms per image")
    print(f"written to {record('scale', rows, args.results)}", file=sys.stderr)


def measure(sides: list[int], width: int, depth: int, batch: int, rounds: int) -> list[Row]:
    """Seconds of a training step per image, by the number of patches along a side."""
    steps, configs = {}, {}
    for side in sides:
        torch.manual_seed(0)
        configs[side] = ViTConfig(
            image_size=(side * PATCH, side * PATCH), patch=PATCH, width=width, depth=depth, heads=width // 32
        )
        images, labels = torch.randn(batch, 3, side * PATCH, side * PATCH), torch.arange(batch) % 10
        steps[str(side)] = training_step(vitrail.create(configs[side], classes=10), images, labels, torch.float32)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
    found = []
    for side in sides:
        seconds = min(times[str(side)]) / batch
        found.append(
            {
                "tokens": side * side,
                "seconds per image": round(seconds, 6),
                "operations per image": operations(configs[side]),
                "Gflop/s": round(operations(configs[side]) / seconds / 1e9, 2),
                "rounds": [round(each / batch, 6) for each in times[str(side)]],
            }
        )
    return found


def operations(config: ViTConfig) -> int:
    """Floating-point operations of a training step per image: 2 per weight and token, and 4 n^2 width for attention.

    Backward costs twice as much as forward. Norms, softmax and GELU are left out.
    """
    tokens = (config.image_size[0] // config.patch) * (config.image_size[1] // config.patch) + 1
    weights = config.depth * (4 + 2 * config.mlp_ratio) * config.width**2 + config.patch**2 * 3 * config.width
    return round(3 * (2 * tokens * weights + config.depth * 4 * tokens**2 * config.width))


def simulated(name: str, devices: int) -> Row:
    """Images per second of a model on so many devices, by the formula above."""
    side, size = MODELS[name], SIZES[name.partition(" ")[0]]
    config = replace(size, image_size=(side, side))
    weights = sum(parameter.numel() for parameter in _meta(config).parameters())
    images = ASSUMED["images per step"] / devices
    compute = (
        images * operations(config) / (ASSUMED["peak in Tflop/s"] * 1e12 * ASSUMED["share of the peak that is used"])
    )
    one_node = devices <= ASSUMED["devices in a node"]
    link = ASSUMED["bandwidth in a node in GB/s" if one_node else "bandwidth between nodes in GB/s per device"]
    summed = 2 * (devices - 1) / devices * weights * ASSUMED["bytes of a gradient"] / (link * 1e9)
    step = compute + max(0.0, summed - 2 / 3 * compute)
    return {
        "model": name,
        "devices": devices,
        "milliseconds of computation": round(1000 * compute, 2),
        "milliseconds of the sum": round(1000 * summed, 2),
        "images per second": round(devices * images / step),
        "share of perfect scaling": round(compute / step, 3),
    }


def _meta(config: ViTConfig) -> ViT:
    with torch.device("meta"):
        return ViT(config)


if __name__ == "__main__":
    main()
