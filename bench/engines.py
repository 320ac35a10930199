"""The engines that run vitrail's exports beside eager PyTorch, `torch.compile` and timm: latency and images per second.

    python bench/engines.py --data DATA

All engines take turns in one run, with as many threads as PyTorch has, on a ViT with random weights and the classes of
DATA, a set with classes. int8 is calibrated on its images. Writes results/engines.json.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness import Parser, Row, in_turns, record, tiny_cifar10

import vitrail
from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.export import PRECISIONS, export
from vitrail.sizes import SIZES

Step = Callable[[torch.Tensor], Any]


def parser() -> Parser:
    parser = Parser(__doc__, needs=("data",), model="nano/2", rounds=2, batches=[1, 2], images=4)
    parser.add_argument("--data", help="a set with classes")
    parser.add_argument("--model", default="B/16", help="a size of vitrail")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=200, help="scored for the accuracy of each export")
    parser.set_defaults(rounds=15)
    return parser


def engines(folder: Path, data: str, model: str, images: int) -> Iterator[tuple[str, Step, Row]]:
    """The name, the function and what its export told, of every engine that is installed."""
    classes = open_data(data).train.classes
    task = vitrail.create(model, classes=classes).eval()
    task.save(folder / "source")
    yield "vitrail eager", task, {}
    yield "vitrail compiled", torch.compile(task), {}
    for to, precisions in PRECISIONS.items():
        for precision in precisions:
            out = folder / f"{to}-{precision}"
            try:
                result = export(folder / "source", out, to, precision, data, images=images)
            except UserError as error:
                print(f"{to} {precision}: {error}")
                continue
            yield f"{to} {precision}", vitrail.load(out), result.as_row()
    if find_spec("timm") and (name := TIMM.get(model)):
        import timm

        peer = timm.create_model(name, num_classes=len(classes)).eval()
        yield "timm eager", peer, {}
        yield "timm compiled", torch.compile(peer), {}


TIMM = {"Ti/16": "vit_tiny_patch16_224", "S/16": "vit_small_patch16_224", "B/16": "vit_base_patch16_224"}
"""timm's names of the same networks"""


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
        found = list(engines(folder, data, args.model, args.images))
        rows: Row = {}
        compared: Row = {}
        for batch in args.batches:
            x = torch.randn(batch, 3, *SIZES[args.model].image_size)
            steps = {engine: partial(step, x) for engine, step, _ in found}
            medians: dict[str, float] = {}
            for engine, times in in_turns(steps, args.rounds, warm_up=3).items():
                median = medians[engine] = statistics.median(times)
                spread = statistics.stdev(times) if len(times) > 1 else 0.0
                rows[f"{engine}, batch {batch}"] = {
                    "milliseconds": round(1000 * median, 3),
                    "spread": round(1000 * spread, 3),
                    "images_per_second": round(batch / median, 2),
                }
            compared[f"batch {batch}"] = ratios(medians)
        told = ("difference", "relative_difference", "scores")
        exports = {engine: {key: row[key] for key in told} for engine, _, row in found if row}
        print(*(f"{engine}: {row['milliseconds']} ms" for engine, row in rows.items()), compared, sep="\n")
        record(
            "engines",
            {"model": args.model, "threads": torch.get_num_threads(), **rows, "ratios": compared, "exports": exports},
            args.results,
        )


if __name__ == "__main__":
    main()
