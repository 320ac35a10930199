"""The largest attention logit while a recipe trains: without a bound, queries and keys grow under Muon.

    python bench/logits.py cifar10-quick --data DIR           DIR contains cifar10/ and hymenoptera/
    python bench/logits.py cifar10 --data DIR --batch-size 128
    python bench/logits.py folder --data DIR -- --no-qk-norm --qk-clip 100

Trains for `--steps` steps of the recipe's whole schedule, and looks at the logits of each layer every `EVERY` steps, on
the images of that step. Options after `--` change fields of the recipe. Rows of results/logits.json are kept by their
name: the recipe and what was changed.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from harness import Parser, Row, record, recorded

from vitrail.data.sets import open_data
from vitrail.options import parse_fields
from vitrail.recipes import RECIPES
from vitrail.train.build import build
from vitrail.train.logits import QKClip, largest_logits
from vitrail.train.optim import Optimizers, factor
from vitrail.train.run import Run, with_fields
from vitrail.train.step import LossModule, train_step

DATA = {"cifar10": "cifar10", "cifar10-quick": "cifar10", "cifar10-laptop": "cifar10", "folder": "hymenoptera"}
EVERY = 20


def parser() -> Parser:
    tiny = {"recipe": "digits", "steps": 3, "batch_size": 8}
    parser = Parser(__doc__, needs=["recipe", "data"], passes_on=True, **tiny)
    parser.add_argument("recipe", nargs="?", choices=[*DATA, "digits"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    return parser


def main() -> None:
    args = parser().parse_args()
    data = open_data(args.data / DATA[args.recipe] if args.data else "digits")
    recipe = replace(RECIPES[args.recipe](len(data.train)), compile=False)
    changes = parse_fields(recipe, args.train) | ({"batch_size": args.batch_size} if args.batch_size else {})
    run = with_fields(recipe, changes)
    rows: Row = {} if args.tiny else recorded("logits", args.results)
    name = " ".join([args.recipe, *(f"{key}={value}" for key, value in changes.items())])
    rows[name] = watched(run, data, args.steps)
    print(f"{name}: at most {max(rows[name]['largest']):.1f} in {args.steps} steps")
    record("logits", rows, args.results)


def watched(run: Run, data: Any, count: int) -> Row:
    """The largest logit of any layer every `EVERY` steps, the layers' at the end, and the seconds."""
    components, steps = build(run, data, torch.device("cpu"))
    task, began = components.task.train(), time.monotonic()
    optimizers, module = Optimizers(task, run.optim), LossModule(task)
    clip = QKClip(task, run.optim.qk_clip) if run.optim.qk_clip else None
    largest, last, skipped = [], [0.0], 0
    for step, batch in enumerate(islice(components.train.batches(), count)):
        scalars = train_step(run, module, batch, optimizers, factor(run.optim, step, steps)).read()
        if clip is not None:
            clip.after(step, batch["image"])
        skipped += not scalars["finite"]
        if step % EVERY == 0 or step == count - 1:
            last = largest_logits(task, batch["image"])
            largest.append(round(max(last), 2))
    return {
        "batch size": run.batch_size,
        "steps": count,
        "of": steps,
        "skipped": skipped,
        "every": EVERY,
        "largest": largest,
        "layers at the end": [round(value, 2) for value in last],
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    main()
