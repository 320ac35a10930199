"""Runs that are killed at random moments and resumed: does each end as the run that nothing disturbed?

    python bench/kills.py [--kills 50] [--seed 0] [--tiny]

Small runs of every kind (classification, LoRA, captions, segmentation; in memory and streamed by workers; with mixup,
accumulation, compilation and an EMA) are killed by SIGKILL and resumed, until each of the kills has hit a training.
Every third kill hits between a write and the rename that puts the new file in its place; the others hit after a random
time. At the end the weights of `best/` and `last/`, the log without times, and the scores must be those of a run that
nothing disturbed, to the bit. Processes are forked, so that none waits for imports. `--tiny` kills three runs once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import Parser, Row, record, tiny_captions, tiny_images, tiny_streets

from vitrail.cli import main as vitrail
from vitrail.train.folder import RunFolder

TIMES = ("seconds", "images_per_s", "wait")
INJECTED = 3
"""one kill in so many hits between a write and its rename"""
RENAMES = 30
"""the last rename that such a kill may prevent; a run has more"""
ENCODER = [
    "--width",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--image-size",
    "16",
    "--device",
    "cpu",
    "--save-every",
    "2",
]
IMAGES = [*ENCODER, "--stem", "4", "--batch-size", "8", "--max-steps", "24", "--eval-every", "2"]
STREAMED = ["--memory", "False", "--workers", "2"]
CAPTIONS = [
    *(*ENCODER, "--stem", "--patch", "8", "--decoder-width", "16", "--decoder-depth", "1", "--decoder-heads", "2"),
    *("--vocabulary", "words", "--vocabulary-size", "40", "--max-length", "8", "--batch-size", "4"),
    *("--max-steps", "20", "--eval-every", "3"),
]
STREETS = [
    *(*ENCODER, "--global-blocks", "0", "--crop-fraction", "1", "--batch-size", "2"),
    *("--max-steps", "20", "--eval-every", "3"),
]
FOLDER = ["train", "folder", "--data", "images", *IMAGES, "--mixup", "0.3"]
RUNS: dict[str, list[str]] = {
    "classify, in memory, mixup, EMA": [*FOLDER, "--ema", "0.9"],
    "classify, streamed, mixup, accumulation": [*FOLDER, *STREAMED, "--accumulate", "2"],
    "captions, streamed, EMA": ["train", "caption-vit", "--data", "captions", *CAPTIONS, *STREAMED, "--ema", "0.9"],
    "segmentation, streamed": ["train", "segment", "--data", "streets", *STREETS, *STREAMED],
    "captions, in memory": ["train", "caption-vit", "--data", "captions", *CAPTIONS],
    "segmentation, in memory, EMA": ["train", "segment", "--data", "streets", *STREETS, "--ema", "0.9"],
    "classify, LoRA, streamed, EMA": [
        *("train", "finetune", "--init", "base", "--data", "images", "--method", "lora", "--lora-rank", "2"),
        *("--batch-size", "8", "--max-steps", "24", "--eval-every", "2", "--save-every", "2", "--ema", "0.9"),
        *("--device", "cpu", *STREAMED),
    ],
    "classify, compiled": ["train", "folder", "--data", "images", *IMAGES, "--compile"],
}
TINY = ("classify, in memory, mixup, EMA", "captions, streamed, EMA", "segmentation, streamed")


def parser() -> Parser:
    parser = Parser(__doc__, kills=3, runs=TINY)
    parser.set_defaults(runs=tuple(RUNS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> int:
    args = parser().parse_args()
    rows: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "compiled")
        make_data()
        for i, name in enumerate(args.runs):
            count = args.kills // len(args.runs) + (i < args.kills % len(args.runs))
            rows[name] = measure(name, count, random.Random(f"{args.seed} {name}"))
            print(f"{name}: {rows[name]}", file=sys.stderr)
    counts = ("kills", "between write and rename", "runs", "identical")
    total = {what: sum(row[what] for row in rows.values()) for what in counts}
    print(json.dumps(total))
    record("kills", {"total": total, "seed": args.seed, **rows}, args.results)
    return 0 if total["identical"] == total["runs"] else 1


def make_data() -> None:
    """Small sets of each kind, and a model to fine-tune."""
    for split in ("train", "val", "test"):
        tiny_images(Path("images", split), ("cat", "dog", "sea"), 12 if split == "train" else 4, (20, 24))
    tiny_captions(Path("captions"), 8)
    Path("streets").mkdir()
    tiny_streets(Path("streets"), ("bright", "dark"))
    assert wait(start([*RUNS[TINY[0]], "--out", "base"])) == 0, Path("log").read_text()


def measure(name: str, kills: int, draw: random.Random) -> Row:
    """Kill runs of one kind until `kills` have hit; each ended run is compared with an undisturbed one."""
    words, place = RUNS[name], name.replace(",", "").replace(" ", "-")
    began = time.monotonic()
    assert wait(start([*words, "--out", f"{place}-whole"])) == 0, Path("log").read_text()
    seconds = time.monotonic() - began
    expected = digests(Path(f"{place}-whole"))
    done: Row = {"kills": 0, "between write and rename": 0, "runs": 0, "identical": 0, "steps at the kills": []}
    for attempt in itertools.count():
        if done["kills"] == kills:
            break
        out, before = Path(f"{place}-{attempt}"), done["kills"]
        while True:
            command = ["train", "--resume", str(out), "--device", "cpu"] if begun(out) else [*words, "--out", str(out)]
            if done["kills"] == kills:
                code = wait(start(command))
            elif done["kills"] % INJECTED == INJECTED - 1:
                code = wait(start(command, draw.randint(1, RENAMES)))
            else:
                child = start(command)
                code = wait(child, time.monotonic() + draw.uniform(0.05, 0.8) * seconds)
            if code == 0:
                break
            assert code == -signal.SIGKILL, Path("log").read_text()
            done["between write and rename"] += done["kills"] % INJECTED == INJECTED - 1
            done["kills"] += 1
            done["steps at the kills"].append(max((row["step"] for row in RunFolder(out).rows()), default=0))
        done["runs"] += done["kills"] > before  # one that ended before its kill shows nothing
        if different := [what for what, digest in digests(out).items() if expected[what] != digest]:
            print(f"{name}: {', '.join(different)} differ", file=sys.stderr)
        done["identical"] += done["kills"] > before and not different
    return done


def begun(out: Path) -> bool:
    """Whether there is a run to resume: this file is the last that a new run writes before it trains."""
    return (out / "recipe.json").exists()


def start(words: Sequence[str], rename: int | None = None) -> int:
    """The process of a command; with `rename` it kills itself in place of its rename of that number."""
    child = os.fork()
    if child:
        return child
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if rename is not None:
        os.replace = killing(os.replace, rename)
    code = 1
    try:
        code = vitrail(words)
    finally:
        sys.stderr.flush()
        os._exit(code)


def killing(replace: Callable[..., None], last: int) -> Callable[..., None]:
    """A rename, but the one of the number `last` kills the process."""
    calls = 0

    def replaced(*args: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args, **named)

    return replaced


def wait(child: int, until: float | None = None) -> int:
    """The exit code of a process, minus the number of a signal; at the time `until` it is killed."""
    while until is not None and time.monotonic() < until:
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    if until is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(out: Path) -> dict[str, str]:
    """What must not depend on interruptions, hashed: weights, log and scores."""
    files = {f"{name} weights": (out / name / "model.safetensors").read_bytes() for name in ("best", "last")}
    rows = [row for row in RunFolder(out).rows() if row["kind"] != "start"]
    timeless = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    scores = {name: value for name, value in json.loads((out / "scores.json").read_text()).items() if name not in TIMES}
    files |= {"log": json.dumps(timeless).encode(), "scores": json.dumps(scores).encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


if __name__ == "__main__":
    sys.exit(main())
