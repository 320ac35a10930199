"""Training from the bundled weights against training from scratch: same architecture, budget and images.

    python bench/transfer.py --data DIR                     DIR contains hymenoptera/ and cifar10/
    python bench/transfer.py --data DIR --sets hymenoptera

hymenoptera: all labelled images in five folds, drawn anew for each seed. Both starts train on the images of the other
folds for the same epochs, at the same size and with the same augmentation; the score is that of the last step on the
held-out fold. From the weights it is the recipe `finetune` with the method that it chooses; from scratch all weights
are trained, with the optimizer of the recipe for such sets, `folder`. k-NN and the linear probe use the same folds.

cifar10: images at twice the size that the weights were trained at, on a subset of the training images; from scratch
with the optimizer of `cifar10-quick`, with which the weights were trained.

Rows that results/transfer.json has from the same settings are kept, so a stopped measurement resumes. `--tiny` uses
synthetic data and trains for a step or two.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from harness import Parser, Row, record, recorded, tiny_cifar10, tiny_images
from torch import Tensor

from vitrail import recipes, zoo
from vitrail.data.augment import Augment
from vitrail.data.sets import ImageSet, Splits, open_data
from vitrail.recipes import RECIPES
from vitrail.recipes.finetune import finetune, resolve_auto
from vitrail.start import score_features
from vitrail.tasks.encoder import encoder_of
from vitrail.train.build import build
from vitrail.train.folder import RunFolder
from vitrail.train.frozen import fit_frozen
from vitrail.train.loaders import evaluation_loader
from vitrail.train.loop import evaluate, fit
from vitrail.train.run import Run
from vitrail.train.tune import Tune

CPU = torch.device("cpu")
STARTS = ("weights", "scratch")


@dataclass(frozen=True)
class Budget:
    """The budget of both starts."""

    size: int
    """side of the images in pixels"""
    epochs: float
    batch_size: int
    images: int
    """training images: the first of a random order with seed 0; 0 for all"""
    test: int
    """test images; 0 for all"""
    scratch: str
    """the recipe whose optimizer is used from scratch"""
    shift: int = 0
    """largest random shift in pixels, relatively as in the training of the weights; 0 for the recipe's own crops"""


BUDGETS = {
    "hymenoptera": Budget(size=48, epochs=9, batch_size=16, images=0, test=0, scratch="folder"),
    "cifar10": Budget(size=64, epochs=1, batch_size=64, images=8_000, test=0, scratch="cifar10-quick", shift=8),
}
FOLDS = 5


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"], seeds=[0], epochs=0.5, images=16)
    parser.add_argument("--data", type=Path, help="contains hymenoptera/ and cifar10/")
    parser.add_argument("--sets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="instead of the budget's")
    parser.add_argument("--images", type=int, help="images to train and to test on, instead of the budget's")
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    rows: Row = {} if args.tiny else recorded("transfer", args.results)
    with tempfile.TemporaryDirectory() as place:
        data = args.data or tiny_sets(Path(place))
        for name in args.sets:
            budget = BUDGETS[name]
            if args.epochs is not None:
                budget = replace(budget, epochs=args.epochs)
            if args.images is not None:
                budget = replace(budget, images=args.images, test=args.images)
            measure(name, data / name, budget, args.seeds, rows, args.results)


def tiny_sets(folder: Path) -> Path:
    tiny_images(folder / "hymenoptera", ("ants", "bees"), 8)
    tiny_cifar10(folder / "cifar10")
    return folder


def measure(name: str, data: Path, budget: Budget, seeds: list[int], rows: Row, results: Path) -> None:
    """Measure the missing rows, and write the file after each."""
    cases, summary = {"hymenoptera": (ants_and_bees, of_folds), "cifar10": (larger, of_seeds)}[name]
    settings = asdict(budget)
    kept = rows.get(name, {})
    runs: list[Row] = kept["runs"] if kept.get("settings") == settings else []
    for key, run in cases(data, budget, seeds):
        if any(key.items() <= row.items() for row in runs):
            continue
        began = time.process_time()
        runs.append({**key, **run(), "seconds": round(time.process_time() - began, 1)})
        print(name, runs[-1], flush=True)
        rows[name] = {
            "settings": settings,
            "seeds": len({row["seed"] for row in runs if "seed" in row}),
            **summary(runs),
            "runs": runs,
        }
        record("transfer", rows, results)


Cases = Iterator[tuple[Row, Callable[[], Row]]]
"""the fields that identify a row, and a function that measures the others"""


def ants_and_bees(data: Path, budget: Budget, seeds: list[int]) -> Cases:
    """Every fold and seed from both starts, and k-NN and linear probe of the features."""
    opened = open_data(data)
    whole = some(reduce(ImageSet.joined, filter(None, (opened.train, opened.val, opened.test))), budget.images)
    for seed in seeds:
        for fold, held_out in enumerate(folds(whole.labels, FOLDS, seed)):
            rest = torch.ones(len(whole), dtype=torch.bool)
            rest[held_out] = False
            splits = Splits(whole.subset(rest.nonzero()[:, 0]), test=whole.subset(held_out))
            for start in STARTS:
                yield {"seed": seed, "fold": fold, "start": start}, partial(train, splits, start, budget, seed)
            yield {"seed": seed, "fold": fold, "start": "features"}, partial(probes, splits, budget)


def larger(data: Path, budget: Budget, seeds: list[int]) -> Cases:
    """Every seed from both starts; the weights without training, at their own size and at the larger one."""
    opened = open_data(data)
    assert opened.test is not None
    splits = Splits(some(opened.train, budget.images), test=some(opened.test, budget.test))
    for side in (None, budget.size):
        yield {"start": "untouched", "size": side or "own"}, partial(untouched, splits, side)
    for seed in seeds:
        for start in STARTS:
            yield {"seed": seed, "start": start}, partial(train, splits, start, budget, seed)


def train(splits: Splits, start: str, budget: Budget, seed: int) -> Row:
    """Top-1 on the test split after the last step."""
    run = planned(splits.train, start, budget, seed)
    with tempfile.TemporaryDirectory() as place:
        components, steps = build(run, splits, CPU)
        folder = RunFolder(Path(place) / "run")
        folder.begin(run, components.task.classes)
        scores = fit_frozen(run, components, folder) if run.tune.frozen else fit(run, components, folder, steps)
    method = run.tune.method if run.init else "from scratch"
    return {"method": method, "lr": run.optim.lr, "steps": steps, "top1": scores["top1"], "count": scores["count"]}


def planned(images: ImageSet, start: str, budget: Budget, seed: int) -> Run:
    """The run of a start. The two differ in the initial weights, in what is trained, and in the optimizer."""
    task = zoo.load("classify")
    run = recipes.from_weights(finetune(len(images)), "classify", encoder_of(task).config)

    # One evaluation, at the end: choosing the best step would add noise to the difference.
    changes: dict[str, Any] = {
        "seed": seed,
        "epochs": budget.epochs,
        "eval_every": budget.epochs,
        "batch_size": budget.batch_size,
    }
    changes |= {"workers": 0, "image_size": (budget.size, budget.size)}
    if budget.shift:
        run = replace(run, augment=Augment(crop="shift", shift=budget.shift, flip=True))
    run = resolve_auto(run, len(images), len(images.classes), changes)
    if start == "weights":
        return run
    own, recipe = task.preprocess, RECIPES[budget.scratch](len(images))
    return replace(run, init=None, tune=Tune(), optim=recipe.optim, mean=own.mean, std=own.std)


def probes(splits: Splits, budget: Budget) -> Row:
    """k-NN and linear probe of the weights' features, fitted on the training split."""
    task = zoo.load("classify", classes=0, image_size=budget.size)
    _, scores = score_features(task, splits, "test")
    return {name: scores[name] for name in ("knn_top1", "linear_top1", "count")}


def untouched(splits: Splits, side: int | None) -> Row:
    """The bundled classifier without any training."""
    assert splits.test is not None
    task = zoo.load("classify", image_size=side)
    return {
        "top1": evaluate(task, {"test": evaluation_loader(task, splits.test, CPU)}, "test")["top1"],
        "count": len(splits.test),
    }


def of_folds(runs: list[Row]) -> Row:
    """Means over folds and seeds, and the gain over pairs with the same fold and seed.

    The training sets of the folds overlap, so pairs are not independent: besides the plain standard error there is the
    one that is corrected as by Nadeau and Bengio (2003), for a test set of a quarter of the training set.
    """
    found = {f"{start}_top1": values for start in STARTS if (values := column(runs, start, "top1"))}
    found |= {name: values for name in ("knn_top1", "linear_top1") if (values := column(runs, "features", name))}
    summary: Row = {name: statistics.mean(values.values()) for name, values in found.items()}
    gains = paired(runs)
    if len(gains) > 1:
        spread = statistics.stdev(gains)
        summary |= {
            "pairs": len(gains),
            "gain": statistics.mean(gains),
            "gain_standard_error": spread / math.sqrt(len(gains)),
            "gain_corrected_standard_error": spread * math.sqrt(1 / len(gains) + 1 / (FOLDS - 1)),
        }
    return summary


def of_seeds(runs: list[Row]) -> Row:
    """Means and spread over seeds, and the gain over pairs with the same seed."""
    summary: Row = {}
    for row in runs:
        if row["start"] == "untouched":
            summary["untouched_top1" if row["size"] == "own" else "untouched_at_twice_the_size_top1"] = row["top1"]
    for start in STARTS:
        if values := column(runs, start, "top1").values():
            summary |= {f"{start}_top1": statistics.mean(values), f"{start}_spread": max(values) - min(values)}
    if gains := paired(runs):
        summary |= {"pairs": len(gains), "gain": statistics.mean(gains), "least_gain": min(gains)}
    return summary


def column(runs: list[Row], start: str, name: str) -> dict[tuple[int, int], float]:
    """A score by seed and fold."""
    return {(row.get("seed", 0), row.get("fold", 0)): row[name] for row in runs if row["start"] == start}


def paired(runs: list[Row]) -> list[float]:
    """The gain of the weights over scratch, for each seed and fold with both."""
    weights, scratch = (column(runs, start, "top1") for start in STARTS)
    return [weights[key] - scratch[key] for key in sorted(weights.keys() & scratch.keys())]


def folds(labels: Tensor, count: int, seed: int) -> list[Tensor]:
    """The images of each fold, int64; each class is distributed evenly over the folds."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty_like(labels)
    for kind in labels.unique():
        members = (labels == kind).nonzero()[:, 0]
        place[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % count
    return [(place == fold).nonzero()[:, 0] for fold in range(count)]


def some(images: ImageSet, count: int) -> ImageSet:
    """The first `count` images of a random order with seed 0; for 0 all, in their own order."""
    if not count or count >= len(images):
        return images
    return images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count])


if __name__ == "__main__":
    main()
