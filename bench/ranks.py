"""Training in 2 and 4 processes against one: python bench/ranks.py [--steps 20] [--tiny]

Small models of several tasks are trained by one process, then by several that each hold all weights, then by several
that share them out (FSDP2), on the CPU. Compared are the images of each step, the losses, the scores of the same
weights, and the losses of a run that one layout began and another one continues.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from harness import ROOT, Parser, Row, record

from vitrail.baselines.cnn import ResNetConfig
from vitrail.data.augment import Augment
from vitrail.data.masks import Masks
from vitrail.data.sets import ImageSet, Splits, open_data
from vitrail.data.targets import Texts
from vitrail.errors import Stopped
from vitrail.tasks.caption import Captioning
from vitrail.tasks.segment import Segmentation
from vitrail.train import loop
from vitrail.train.build import build
from vitrail.train.folder import Follower, RunFolder
from vitrail.train.loop import evaluate, fit
from vitrail.train.optim import Optim
from vitrail.train.parallel import World
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, train_step
from vitrail.vit import ViTConfig

sys.path.insert(0, str(ROOT / "tests"))
from processes import in_ranks

VIT = ViTConfig(32, 3, 2, 4, (8, 8), drop_path=0.1)
ADAMW = Optim("adamw", lr=1e-3, ema=0.9, clip=1.0)
MUON = Optim("muon", lr=1e-3, muon_lr=1e-3, ema=0.9, clip=1.0)
MOST = 1e-3
"""largest relative difference of a loss that still is rounding; the scores of the same weights must be equal"""


EVALUATED = 16
"""images of a batch in evaluation: of larger ones there would be one, and so one process would score all images"""


class Told(NamedTuple):
    """What a run, or one rank of it, tells of itself."""

    samples: list[list[int]]
    losses: list[float]
    scores: dict[str, Any]
    """of the first weights on the validation split"""


def digits() -> Splits:
    splits = open_data("digits")
    return Splits(splits.train.spread(400), splits.train.spread(200))


def colours(target: Callable[[int], Any]) -> Splits:
    """Random images with what `target` makes for so many."""
    generator, count = torch.Generator().manual_seed(0), 160
    images = [torch.randint(0, 255, (3, 8, 8), generator=generator).to(torch.uint8) for _ in range(count)]
    every = ImageSet("colours", [str(i) for i in range(count)], images, target(count))
    return Splits(every.subset(range(120)), every.subset(range(120, count)))


def captions() -> Splits:
    return colours(lambda count: Texts([[" ".join(["a red dog"] * (1 + i % 3))] * (1 + i % 2) for i in range(count)]))


def masks() -> Splits:
    def made(count: int) -> Masks:
        generator = torch.Generator().manual_seed(1)
        each = [torch.randint(0, 3, (8, 8), generator=generator).to(torch.uint8) for _ in range(count)]
        return Masks(each, [str(i) for i in range(count)], ["sky", "road", "tree"])

    return colours(made)


def run_of(**changes: Any) -> Run:
    mixed = Augment(crop="shift", shift=1, flip=True, mixup=0.3, erase=0.2)
    plain = {
        "recipe": "ranks",
        "data": "ranks",
        "batch_size": 32,
        "workers": 0,
        "precision": "fp32",
        "eval_every": 100.0,
    }
    values = {"model": replace(VIT, channels=1), "augment": mixed, "optim": ADAMW, "accumulate": 2}
    return Run(**(plain | values | changes))  # type: ignore[arg-type]


SMALL: dict[str, Any] = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2, "decoder_dropout": 0.0}
RESNET = ResNetConfig(widths=(8, 16), depth=1, strides=(1, 2), image_size=(8, 8), channels=1)
COLOUR: dict[str, Any] = {"model": VIT, "augment": Augment(flip=True)}
CASES: dict[str, tuple[Run, Callable[[], Splits]]] = {
    "classify, AdamW": (run_of(), digits),
    "classify, Muon": (run_of(optim=MUON), digits),
    "classify, batch norm": (run_of(model=RESNET, optim=Optim("sgd", lr=0.05)), digits),
    "caption": (run_of(**COLOUR, task=Captioning(**SMALL, word_dropout=0.0, most_words=12)), captions),
    "segment": (run_of(**COLOUR, task=Segmentation(head="mask-transformer", head_blocks=1)), masks),
}
LAYOUTS = {
    "1": (1, False),
    "2": (2, False),
    "4": (4, False),
    "2, weights shared out": (2, True),
    "4, weights shared out": (4, True),
}


def parser() -> Parser:
    parser = Parser(__doc__, steps=6, cases=["classify, AdamW"], layouts=["1", "2", "2, weights shared out"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    return parser


def main() -> int:
    options = parser().parse_args()
    rows: Row = {}
    failed = False
    for case in options.cases:
        run, splits = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            one, *_ = in_layout("1", run, splits, Path(folder) / "1", options.steps)
            for layout in options.layouts[1:]:
                ranks = in_layout(layout, run, splits, Path(folder) / layout, options.steps)
                found = compared(one, ranks)
                halfway = Path(folder) / f"{layout}, half"
                in_layout(layout, run, splits, halfway, options.steps, stop=options.steps // 3)
                (rest, *_) = in_layout("1", run, splits, halfway, options.steps, resume=True)
                found["continued by 1, largest difference of a loss"] = apart(one.losses, rest.losses)
                found["begun by 1, largest difference of a loss"] = begun_by_one(layout, run, splits, Path(folder), one)
                rows.setdefault(case, {})[layout] = found
                failed |= max(value for name, value in found.items() if "loss" in name) > MOST
                failed |= not found["the same images"] or not found["scores of the same weights are equal"]
                print(f"{case}, {layout}: {found}", flush=True)
        record("ranks", rows, options.results)  # after each: all of them take a while
    return int(failed)


def begun_by_one(layout: str, run: Run, splits: Callable[[], Splits], folder: Path, one: Told) -> float:
    """The largest difference of a loss, if one process begins and this layout continues."""
    half, steps = folder / f"1, then {layout}", len(one.losses)
    in_layout("1", run, splits, half, steps, stop=steps // 3)
    rest, *_ = in_layout(layout, run, splits, half, steps, resume=True)
    return apart(one.losses, rest.losses)


def compared(one: Told, ranks: list[Told]) -> Row:
    """How a run in several processes differs from one."""
    images = [sorted(sample for rank in ranks for sample in rank.samples[step]) for step in range(len(one.samples))]
    return {
        "the same images": images == [sorted(samples) for samples in one.samples],
        "largest difference of a loss": max(apart(one.losses, rank.losses) for rank in ranks),
        "scores of the same weights are equal": all(rank.scores == one.scores for rank in ranks),
    }


def apart(expected: list[float], found: list[float]) -> float:
    """The largest relative difference; `found` may be the last ones only."""
    return max(abs(b / a - 1) for a, b in zip(expected[-len(found) :], found, strict=True))


def trained(
    world: World, run: Run, splits: Callable[[], Splits], path: Path, steps: int, stop: int | None, resume: bool
) -> Told:
    """Train as one of the processes of `world`; from the step `stop` on it asks to stop."""
    samples: list[list[int]] = []
    losses: list[float] = []

    def noted(run: Run, module: Any, batch: Any, *rest: Any) -> AsyncScalars:
        samples.append(batch["sample"].tolist())
        if len(samples) == stop:
            os.kill(os.getpid(), 15)
        scalars = train_step(run, module, batch, *rest)
        losses.append(scalars.read()["loss"])
        return scalars

    components, _ = build(run, splits(), torch.device("cpu"), world=world)
    components.val.batch_size = EVALUATED
    scores = evaluate(components.task, components.loaders, "val", world=world)
    folder = RunFolder(path) if world.is_main else Follower(path)
    if not resume:
        folder.begin(run, components.task.classes)
    with patch.object(loop, "train_step", noted), suppress(Stopped):
        fit(run, components, folder, steps, resume)
    return Told(samples, losses, scores)


def in_layout(
    layout: str,
    run: Run,
    splits: Callable[[], Splits],
    path: Path,
    steps: int,
    stop: int | None = None,
    resume: bool = False,
) -> list[Told]:
    """What each rank of a layout tells."""
    count, shard = LAYOUTS[layout]
    path.mkdir(parents=True, exist_ok=True)
    return in_ranks(count, shard, trained, run, splits, path, steps, stop, resume)


if __name__ == "__main__":
    raise SystemExit(main())
