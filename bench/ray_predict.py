"""Prediction by a Ray cluster with a worker killed midway: does each image have one row?

    python bench/ray_predict.py

draws 20,000 images of 32 pixels, of which 20 are damaged, predicts for them with `vitrail cluster ray predict`, a very
small model with random weights and local workers, and kills one worker (SIGKILL) when a third of the rows is written.
It counts the rows of the Parquet files: all, those of an image that has another row, those missing, and those with an
error. The same command is then given again, which must find nothing to do. Needs Linux, and Ray. `--tiny` uses 200
images.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from harness import Parser, Row, record
from PIL import Image

import vitrail

PER_FOLDER = 1_000


def parser() -> Parser:
    parser = Parser(__doc__, images=200, bad=2)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--bad", type=int, default=20, help="damaged images among them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=100)
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        files = draw(root / "images", args.images, args.bad)
        torch.manual_seed(0)
        vitrail.create("nano/2", classes=10).save(root / "model")
        out = root / "rows"
        began = time.monotonic()
        killed = predict_and_kill(root / "images", out, args)
        seconds = time.monotonic() - began
        named = Counter(ds.dataset(out).to_table(columns=["image"]).column("image").to_pylist())
        errors = ds.dataset(out).to_table(columns=["error"]).column("error")
        before = sorted(path.name for path in out.iterdir())
        again = predict(root / "images", out, args).wait()
        rows: Row = {
            "images": len(files),
            "damaged": args.bad,
            "workers": args.workers,
            "workers killed": len(killed),
            "rows when the worker was killed": killed[0] if killed else None,
            "rows": sum(named.values()),
            "rows of an image that has another": sum(named.values()) - len(named),
            "images without a row": len({*map(str, files)} - named.keys()),
            "rows with an error": len(errors) - errors.null_count,
            "seconds": round(seconds, 1),
            "exit code of the same command again": again,
            "files that it added": len({*(path.name for path in out.iterdir())} - {*before}),
        }
    print(", ".join(f"{name}: {value}" for name, value in rows.items()))
    print(f"written to {record('ray-predict', rows, args.results)}", file=sys.stderr)


def draw(folder: Path, count: int, bad: int) -> list[Path]:
    """Small images, of which `bad` are cut off."""
    draw = np.random.default_rng(0)
    files = [folder / f"{i // PER_FOLDER:03d}" / f"{i:06d}.png" for i in range(count)]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(file)
        if bad and i % (count // bad) == 7:
            file.write_bytes(file.read_bytes()[:100])
    return files


def predict(images: Path, out: Path, args: Namespace) -> subprocess.Popen[bytes]:
    words = ["cluster", "ray", "predict", str(images.with_name("model")), "--data", str(images), "--out", str(out)]
    words += ["--workers", str(args.workers), "--batch-size", str(args.batch_size), "--address", "local"]
    return subprocess.Popen([sys.executable, "-m", "vitrail", *words])


def predict_and_kill(images: Path, out: Path, args: Namespace) -> list[int]:
    """Predict, and kill a worker while it works; returns how many rows were written then, or [] if it was too late."""
    process = predict(images, out, args)
    killed: list[int] = []
    while process.poll() is None:
        time.sleep(0.2 if args.tiny else 2.0)
        written = 0 if not out.exists() else sum(pq.read_metadata(p).num_rows for p in out.glob("rows-*.parquet"))
        busy = workers_of(process.pid)
        if not killed and busy and (written >= args.images / 3 or args.tiny):
            os.kill(busy[0], signal.SIGKILL)
            killed.append(written)
    if process.returncode:
        raise SystemExit(f"vitrail cluster ray predict ended with exit code {process.returncode}")
    return killed


def workers_of(pid: int) -> list[int]:
    """The processes below this one that hold a model."""
    found, ahead = [], [pid]
    while ahead:
        own = ahead.pop()
        try:
            title = Path(f"/proc/{own}/cmdline").read_bytes()
            ahead += [
                int(x) for task in Path(f"/proc/{own}/task").iterdir() for x in (task / "children").read_text().split()
            ]
        except OSError:  # it has ended meanwhile
            continue
        if title.startswith(b"ray::MapWorker") and b"__init__" not in title:
            found.append(own)
    return found


if __name__ == "__main__":
    main()
