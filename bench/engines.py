"""The engines that run vitrail's exports beside eager PyTorch, `torch.compile` and timm: latency and images per second.

    python bench/engines.py --data DATA

All engines take turns in one run, with as many threads as PyTorch has, on a ViT with random weights and the classes of
DATA, a set with classes. int8 is calibrated on its images. timm's network of the same size runs eager, compiled, and in
ONNX Runtime and OpenVINO without vitrail (`peers/engines.py`). Writes results/engines.json.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from harness import Parser, Row, in_turns, record, tiny_cifar10
from peers.engines import Step, steps
from torch import nn

import vitrail
from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.export import PRECISIONS, export
from vitrail.export.scores import calibration_images
from vitrail.sizes import SIZES

TIMM = {"Ti/16": "vit_tiny_patch16_224", "S/16": "vit_small_patch16_224", "B/16": "vit_base_patch16_224"}
"""timm's names of the same networks"""


def parser() -> Parser:
    parser = Parser(__doc__, needs=("data",), model="nano/2", rounds=2, batches=[1, 2], images=4)
    parser.add_argument("--data", help="a set with classes")
    parser.add_argument("--model", default="B/16", help="a size of vitrail")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=200, help="scored for the accuracy of each export")
    parser.set_defaults(rounds=15)
    return parser


def exports(folder: Path, data: str, images: int) -> Iterator[tuple[str, Callable[..., Any], Row]]:
    """The name, the model and what its export told, of every export of the model in `folder`/source."""
    for to, precisions in PRECISIONS.items():
        for precision in precisions:
            out = folder / f"{to}-{precision}"
            try:
                result = export(folder / "source", out, to, precision, data, images=images)
            except UserError as error:
                print(f"{to} {precision}: {error}")
                continue
            yield f"{to} {precision}", vitrail.load(out), result.as_row()


def eager_and_compiled(library: str, network: nn.Module) -> dict[str, Callable[..., Any]]:
    return {f"{library} eager": network, f"{library} compiled": torch.compile(network)}


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
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        data = args.data or str(tiny_cifar10(folder / "tiny"))
        classes = open_data(data).train.classes
        task = vitrail.create(args.model, classes=classes).eval()
        task.save(folder / "source")
        told: Row = {}
        models = eager_and_compiled("vitrail", task)
        for engine, model, row in exports(folder, data, args.images):
            models[engine] = model
            told[engine] = {key: row[key] for key in ("difference", "relative_difference", "scores")}
        peer = None
        if args.model in TIMM:
            peer = timm.create_model(TIMM[args.model], num_classes=len(classes)).eval()
            models |= eager_and_compiled("timm", peer)
        rows: Row = {}
        compared: Row = {}
        for batch in args.batches:
            x = torch.randn(batch, 3, *SIZES[args.model].image_size)
            found: dict[str, Step] = {engine: partial(model, x) for engine, model in models.items()}
            if peer is not None:
                found |= steps(peer, x, calibration_images(task, data)[: args.images])
            medians: dict[str, float] = {}
            for engine, times in in_turns(found, args.rounds, warm_up=3).items():
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
        record("engines", {**shared, **rows, "ratios": compared, "exports": told}, args.results)


if __name__ == "__main__":
    main()
