"""Token merging in a model with 256 tokens: how much faster inference is, and what it costs in accuracy.

    python bench/merging.py --data cifar10 --seeds 0 1 2

For each seed, `cifar10-quick` with patches of 2 pixels trains twice for as many steps: with `--merge` and without. Both
are scored on the validation split after the last step, and the plain model also with merging at load alone. A run is
kept in runs/bench/ and resumes where it stopped. Times are those of batches of images that take turns in one process.
Writes results/merging.json after each seed.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from harness import Parser, Row, in_turns, record, tiny_cifar10

from vitrail import zoo
from vitrail.cli import main as vitrail
from vitrail.start import score

MODEL = ("--patch", "2", "--stem", "32", "64", "--width", "64", "--heads", "2", "--early-size", "None")
TINY = (*MODEL, "--stem", "8", "--width", "16", "--depth", "2", "--batch-size", "4")


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"], seeds=[0, 1], steps=2, merge=[64], batch=4, rounds=2, model=TINY)
    parser.set_defaults(model=MODEL)
    parser.add_argument("--data", help="CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=900, help="of training")
    parser.add_argument(
        "--merge", type=int, nargs="+", default=[56, 40, 24, 16, 8, 0], help="tokens per block: one number, or one each"
    )
    parser.add_argument("--batch", type=int, default=64, help="images at once, for times")
    parser.add_argument("--rounds", type=int, default=25, help="batches of each model, for times")
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) if args.tiny else Path("runs") / "bench"
        data = str(tiny_cifar10(Path(place) / "data")) if args.tiny else args.data
        words = ["--data", data, "--max-steps", str(args.steps), *args.model]
        merge = list(map(str, args.merge))
        rows: list[Row] = []
        for seed in args.seeds:
            name = f"merging-{args.steps}-{seed}"
            plain = trained(runs / name, [*words, "--seed", str(seed)])
            merging = trained(runs / f"{name}-{'-'.join(merge)}", [*words, "--seed", str(seed), "--merge", *merge])
            scores = {
                "plain": top1(plain, data),
                "merging": top1(merging, data),
                "at_load": top1(plain, data, args.merge),
            }
            rows.append({"seed": seed, **scores, "loss": points(scores["plain"] - scores["merging"])})
            rows[-1]["loss_at_load"] = points(scores["plain"] - scores["at_load"])
            print(rows[-1], flush=True)
            command = " ".join(["vitrail train cifar10-quick --max-steps", str(args.steps), *args.model])
            common = {"train": command, "merge": args.merge, "split": "val", "runs": rows, **losses(rows)}
            times = inference(plain, merging, args.batch, args.rounds)
            record("merging", {**common, "inference": times}, args.results)
    for key in ("loss", "loss_at_load"):
        print(f"{key} of top-1 on val: {common[f'mean_{key}']} points, standard error {common[f'error_{key}']}")
    print(f"inference: {times['ratio']} times as fast ({times})")


def trained(out: Path, words: list[str]) -> Path:
    """The folder of a run of `cifar10-quick` that has finished; begins or resumes it."""
    if not (out / "state").exists():
        shutil.rmtree(out, ignore_errors=True)
        command = ["train", "cifar10-quick", *words, "--out", str(out), "--json"]
    else:
        command = ["train", "--resume", str(out), "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        if code := vitrail(command):
            raise SystemExit(code)
    return out


def top1(run: Path, data: str, merge: list[int] | None = None) -> float:
    """On the validation split that training held back, with the weights after the last step."""
    task = zoo.load(run / "last", merge=merge)
    with torch.inference_mode():
        return float(score(task, str(run), data, "val")[1]["top1"])


def points(difference: float) -> float:
    return round(100 * difference, 2)


def losses(rows: list[Row]) -> Row:
    """The means of the paired losses in points, and their standard errors: of the mean, None for one pair."""
    found: Row = {}
    for key in ("loss", "loss_at_load"):
        values = [row[key] for row in rows]
        found[f"mean_{key}"] = round(statistics.mean(values), 3)
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        found[f"error_{key}"] = None if error is None else round(error, 3)
    return found


def inference(plain: Path, merging: Path, batch: int, rounds: int) -> Row:
    """Milliseconds of a batch in float32, and how many times as fast merging is: the median over pairs of turns."""
    tasks = {name: zoo.load(run / "last") for name, run in (("plain", plain), ("merging", merging))}
    images = torch.randn(batch, 3, *tasks["plain"].preprocess.size)
    with torch.inference_mode():
        times = in_turns({name: partial(task, images) for name, task in tasks.items()}, rounds, warm_up=3)
    ratios = [slow / fast for slow, fast in zip(times["plain"], times["merging"], strict=True)]
    found: Row = {name: round(1000 * statistics.median(each), 2) for name, each in times.items()}
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "milliseconds": found,
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
    }


if __name__ == "__main__":
    main()
