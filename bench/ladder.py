"""The captioning ladder: each rung is trained for the same time, after trials of the same learning rates.

    python bench/ladder.py a --data ../shared/data                       about 70 minutes on one core, 35 on two
    python bench/ladder.py e f --data ../shared/data --seeds 0 1 2

Time is counted in core minutes: 40 of them are 20 minutes of two cores. To measure two rungs at the same time, prefix
the commands with `OMP_NUM_THREADS=1 taskset -c 0` and `-c 1`. Each recipe is timed over some steps at both of its image
sizes, which determines the epochs of its trials and of its run, so that a slow model gets fewer epochs. In a rung that
starts from another recipe, both recipes get the same fraction of their epochs. Learning rates are chosen by CIDEr on
validation, and the scores are those on validation, with the recipe's own decoding. Rows that results/ladder-RUNG.json
already has from the same minutes, recipes and kind of machine are kept, and a stopped training resumes, so a stopped
measurement resumes. A CPU with native bf16 trains faster, so it is another kind of machine. `--tiny` uses synthetic
data and tries one rate, of rung a if none is named.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Parser, Row, machine, record, recorded, tiny_captions, tiny_cifar10, vitrail

from vitrail.recipes import RECIPES
from vitrail.train.folder import RunFolder


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: a recipe, and the recipe that it may start from."""

    title: str
    recipe: str
    first: str | None = None
    """the recipe that it starts from"""


RUNGS = {
    "a": Rung("CNN + RNN", "caption-cnn-rnn"),
    "b": Rung("CNN + LSTM", "caption-cnn-lstm"),
    "c": Rung("CNN + LSTM with attention", "caption-cnn-attention"),
    "d": Rung("ViT + LSTM with attention", "caption-vit-lstm"),
    "e": Rung("ViT + Transformer", "caption-vit"),
    "f": Rung("the same, after it has matched images with captions", "caption-coca", "caption-match"),
    "cifar10": Rung("e, with an encoder that has learned CIFAR-10 first", "caption-vit", "encoder-cifar10"),
}
IMAGES = {"flickr8k": 6_000, "cifar10": 45_000}
"""images of the training splits, to convert epochs to steps before the data are read"""
RATES = (0.5, 1.0, 2.0)
"""factors on a recipe's learning rates"""
TIMED_STEPS = 100
"""steps to time; the first fifth is ignored as warm-up"""
TINY = ("--batch-size", "2", "--depth", "1", "--image-size", "32", "32", "--early-size", "16", "--workers", "0")
TINY_STEPS = 4
"""per epoch of the tiny data"""
KEPT = ("cider", "bleu1", "bleu4", "rouge_l", "length", "vocabulary", "identical", "distinct")


def parser() -> Parser:
    parser = Parser(
        __doc__, needs=["data", "rungs"], rungs=["a"], core_minutes=0.01, try_core_minutes=0.01, rates=(1.0,)
    )
    parser.set_defaults(rates=RATES)
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=", ".join(RUNGS))
    parser.add_argument("--data", type=Path, help="contains flickr8k/, and cifar10/ for that rung")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--core-minutes", type=float, default=40.0)
    parser.add_argument("--try-core-minutes", type=float, default=10.0)
    return parser


def main() -> None:
    options = parser()
    args = options.parse_args()
    if unknown := [name for name in args.rungs if name not in RUNGS]:
        options.error(f"no rung {unknown[0]!r}: choose from {', '.join(RUNGS)}")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "runs" if args.tiny else Path("runs") / "bench"
        data = tiny_sets(Path(place)) if args.tiny else args.data
        for name in args.rungs:
            measure(name, Climb(RUNGS[name], data, out / f"ladder-{name}", args.tiny), args)


def tiny_sets(folder: Path) -> Path:
    tiny_captions(folder / "flickr8k", 4)
    tiny_cifar10(folder / "cifar10")
    return folder


def measure(name: str, climb: Climb, args: Namespace) -> None:
    """Run the trials and trainings of a rung that its file in `args.results` does not have yet."""
    rung, file, results = climb.rung, f"ladder-{name}", args.results
    row: Row = {} if climb.tiny else recorded(file, results)
    budget = {"core_minutes": args.core_minutes, "try_core_minutes": args.try_core_minutes}
    stages = [recipe for recipe in (rung.first, rung.recipe) if recipe]
    kind = {key: machine()[key] for key in ("cores", "bf16")}
    recipes = [recipe_of(stage).fingerprint for stage in stages]
    same = {"title": rung.title, "stages": stages, "recipes": recipes, "budget": budget, **kind}
    if any(row.get(key) != value for key, value in same.items()):
        row = {**same, "epochs_a_minute": {}, "tries": [], "runs": []}
    if not row["epochs_a_minute"]:
        row["epochs_a_minute"] = {recipe: climb.speed(recipe) for recipe in stages}
        record(file, row, results)
    speeds = row["epochs_a_minute"]
    for rate in args.rates[len(row["tries"]) :]:
        row["tries"].append(climb.run(speeds, budget["try_core_minutes"] / kind["cores"], rate, seed=0))
        record(file, row, results)
    row["rate"] = max(row["tries"], key=lambda tried: tried["cider"])["rate"]
    for seed in args.seeds:
        if seed not in [run["seed"] for run in row["runs"]]:
            row["runs"].append(climb.run(speeds, budget["core_minutes"] / kind["cores"], row["rate"], seed))
            record(file, row, results)
    print(name, json.dumps(row["runs"]), flush=True)


@dataclass(frozen=True)
class Climb:
    """One rung on one machine."""

    rung: Rung
    data: Path
    out: Path
    tiny: bool = False

    def run(self, speeds: dict[str, float], minutes: float, rate: float, seed: int) -> Row:
        """Train the rung, and the recipe that it starts from, for `minutes`; `speeds` are epochs per minute."""
        recipe, first = self.rung.recipe, self.rung.first
        if first is None:
            return {"seed": seed, "rate": rate, **self.train(recipe, speeds[recipe] * minutes, rate, seed)}
        epochs = {name: recipe_of(name).epochs for name in (first, recipe)}
        fraction = minutes / sum(epochs[name] / speeds[name] for name in epochs)
        before = self.train(first, epochs[first] * fraction, rate, seed)
        row = self.train(recipe, epochs[recipe] * fraction, rate, seed)
        spent = round(before["training_seconds"] + row["training_seconds"], 1)
        return {"seed": seed, "rate": rate, **row, "training_seconds": spent, f"epochs of {first}": before["epochs"]}

    def train(self, recipe: str, epochs: float, rate: float, seed: int) -> Row:
        """Run one whole command: its scores on validation, and the time of its steps."""
        first = self.rung.first
        more = ["--init", str(self.out / first)] if first and recipe != first else []
        out, optim = self.out / recipe, recipe_of(recipe).optim
        options = {
            "--data": str(self.data / recipe_of(recipe).data),
            "--epochs": f"{epochs:.3f}",
            "--eval-every": f"{epochs:.3f}",
            "--lr": f"{optim.lr * rate:g}",
            "--muon-lr": f"{optim.muon_lr * rate:g}",
            "--seed": str(seed),
            "--out": str(out),
        }
        words = ["train", recipe, *(word for option in options.items() for word in option), *more]
        words += TINY if self.tiny else ()
        if was_stopped(out, [*words, "--json"]):
            words = ["train", "--resume", str(out)]
        else:
            shutil.rmtree(out, ignore_errors=True)
        scores, _ = vitrail(*words)
        return {
            "epochs": round(epochs, 3),
            "training_seconds": round(rows_of(out, "train")[-1]["seconds"], 1),
            "cores": machine()["cores"],
            "parameters": scores["parameters"],
            # A test split, if there is one, is neither used for choices nor shown.
            **{name: value for name, value in rows_of(out, "val")[-1].items() if name in KEPT},
        }

    def speed(self, recipe: str) -> float:
        """Epochs per minute, rounded, with the recipe's proportion of steps at the smaller image size."""
        run = recipe_of(recipe)
        steps = TINY_STEPS if self.tiny else IMAGES[run.data] // run.batch_size  # a last short batch is left out
        share = 1 / steps  # of an epoch per step
        shutil.rmtree(self.out / recipe, ignore_errors=True)  # start anew: resuming would count loading twice
        self.train(recipe, TIMED_STEPS * share, 1.0, seed=0)
        marks = {line["step"]: line["seconds"] for line in rows_of(self.out / recipe, "train")}
        settled, change = TIMED_STEPS // 5, round(run.early * TIMED_STEPS)
        small = (marks[change] - marks[settled]) / (change - settled)
        full = (marks[TIMED_STEPS] - marks[change]) / (TIMED_STEPS - change)
        return round(60 * share / (run.early * small + (1 - run.early) * full), 4)


def recipe_of(name: str) -> Any:
    """The run of a recipe; the rungs do not depend on the size of the data."""
    return RECIPES[name](IMAGES["flickr8k"])


def rows_of(out: Path, kind: str) -> list[Row]:
    """The rows of one kind in a run's log: `train` for its steps, `val` for its evaluations."""
    return [row for row in RunFolder(out).rows() if row["kind"] == kind]


def was_stopped(out: Path, words: list[str]) -> bool:
    """Whether `out` contains an unfinished run of exactly this command with a saved state."""
    if not (out / "state").exists():
        return False
    rows = RunFolder(out).rows()
    return rows[0].get("command") == shlex.join(["vitrail", *words]) and rows[-1]["kind"] != "done"


if __name__ == "__main__":
    main()
