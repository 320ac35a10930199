"""The captioning ladder: every rung trained for the same minutes, after the same learning rates were tried on each.

    python bench/ladder.py --data DIR                          all rungs; about 35 minutes each on two cores
    python bench/ladder.py --data DIR --rungs caption-vit --seeds 0 1 2
    python bench/ladder.py --data DIR --minutes 0.5 --try-minutes 0.2      to see that it works

Each rung is timed over some steps; the epochs of its tries and of its run follow from that, so that a slow model gets
fewer of them. A rung that starts from another recipe shares its time with it. Rates are chosen by CIDEr on validation,
and the scores are those on validation, with the recipe's own decoding. What results/ladder.json already holds with the
same minutes is kept, so the ladder can be climbed piece by piece.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, record

from vitrail.recipes import RECIPES

RUNGS = {
    "caption-cnn-rnn": "a. CNN + RNN",
    "caption-cnn-lstm": "b. CNN + LSTM",
    "caption-cnn-attention": "c. CNN + LSTM with attention",
    "caption-vit-lstm": "d. ViT + LSTM with attention",
    "caption-vit": "e. ViT + Transformer",
    "caption-coca": "f. the same, after it has matched pictures with captions",
}
FIRST = {"caption-coca": "caption-match"}
"""what a rung starts from, which gets half of the rung's time"""
Row = dict[str, Any]
RATES = (0.5, 1.0, 2.0)
"""what a recipe's learning rates are multiplied by"""
TIMED_STEPS = 40
PICTURES = 6000
"""of the training part, to make steps out of epochs before it is read"""
KEPT = ("cider", "bleu1", "bleu4", "rouge_l", "meteor", "length", "vocabulary", "identical", "new", "parameters")


def climb(rung: str, data: str, out: Path, speeds: dict[str, float], minutes: float, rate: float, seed: int) -> Row:
    """A rung trained for so many minutes, with what it starts from."""
    first = FIRST.get(rung)
    if first is None:
        return train(rung, data, out, speeds[rung] * minutes, rate, seed)
    start = out.with_name(f"{out.name}-start")
    before = train(first, data, start, speeds[first] * minutes / 2, rate, seed)
    row = train(rung, data, out, speeds[rung] * minutes / 2, rate, seed, "--init", str(start))
    spent = {name: round(before[name] + row[name], 1) for name in ("training_seconds", "command_seconds")}
    return {**row, **spent, f"epochs of {first}": before["epochs"]}


def train(recipe: str, data: str, out: Path, epochs: float, rate: float, seed: int, *more: str) -> Row:
    """One whole command: its scores on validation, and how long its steps took."""
    shutil.rmtree(out, ignore_errors=True)
    optim = RECIPES[recipe](PICTURES).optim
    options = {
        "--data": data,
        "--epochs": f"{epochs:.3f}",
        "--eval-every": f"{epochs:.3f}",
        "--lr": f"{optim.lr * rate:g}",
        "--matrix-lr": f"{optim.matrix_lr * rate:g}",
        "--seed": str(seed),
        "--out": str(out),
    }
    words = [*(word for option in options.items() for word in option), *more]
    began = time.monotonic()
    command = [sys.executable, "-m", "vitrail", "train", recipe, *words, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    return {
        "seed": seed,
        "epochs": round(epochs, 2),
        "rate": rate,
        "training_seconds": round(steps[-1]["seconds"], 1),
        "command_seconds": round(time.monotonic() - began, 1),
        **{name: value for name, value in json.loads(done.stdout).items() if name in KEPT},
    }


def speed(recipe: str, data: str, out: Path) -> float:
    """Epochs a minute, rounded, from the second half of some steps: the first ones load and warm up."""
    batch = RECIPES[recipe](PICTURES).batch_size
    train(recipe, data, out, TIMED_STEPS * batch / PICTURES, 1.0, seed=0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    marks = [(line["step"], line["seconds"]) for line in lines if line["kind"] == "train"]
    (first, began), (last, ended) = marks[0], marks[-1]
    return round((last - first) * batch / PICTURES / (ended - began) * 60, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--try-minutes", type=float, default=5.0)
    asked = parser.parse_args()
    file = RESULTS / "ladder.json"
    rows: Row = json.loads(file.read_text())["rows"] if file.exists() else {}
    budget = {"minutes": asked.minutes, "try_minutes": asked.try_minutes}
    if rows.get("budget") != budget:
        rows = {"budget": budget, "rungs": {}}
    for rung in asked.rungs:
        out = Path("runs") / "bench" / "ladder" / rung
        row = rows["rungs"].setdefault(rung, {"title": RUNGS[rung], "tries": [], "runs": []})
        speeds = row.setdefault("epochs_a_minute", {})
        for recipe in {rung, FIRST.get(rung, rung)} - set(speeds):
            speeds[recipe] = speed(recipe, asked.data, out)
        for rate in RATES[len(row["tries"]) :]:
            row["tries"].append(climb(rung, asked.data, out, speeds, asked.try_minutes, rate, seed=0))
            record("ladder", rows)
        row["rate"] = max(row["tries"], key=lambda tried: tried["cider"])["rate"]
        for seed in asked.seeds:
            if seed not in [run["seed"] for run in row["runs"]]:
                place = out.with_name(f"{rung}-{seed}")
                row["runs"].append(climb(rung, asked.data, place, speeds, asked.minutes, row["rate"], seed))
                record("ladder", rows)
        print(rung, json.dumps(row["runs"]), flush=True)


if __name__ == "__main__":
    main()
