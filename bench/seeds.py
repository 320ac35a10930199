"""Train a recipe with several seeds, each as the whole command that a user types, and record scores and wall time.

    python bench/seeds.py digits --seeds 0 1 2 3 4
    python bench/seeds.py cifar10-quick --data DIR --seeds 0 1 2
    python bench/seeds.py cifar10-quick --data DIR --seeds 0 --name cifar10-quick-plain -- --stem

What stands after `--` goes to `vitrail train`. Seeds that results/NAME.json already holds from the same command and the
same fields of the recipe are kept, so a long series can be made piece by piece.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, machine, record

from vitrail.recipes import RECIPES


def one(recipe: str, seed: int, out: Path, options: list[str]) -> dict[str, Any]:
    """Scores and wall seconds of one whole command."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "vitrail",
        "train",
        recipe,
        "--seed",
        str(seed),
        "--out",
        str(out),
        "--json",
        *options,
    ]
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    scores = json.loads(done.stdout)
    kept = ("part", "top1", "top5", "cross_entropy", "calibration_error", "parameters", "count")
    seconds = round(time.monotonic() - began, 1)
    return {"seed": seed, "wall_seconds": seconds, "cores": machine()["cores"], **{k: scores[k] for k in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", help="of the results file; the recipe's if left out")
    # argparse takes what stands after `--` for positional arguments that it has already read.
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    asked, options = parser.parse_args(words[:split]), words[split + 1 :]
    name = asked.name or asked.recipe
    train = " ".join(["vitrail train", asked.recipe, *options])
    file = RESULTS / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    same = {"train": train, "recipe": RECIPES[asked.recipe](50_000).fingerprint}
    kept = rows["runs"] if all(rows.get(key) == value for key, value in same.items()) else []
    runs = {run["seed"]: run for run in kept}
    data = ["--data", asked.data] if asked.data else []
    for seed in [seed for seed in asked.seeds if seed not in runs]:
        runs[seed] = one(asked.recipe, seed, Path("runs") / "bench" / f"{name}-{seed}", [*data, *options])
        print(runs[seed], flush=True)
        done = [runs[s] for s in sorted(runs)]
        top1 = [run["top1"] for run in done]
        record(
            name,
            {
                **same,
                "runs": done,
                "mean_top1": statistics.mean(top1),
                "spread_top1": max(top1) - min(top1),
                "largest_wall_seconds": max(run["wall_seconds"] for run in done),
            },
        )


if __name__ == "__main__":
    main()
