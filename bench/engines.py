"""The engines that run vitrail's exports beside eager PyTorch, `torch.compile` and timm: latency and images per second.

    python bench/engines.py

All engines take turns in one run, with as many threads as PyTorch has, on a ViT with random weights. So this is about
speed alone: `bench/exports.py` compares exports with their models. timm's network of the same size runs eager,
compiled, and in ONNX Runtime and OpenVINO without vitrail (`peers/engines.py`). Every graph is for images of the
model's own size, as one that `vitrail export --sizes` writes. Writes results/engines.json.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from harness import Parser, Row, in_turns, record
from peers.engines import Step, steps
from torch import Tensor, nn

import vitrail
from vitrail.errors import UserError
from vitrail.export import PRECISIONS, engine_for
from vitrail.export.proof import normalised_noise
from vitrail.tasks.task import Task

TIMM = {"Ti/16": "vit_tiny_patch16_224", "S/16": "vit_small_patch16_224", "B/16": "vit_base_patch16_224"}
"""timm's names of the same networks"""


def parser() -> Parser:
    parser = Parser(__doc__, model="nano/2", rounds=2, batches=[1, 2], images=4)
    parser.add_argument("--model", default="B/16", help="a size of vitrail")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=16, help="of noise, on which int8 is calibrated")
    parser.add_argument("--rounds", type=int, default=11)
    return parser


def exports(task: Task, folder: Path, images: Sequence[Tensor]) -> dict[str, Callable[..., Any]]:
    """Every export of the model, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for to, precisions in PRECISIONS.items():
        for precision in precisions:
            # The head of a new model is zero, so no layer goes back from int8 to float32 for what it loses.
            calibration = (lambda: list(images)) if precision == "int8" else None
            place = folder / f"{to}-{precision}"
            try:
                engine = engine_for(task, place, to, precision, task.preprocess.size, calibration)
            except UserError as error:
                print(f"{to} {precision}: {error}")
                continue
            found[f"{to} {precision}"] = engine
    return found


def eager_and_compiled(library: str, network: nn.Module) -> dict[str, Callable[..., Any]]:
    return {f"{library} eager": network, f"{library} compiled": torch.compile(network, dynamic=False)}


def ratios(milliseconds: dict[str, float]) -> Row:
    """The best engine of vitrail beside the fastest of all and timm's eager network, by their times for one batch."""
    best, fastest = (min(names, key=milliseconds.__getitem__) for names in (own(milliseconds), milliseconds))
    found: Row = {"best": best, "fastest": fastest, "slower by": milliseconds[best] / milliseconds[fastest] - 1}
    eager = milliseconds.get("timm eager", milliseconds["vitrail eager"])
    return {**found, "times as fast as eager": eager / milliseconds[best]}


def own(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("timm")]


def main() -> None:
    args = parser().parse_args()
    task = vitrail.create(args.model, classes=1000).eval()
    peer = timm.create_model(TIMM[args.model]).eval() if args.model in TIMM else None
    size = task.preprocess.size
    images = [normalised_noise(task, 1, size, seed) for seed in range(args.images)]
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        models = {**eager_and_compiled("vitrail", task), **exports(task, Path(place), images)}
        models |= {} if peer is None else eager_and_compiled("timm", peer)
        rows: Row = {}
        compared: Row = {}
        for batch in args.batches:
            x = normalised_noise(task, batch, size)
            found: dict[str, Step] = {engine: partial(model, x) for engine, model in models.items()}
            if peer is not None:
                found |= steps(peer, x, images)
            medians: dict[str, float] = {}
            for engine, times in in_turns(found, args.rounds, warm_up=2).items():
                median = medians[engine] = statistics.median(times)
                spread = statistics.stdev(times) if len(times) > 1 else 0.0
                rows[f"{engine}, batch {batch}"] = {
                    "milliseconds": round(1000 * median, 3),
                    "spread": round(1000 * spread, 3),
                    "images_per_second": round(batch / median, 2),
                }
            compared[f"batch {batch}"] = ratios(medians)
        print(*(f"{engine}: {row['milliseconds']} ms" for engine, row in rows.items()), compared, sep="\n")
        shared = {"model": args.model, "threads": torch.get_num_threads()}
        record("engines", {**shared, **rows, "ratios": compared}, args.results)


if __name__ == "__main__":
    main()
