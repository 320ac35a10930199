"""The cost of saved states: training steps of `cifar10-quick` with a state saved every 50 steps, and without.

    python bench/checkpoints.py [--rounds 3] [--every 50] [--tiny]

Both make the same number of steps per round, in turns, with the components of `vitrail train`. A round with a state
ends when the state is on the disk, so that work beside the training counts in full. Time is that of the processor,
which other work on the machine disturbs less, and that of the clock. `--tiny` trains on the digits.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Parser, Row, record

from vitrail.data.sets import open_data
from vitrail.recipes import find
from vitrail.train.build import build
from vitrail.train.folder import RunFolder
from vitrail.train.keep import Keeper
from vitrail.train.optim import Optimizers
from vitrail.train.step import LossModule, train_step


def parser() -> Parser:
    parser = Parser(__doc__, rounds=1, every=5, recipe="digits")
    parser.set_defaults(recipe="cifar10-quick")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=50, help="steps between states")
    return parser


def main() -> None:
    args = parser().parse_args()
    recipe = find(args.recipe)
    splits = open_data(recipe(1).data)
    run = replace(recipe(len(splits.train)), save_every=args.every)
    components, _ = build(run, splits, torch.device("cpu"))
    task, batches = components.task.train(), components.train.batches()
    optimizers, module = Optimizers(task, run.optim), LossModule(task)
    names = ("with states", "without")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        keeper, done, held_up = Keeper(run, task, RunFolder(Path(place)), optimizers, None), 0, []

        def steps(saving: bool) -> None:
            nonlocal done
            for _ in range(args.every):
                batch = next(batches)
                if run.early_shape is not None:  # as in most of the steps, and the shortest ones
                    batch["image"] = F.interpolate(batch["image"], run.early_shape, mode="bilinear", antialias=True)
                train_step(run, module, batch, optimizers, 1.0)
                done += 1
            if saving:
                began = time.perf_counter()
                keeper.save(done, {})
                held_up.append(time.perf_counter() - began)
                keeper.wait()

        steps(saving=True)  # to warm up
        for _ in range(args.rounds):
            for name in names:
                began = time.process_time(), time.perf_counter()
                steps(saving=name == names[0])
                times[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
        size = sum(file.stat().st_size for file in Path(place, "state").iterdir()) / run.keep
    rows: Row = {
        "recipe": args.recipe,
        "steps between states": args.every,
        "megabytes of a state": round(size / 1e6, 1),
    }
    for k, clock in enumerate(("processor", "clock")):
        each = {name: [pair[k] for pair in pairs] for name, pairs in times.items()}
        ratio = statistics.median(a / b for a, b in zip(*each.values(), strict=True))
        rows[f"seconds of the {clock}"] = {name: [round(value, 3) for value in values] for name, values in each.items()}
        rows[f"with states / without, {clock}"] = round(ratio, 4)
    rows["seconds that a save holds up the training"] = round(statistics.median(held_up), 4)
    print(json.dumps(rows))
    print(f"written to {record('checkpoints', rows, args.results)}", file=sys.stderr)


if __name__ == "__main__":
    main()
