"""Train a recipe with several seeds, each by the command that a user types, and record scores and wall time.

    python bench/seeds.py digits --seeds 0 1 2 3 4
    python bench/seeds.py cifar10-quick --data DIR --seeds 0 1 2
    python bench/seeds.py cifar10-quick --data DIR --seeds 0 --name cifar10-quick-plain -- --stem

Options after `--` are passed to `vitrail train`. Seeds that results/NAME.json already has from the same command and the
same fields of the recipe are kept, and a run that was stopped resumes, so a long series can be run in several calls.
`--tiny` trains `digits` briefly.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

from harness import Parser, Row, machine, record, recorded, vitrail

from vitrail.recipes import RECIPES
from vitrail.train.folder import RunFolder
from vitrail.train.job import JOB

TINY = ("--epochs", "0.1", "--width", "16", "--depth", "1", "--heads", "2")


def parser() -> Parser:
    parser = Parser(__doc__, needs=["recipe"], passes_on=True, recipe="digits", words=TINY)
    parser.set_defaults(words=())
    parser.add_argument("recipe", nargs="?", choices=list(RECIPES))
    parser.add_argument("--data", help="as for `vitrail train`; the recipe's own if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", help="of the JSON file; the recipe's if left out")
    return parser


def main() -> None:
    args = parser().parse_args()
    recipe, name = args.recipe, args.name or args.recipe
    same = {"train": " ".join(["vitrail train", recipe, *args.train]), "recipe": RECIPES[recipe](50_000).fingerprint}
    before: Row = {} if args.tiny else recorded(name, args.results)
    kept = before["runs"] if all(before.get(key) == value for key, value in same.items()) else []
    runs = {run["seed"]: run for run in kept}
    words = [*(["--data", args.data] if args.data else []), *args.words, *args.train]
    for seed in [seed for seed in args.seeds if seed not in runs]:
        runs[seed] = one(recipe, seed, Path("runs") / "bench" / f"{name}-{seed}", words)
        print(runs[seed], flush=True)
        done = [runs[s] for s in sorted(runs)]
        record(name, {**same, "runs": done, **summary(done)}, args.results)


def one(recipe: str, seed: int, out: Path, words: list[str]) -> Row:
    """Scores and wall seconds of one whole command, with those of the commands that were stopped before it."""
    folder = RunFolder(out)
    if folder.scores is not None:
        shutil.rmtree(out)
    before = max((row.get("seconds", 0.0) for row in folder.rows()), default=0.0)
    # The same command of the same job resumes its run.
    scores, own = vitrail("train", recipe, "--seed", str(seed), "--out", str(out), *words, **{JOB: f"seeds of {out}"})
    seconds = round(before + own, 1)
    kept = ("split", "top1", "top5", "cross_entropy", "calibration_error", "parameters", "count")
    return {"seed": seed, "wall_seconds": seconds, "cores": machine()["cores"], **{k: scores[k] for k in kept}}


def summary(runs: list[Row]) -> Row:
    top1 = [run["top1"] for run in runs]
    return {
        "mean_top1": statistics.mean(top1),
        "spread_top1": max(top1) - min(top1),
        "largest_wall_seconds": max(run["wall_seconds"] for run in runs),
    }


if __name__ == "__main__":
    main()
