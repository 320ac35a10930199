"""`vitrail serve` under load, beside the engine's own rate and beside LitServe, in one run.

    python bench/serving.py --photos DIR
    python bench/serving.py --seconds 20            a rehearsal, on made-up photos

A ViT-B/16 with random weights (S/16 where B/16 gives under 4 images per second) answers JPEGs. The load generator is a
process that uses a fixed share of one core, which is also kept busy while the engine's own rate in the largest batch is
measured. LitServe gets the same engine, largest batch, longest wait and JPEGs. A client that gets 503 waits as long as
Retry-After says, at most a second. `--tiny` serves a tiny model for two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, Parser, Row, record
from PIL import Image

import vitrail
from vitrail.serve import engines
from vitrail.serve.settings import Settings
from vitrail.zoo import load

LEAST_RATE = 4.0
"""images per second: with fewer a minute of load says little"""


def parser() -> Parser:
    parser = Parser(__doc__, seconds=2.0, clients=4, more=12, size="nano/2", batch=4)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; default: made-up ones of 400x300 pixels")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--more", type=int, default=192, help="clients of the load that is more than the queue takes")
    parser.add_argument("--size", help="of the model; default: B/16, or S/16 on a slow machine")
    parser.add_argument("--batch", type=int, default=32, help="the largest batch")
    parser.add_argument("--share", type=float, default=0.1, help="of a core, which the load generator uses")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", help="default: the best")
    parser.add_argument("--role", choices=("engine",), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return parser


# ---- what answers


def engine_of(args: argparse.Namespace, places: ExitStack) -> engines.Engine:
    settings = Settings(engine=args.engine, max_batch=args.batch)
    task = load(args.model, device=args.device)
    return engines.choose(str(args.model), task, settings, time.monotonic() + settings.measure, places)


def own_rate(args: argparse.Namespace) -> Row:
    """Images per second of the engine alone in its largest batch, with the load generator's share kept busy."""
    with ExitStack() as places:
        engine = engine_of(args, places)
        batch = engines.samples(engine.task, args.batch)
        rates: list[float] = []
        engine.task.answers(batch)
        command = [sys.executable, "-c", f"{BURN}burn({args.share})"]
        with subprocess.Popen(command) as burner:
            until = time.monotonic() + args.seconds
            while time.monotonic() < until or len(rates) < 2:
                began = time.monotonic()
                engine.task.answers(batch)
                rates.append(args.batch / (time.monotonic() - began))
            burner.kill()
        return {"engine": engine.name, "images_per_second": round(statistics.fmean(rates), 2), "batches": len(rates)}


BURN = """
import time
def burn(share):
    began = time.monotonic()
    while True:
        if time.process_time() < share * (time.monotonic() - began):
            continue
        time.sleep(0.005)
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def started(command: list[str], port: int) -> Iterator[None]:
    """A server in a process of its own, once it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, command
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(100)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


# ---- the whole


def flags(args: argparse.Namespace, *names: str) -> list[str]:
    """Options for another process."""
    values = {name: getattr(args, name) for name in names}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def printed(command: list[str]) -> Row:
    """The last line of what a process prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr)
    return found


def loaded(args: argparse.Namespace, photos: Path, path: str, clients: int, seconds: float) -> Row:
    """What clients see of a server on `args.port`."""
    given = {"photos": photos, "port": args.port, "path": path, "clients": clients, "seconds": seconds}
    options = [word for key, value in {**given, "share": args.share}.items() for word in (f"--{key}", str(value))]
    return printed([sys.executable, str(ROOT / "bench" / "peers" / "http_load.py"), *options])


def photos_in(folder: Path, given: Path | None) -> Path:
    """A folder of up to 64 JPEGs."""
    folder.mkdir()
    for number, path in enumerate(sorted(given.rglob("*.jpg"))[:64] if given else ()):
        (folder / f"{number}.jpg").write_bytes(path.read_bytes())
    draw = np.random.default_rng(0)
    for number in range(0 if given else 16):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return folder


def main() -> None:
    args = parser().parse_args()
    if args.role == "engine":
        print(json.dumps(own_rate(args)))
    else:
        whole(args)


def whole(args: argparse.Namespace) -> None:
    own = [sys.executable, str(ROOT / "bench" / "serving.py"), "--role", "engine"]
    # Beside it are files that are called like packages, which must not be found first.
    lit = [sys.executable, "-P", str(ROOT / "bench" / "peers" / "lit.py")]
    rows: Row = {"share_of_a_core": args.share, "seconds": args.seconds, "largest_batch": args.batch}
    with tempfile.TemporaryDirectory() as place:
        photos = photos_in(Path(place) / "photos", args.photos)
        for size in [args.size] if args.size else ["B/16", "S/16"]:
            args.model = Path(place) / size.replace("/", "-")
            torch.manual_seed(0)
            vitrail.create(size, classes=1000).save(args.model)
            rows["own"] = printed([*own, *flags(args, "seconds", "batch", "share", "engine", "device", "model")])
            if rows["own"]["images_per_second"] >= LEAST_RATE:
                break
        rows["model"], args.engine, args.port = size, rows["own"]["engine"], free_port()
        command = [sys.executable, "-m", "vitrail", "serve", f"model={args.model}", "--port", str(args.port)]
        command += ["--engine", args.engine, "--max-batch", str(args.batch), "--timeout", "120"]
        with started(command + (["--device", args.device] if args.device else []), args.port):
            loaded(args, photos, "/v1/predict", args.clients, min(5.0, args.seconds))  # until it is warm
            for clients in (args.clients, args.more):
                rows[f"vitrail_{clients}"] = loaded(args, photos, "/v1/predict", clients, args.seconds)
        rows["litserve"] = "not installed"
        if find_spec("litserve") is not None:
            args.port = free_port()
            with started([*lit, *flags(args, "model", "engine", "device", "batch", "port")], args.port):
                loaded(args, photos, "/predict", args.clients, min(5.0, args.seconds))
                rows["litserve"] = loaded(args, photos, "/predict", args.clients, args.seconds)
    first, more = rows[f"vitrail_{args.clients}"], rows[f"vitrail_{args.more}"]
    rows["of_own_rate"] = round(first["images_per_second"] / rows["own"]["images_per_second"], 3)
    rows["kept_with_more_clients"] = round(more["images_per_second"] / max(first["images_per_second"], 1e-9), 3)
    if isinstance(rows["litserve"], dict):
        of_peer = first["images_per_second"] / max(rows["litserve"]["images_per_second"], 1e-9)
        rows["of_litserve"] = round(of_peer, 3)
    print(json.dumps(rows, indent=1))
    print(record("serving", rows, args.results))


if __name__ == "__main__":
    main()
