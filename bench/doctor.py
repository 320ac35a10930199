"""What `vitrail doctor` finds: faults of rendered data and of short runs, clean ones, and flipped labels of CIFAR-10.

    python bench/doctor.py --data DIR                  DIR contains cifar10/

Each fault is put into a rendered clean set (tests/bad_sets.py), and each faulty run trains for some seconds. For the
flipped labels, 40 of 2,000 training images get the label of another class, and the score is the fraction of them among
the first 5 % of the doctor's list. Rows that results/doctor.json has already are kept: a stopped measurement resumes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from harness import ROOT, Parser, Row, record, recorded

from vitrail.cli import main as vitrail
from vitrail.data.sets import Splits, open_data
from vitrail.data.targets import Labels
from vitrail.doctor import examine
from vitrail.doctor.labels import judge
from vitrail.doctor.survey import survey
from vitrail.zoo import create

sys.path.insert(0, str(ROOT / "tests"))
from bad_sets import CLEAN, FAULTS, Fault, captioned, clean, masked

FLIPPED, LISTED = 0.02, 0.05
QUIET = ("--device", "cpu", "--workers", "0")
DIGITS = ("digits", "--max-steps", "100", "--batch-size", "32", *QUIET)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rate too high": ("rate-too-high", (*DIGITS, "--lr", "1", "--muon-lr", "4")),
    "rate too low": ("rate-too-low", (*DIGITS, "--lr", "1e-7", "--muon-lr", "1e-7")),
    "wrong mean and std": ("wrong-mean-std", (*DIGITS, "--mean", "124", "--std", "58")),
    "frozen by mistake": ("frozen", (*DIGITS, "--lr", "0", "--muon-lr", "0", "--weight-decay", "0")),
    # Dark images do not suffice: the network's norms restore their contrast, and it learns.
    "collapsed": ("collapsed", (*DIGITS, "--optimizer", "adamw", "--lr", "0.3")),
    "starved for data": (
        "starved",
        ("folder", "--data", "HUGE", "--epochs", "30", "--memory", "False", "--patch", "16", *QUIET),
    ),
    "overfit": (
        "overfit",
        ("folder", "--data", "FEW", "--epochs", "150", "--eval-every", "30", "--image-size", "32", "32", *QUIET),
    ),
    "loaded nothing": ("loaded-nothing", (*DIGITS, "--init", "NEW")),
}
"""runs: the finding that names each, and the words of `vitrail train`"""
HEALTHY = {"digits": ("digits", "--max-steps", "200", "--batch-size", "32", *QUIET)} | {
    name: ("folder", "--data", name, "--max-steps", "60", "--image-size", "32", "32", *QUIET) for name in CLEAN
}
"""runs that learn"""


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"], count=100, seeds=[0], runs=False)
    parser.set_defaults(count=2000, runs=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def main() -> None:
    logging.getLogger("vitrail").setLevel(logging.ERROR)
    args = parser().parse_args()
    rows: Row = {} if args.tiny else recorded("doctor", args.results)
    with tempfile.TemporaryDirectory() as place:
        flipped = rows.setdefault("flipped labels", {})
        for seed in args.seeds:
            if str(seed) not in flipped:
                path = args.data / "cifar10" if args.data else clean(Path(place) / "tiny", "waves")
                flipped[str(seed)] = flip(open_data(path), args.count, seed)
                each = [row["found"] for name, row in flipped.items() if name != "mean"]
                flipped["mean"] = {"found": statistics.mean(each), "seeds": len(each)}
                print(seed, flipped[str(seed)], flush=True)
                record("doctor", rows, args.results)
        for kind, name, job in jobs_of(Path(place), args.runs):
            if name not in rows.setdefault(kind, {}):
                rows[kind][name] = job()
                print(kind, name, rows[kind][name], flush=True)
                record("doctor", rows, args.results)


def jobs_of(place: Path, runs: bool) -> list[tuple[str, str, Callable[[], Row]]]:
    """What is measured: the kind, the name, and a function that gives the row."""
    jobs: list[tuple[str, str, Callable[[], Row]]] = [
        ("data", name, partial(of_fault, place / name, fault)) for name, fault in FAULTS.items()
    ]
    kinds: dict[str, Callable[[Path], Path]] = {name: partial(clean, name=name) for name in CLEAN}
    kinds |= {"captions": captioned, "masks": masked}
    jobs += [("clean data", name, partial(of_clean, make, place / f"clean-{name}")) for name, make in kinds.items()]
    if runs:
        jobs += [("runs", name, partial(of_run, place, name, words, check)) for name, (check, words) in RUNS.items()]
        jobs += [
            ("healthy runs", name, partial(of_run, place, f"healthy-{name}", words)) for name, words in HEALTHY.items()
        ]
    return jobs


def named(path: Path) -> Row:
    """The findings of data or of a run, by their names."""
    return {"findings": [finding.check for finding in examine(str(path)).findings]}


def of_clean(make: Callable[[Path], Path], place: Path) -> Row:
    """What the doctor names in a set without faults."""
    return named(make(place))


def of_fault(place: Path, fault: Fault) -> Row:
    """Whether the fault is found, with all that it names, and which findings there are."""
    root = fault.base(place)
    expected = fault.make(root)
    findings = examine(str(root), images=500 if fault.check == "mislabelled" else 0).findings
    own = " ".join(name for finding in findings if finding.check == fault.check for name in finding.where)
    return {"named": all(text in own for text in expected), "findings": [finding.check for finding in findings]}


def of_run(place: Path, name: str, words: tuple[str, ...], check: str = "") -> Row:
    """Train, and examine the run; which of its hints were logged while it trained."""
    sets: dict[str, Callable[[], Path]] = {
        "HUGE": lambda: huge(place / "huge"),
        "FEW": lambda: few(place / "few"),
        "NEW": lambda: new(place / "new"),
        **{own: partial(there, place / f"run-{own}", own) for own in CLEAN},
    }
    given = [str(sets[word]()) if word in sets else word for word in words]
    out, told = place / f"run {name}", io.StringIO()
    handler = logging.StreamHandler(told)
    logger = logging.getLogger("vitrail")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = vitrail(["train", *given, "--out", str(out)])
    if code:
        raise SystemExit(f"{name}: {said.getvalue()}")
    logger.removeHandler(handler)
    logger.setLevel(logging.ERROR)
    hints = [line.split(";")[0] for line in told.getvalue().splitlines() if line.startswith("hint: ")]
    found = named(out)
    return {
        **({"named": check in found["findings"]} if check else {}),
        **found,
        "hints": hints,
        "train": " ".join(words),
    }


def there(root: Path, name: str) -> Path:
    return root if root.exists() else clean(root, name)


def huge(root: Path) -> Path:
    """Images whose decoding takes longer than the network."""
    from PIL import Image

    for file in clean(root).rglob("*.png"):
        Image.open(file).resize((1600, 1600)).save(file)
    return root


def few(root: Path) -> Path:
    """Four images of each class to train on."""
    for file in (clean(root) / "train").rglob("*.png"):
        if int("".join(filter(str.isdigit, file.stem))) >= 4:
            file.unlink()
    return root


def new(root: Path) -> Path:
    """A checkpoint of a model that was never trained."""
    create("nano/2", classes=[str(i) for i in range(10)], channels=1).save(root)
    return root


def flip(data: Splits, count: int, seed: int) -> Row:
    """The fraction of flipped labels among the first of the list, and the time that judging took."""
    draw = torch.Generator().manual_seed(seed)
    images = data.train.subset(torch.randperm(len(data.train), generator=draw)[:count])
    labels, classes = images.labels.clone(), len(images.classes)
    at = torch.randperm(len(images), generator=draw)[: max(1, round(FLIPPED * len(images)))]
    labels[at] = (labels[at] + torch.randint(1, classes, (len(at),), generator=draw)) % classes
    found = survey(Splits(replace(images, target=Labels(labels, images.classes))))
    began, spent = time.monotonic(), time.process_time()
    judged = judge(found, len(images))
    assert judged is not None
    first = judged.order[: round(LISTED * len(images))]
    return {
        "found": torch.isin(at, first).double().mean().item(),
        "flipped": len(at),
        "images": len(images),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - spent, 1),
        "baselines": judged.baselines,
    }


if __name__ == "__main__":
    main()
