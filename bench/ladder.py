"""The captioning ladder: each rung trained for the same time, after the same learning rates were tried on it.

    python bench/ladder.py a --data ../shared/data                       about 70 minutes on one core, 35 on two
    python bench/ladder.py e f --data ../shared/data --seeds 0 1 2
    python bench/ladder.py e --data ../shared/data --core-minutes 1 --try-core-minutes 0.4 --results runs    a trial

Time is counted in minutes of one core: 40 of them are 20 minutes of two cores. With `OMP_NUM_THREADS=1 taskset -c 0`
and `-c 1` before them, two rungs can be measured side by side. Each recipe is timed over some steps of both sizes of
its pictures; the epochs of its tries and of its run follow from that, so that a slow model gets fewer of them. In a
rung that starts from another recipe, both get the same part of the epochs that they ask for. Rates are chosen by CIDEr
on validation, and the scores are those on validation, with the recipe's own decoding. What results/ladder-RUNG.json
already holds from the same minutes, recipes and kind of machine is kept, and a training that was stopped is resumed, so
a stopped measurement goes on. A processor that multiplies bf16 trains faster, so it is another kind.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, machine, record

from vitrail.recipes import RECIPES
from vitrail.train.state import RunFolder


@dataclass(frozen=True)
class Rung:
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
    "f": Rung("the same, after it has matched pictures with captions", "caption-coca", "caption-match"),
    "cifar10": Rung("e, with an encoder that has learned CIFAR-10 first", "caption-vit", "encoder-cifar10"),
}
PICTURES = {"flickr8k": 6_000, "cifar10": 45_000}
"""of the parts that are trained on, to make steps out of epochs before they are read"""
Row = dict[str, Any]
RATES = (0.5, 1.0, 2.0)
"""what a recipe's learning rates are multiplied by"""
TIMED_STEPS = 100
"""of which the first fifth, in which loading and memory settle, is left out"""
KEPT = ("cider", "bleu1", "bleu4", "rouge_l", "length", "vocabulary", "identical", "distinct")


@dataclass(frozen=True)
class Climb:
    """One rung on one machine."""

    rung: Rung
    data: Path
    out: Path

    def run(self, speeds: dict[str, float], minutes: float, rate: float, seed: int) -> Row:
        """The rung trained for so many minutes, with what it starts from; `speeds` are epochs a minute."""
        recipe, first = self.rung.recipe, self.rung.first
        if first is None:
            return {"seed": seed, "rate": rate, **self.train(recipe, speeds[recipe] * minutes, rate, seed)}
        asked = {name: recipe_of(name).epochs for name in (first, recipe)}
        part = minutes / sum(asked[name] / speeds[name] for name in asked)
        before = self.train(first, asked[first] * part, rate, seed)
        row = self.train(recipe, asked[recipe] * part, rate, seed)
        spent = round(before["training_seconds"] + row["training_seconds"], 1)
        return {"seed": seed, "rate": rate, **row, "training_seconds": spent, f"epochs of {first}": before["epochs"]}

    def train(self, recipe: str, epochs: float, rate: float, seed: int) -> Row:
        """One whole command: its scores on validation, and how long its steps took."""
        first = self.rung.first
        more = ["--init", str(self.out / first)] if first and recipe != first else []
        out, optim = self.out / recipe, recipe_of(recipe).optim
        options = {
            "--data": str(self.data / recipe_of(recipe).data),
            "--epochs": f"{epochs:.3f}",
            "--eval-every": f"{epochs:.3f}",
            "--lr": f"{optim.lr * rate:g}",
            "--matrix-lr": f"{optim.matrix_lr * rate:g}",
            "--seed": str(seed),
            "--out": str(out),
        }
        words = ["train", recipe, *(word for option in options.items() for word in option), *more, "--json"]
        if was_stopped(out, words):
            words = ["train", "--resume", str(out), "--json"]
        else:
            shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "vitrail", *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {
            "epochs": round(epochs, 3),
            "training_seconds": round(rows_of(out, "train")[-1]["seconds"], 1),
            "cores": machine()["cores"],
            "parameters": json.loads(done.stdout)["parameters"],
            # A test part, where there is one, is neither chosen by nor shown.
            **{name: value for name, value in rows_of(out, "val")[-1].items() if name in KEPT},
        }

    def speed(self, recipe: str) -> float:
        """Epochs a minute, rounded, with as many steps of small pictures and of full ones as the recipe takes."""
        run = recipe_of(recipe)
        share = 1 / (PICTURES[run.data] // run.batch_size)  # of an epoch, a step; a last short batch is left out
        shutil.rmtree(self.out / recipe, ignore_errors=True)  # nothing is resumed, which would count loading twice
        self.train(recipe, TIMED_STEPS * share, 1.0, seed=0)
        marks = {line["step"]: line["seconds"] for line in rows_of(self.out / recipe, "train")}
        settled, change = TIMED_STEPS // 5, round(run.early * TIMED_STEPS)
        small = (marks[change] - marks[settled]) / (change - settled)
        full = (marks[TIMED_STEPS] - marks[change]) / (TIMED_STEPS - change)
        return round(60 * share / (run.early * small + (1 - run.early) * full), 4)


def recipe_of(name: str) -> Any:
    """The run that a recipe makes; how large the data is does not matter to the rungs."""
    return RECIPES[name](PICTURES["flickr8k"])


def rows_of(out: Path, kind: str) -> list[Row]:
    """What a run logged of one kind: `train` for its steps, `val` for its evaluations."""
    return [row for row in RunFolder(out).rows() if row["kind"] == kind]


def was_stopped(out: Path, words: list[str]) -> bool:
    """Whether `out` holds a run of just this command that has saved its state and is not done."""
    if not (out / "state").exists():
        return False
    rows = RunFolder(out).rows()
    return rows[0].get("command") == shlex.join(["vitrail", *words]) and rows[-1]["kind"] != "done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rungs", nargs="+", choices=list(RUNGS))
    parser.add_argument("--data", type=Path, required=True, help="holds flickr8k/, and cifar10/ for that rung")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--core-minutes", type=float, default=40.0)
    parser.add_argument("--try-core-minutes", type=float, default=10.0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of ladder-RUNG.json")
    asked = parser.parse_args()
    budget = {"core_minutes": asked.core_minutes, "try_core_minutes": asked.try_core_minutes}
    for name in asked.rungs:
        measure(name, asked.data, asked.seeds, budget, asked.results)


def measure(name: str, data: Path, seeds: list[int], budget: dict[str, float], results: Path) -> None:
    """Tries and runs of a rung that its file in `results` does not hold yet."""
    rung, file = RUNGS[name], results / f"ladder-{name}.json"
    climb = Climb(rung, data, Path("runs") / "bench" / f"ladder-{name}")
    row: Row = json.loads(file.read_text())["rows"] if file.exists() else {}
    stages = [recipe for recipe in (rung.first, rung.recipe) if recipe]
    kind = {key: machine()[key] for key in ("cores", "bf16")}
    recipes = [recipe_of(stage).fingerprint for stage in stages]
    same = {"title": rung.title, "stages": stages, "recipes": recipes, "budget": budget, **kind}
    if any(row.get(key) != value for key, value in same.items()):
        row = {**same, "epochs_a_minute": {}, "tries": [], "runs": []}
    if not row["epochs_a_minute"]:
        row["epochs_a_minute"] = {recipe: climb.speed(recipe) for recipe in stages}
        record(f"ladder-{name}", row, results)
    speeds = row["epochs_a_minute"]
    for rate in RATES[len(row["tries"]) :]:
        row["tries"].append(climb.run(speeds, budget["try_core_minutes"] / kind["cores"], rate, seed=0))
        record(f"ladder-{name}", row, results)
    row["rate"] = max(row["tries"], key=lambda tried: tried["cider"])["rate"]
    for seed in seeds:
        if seed not in [run["seed"] for run in row["runs"]]:
            row["runs"].append(climb.run(speeds, budget["core_minutes"] / kind["cores"], row["rate"], seed))
            record(f"ladder-{name}", row, results)
    print(name, json.dumps(row["runs"]), flush=True)


if __name__ == "__main__":
    main()
