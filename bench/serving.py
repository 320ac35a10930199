"""`vitrail serve` under load, beside the engine's own rate and beside LitServe, in one run.

    pip install litserve
    python bench/serving.py --photos DIR
    python bench/serving.py --seconds 20                                      a rehearsal, on made-up photos
    python bench/serving.py --clients 256 --more 0 --seconds 20 --share 1     on a GPU, in about three minutes

A ViT-B/16 with random weights (S/16 where B/16 gives under 4 images per second) answers JPEGs. The load generator is a
process that uses a fixed share of one core, which is also kept busy while the engine's own rate in the largest batch is
measured. LitServe gets the same engine, largest batch, longest wait and JPEGs. The queue takes twice the clients of the
first load, and less than those of the second. A client that gets 503 waits as long as Retry-After says, at most a
second.

Results are written after each stage, and `--resume` continues after the last one of the same settings. The whole takes
four times `--seconds`, and a minute or two for starts. `--tiny` serves a tiny model for two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, Parser, Row, code, record, recorded
from PIL import Image

import vitrail
from vitrail.serve import engines
from vitrail.serve.settings import Settings
from vitrail.zoo import load

LEAST_RATE = 4.0
"""images per second: with fewer a minute of load says little"""
GOAL = 0.9
"""of the engine's own rate, and of the first load's under the second"""
PROBE = 15.0
"""seconds in which a size shows whether it is fast enough"""


def parser() -> Parser:
    parser = Parser(__doc__, seconds=2.0, clients=4, more=12, size="nano/2", batch=4)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; default: made-up ones of 400x300 pixels")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--more", type=int, default=192, help="clients of a load that the queue does not take; 0: none")
    parser.add_argument("--size", help="of the model; default: B/16, or S/16 on a slow machine")
    parser.add_argument("--batch", type=int, default=32, help="the largest batch")
    parser.add_argument("--share", type=float, default=0.1, help="of a core, which the load generator uses")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", help="default: the best")
    parser.add_argument("--resume", action="store_true", help="keep the stages of an earlier run with these settings")
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
        batch, batches = engines.noise_samples(engine.task, args.batch), 0
        command = [sys.executable, "-c", f"{BURN}burn({args.share})"]
        with engine.autocast(), subprocess.Popen(command) as burner:
            engine.task.answers(batch)
            began = time.monotonic()
            while time.monotonic() - began < args.seconds or batches < 2:
                engine.task.answers(batch)
                batches += 1
            rate = batches * args.batch / (time.monotonic() - began)
            burner.kill()
        return {"engine": engine.name, "images_per_second": round(rate, 2), "batches": batches}


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
        with suppress(subprocess.TimeoutExpired):
            process.wait(100)
        with suppress(ProcessLookupError):  # workers that outlive their server
            os.killpg(process.pid, signal.SIGKILL)


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
    found = [path for path in sorted(given.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")] if given else []
    if given and not found:
        raise SystemExit(f"{given} has no JPEGs")
    for number, path in enumerate(found[:64]):
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
    names = ("seconds", "clients", "more", "size", "batch", "share", "engine", "device")
    settings = {name: getattr(args, name) for name in names}
    rows = recorded("serving", args.results) if args.resume else {}
    if rows.get("settings") != settings or rows.get("commit") != code()["commit"]:
        rows = {"settings": settings, "commit": code()["commit"]}

    def keep(name: str, run: Callable[[], Row]) -> Row:
        """The row of a stage: measured now, unless it is there."""
        if name not in rows:
            began = time.monotonic()
            row = run()
            rows[name] = {**row, "wall_seconds": round(time.monotonic() - began)}
            record("serving", rows, args.results)
        found: Row = rows[name]
        return found

    with tempfile.TemporaryDirectory() as place:
        photos = photos_in(Path(place) / "photos", args.photos)
        rows["model"] = choose_size(args, Path(place), keep)
        own = keep("own", lambda: printed([*OWN, *flags(args, *OWN_FLAGS)]))
        args.engine = own["engine"]
        if any(name not in rows for name in loads(args)):
            serve_vitrail(args, photos, keep)
        if find_spec("litserve") is None:
            rows["litserve"] = "not installed: pip install litserve"
        else:
            keep("litserve", lambda: serve_litserve(args, photos))
    compare(args, rows)
    print(json.dumps(rows, indent=1))
    print(record("serving", rows, args.results))


Keep = Callable[[str, Callable[[], Row]], Row]
OWN = [sys.executable, str(ROOT / "bench" / "serving.py"), "--role", "engine"]
OWN_FLAGS = ("seconds", "batch", "share", "engine", "device", "model")
# Beside it are files that are called like packages, which must not be found first.
LIT = [sys.executable, "-P", str(ROOT / "bench" / "peers" / "lit.py")]


def choose_size(args: argparse.Namespace, folder: Path, keep: Keep) -> str:
    """Write the model that is served to `args.model`: B/16, or S/16 where a few batches show that B/16 is too slow."""

    def written(size: str) -> Path:
        path = folder / size.replace("/", "-")
        torch.manual_seed(0)
        vitrail.create(size, classes=1000).save(path)
        return path

    size = args.size or "B/16"
    args.model = written(size)
    if args.size is None:
        short = argparse.Namespace(**{**vars(args), "seconds": min(PROBE, args.seconds)})
        probe = keep("probe of B/16", lambda: printed([*OWN, *flags(short, *OWN_FLAGS)]))
        if probe["images_per_second"] < LEAST_RATE:
            size = "S/16"
            args.model = written(size)
    return size


def loads(args: argparse.Namespace) -> dict[str, int]:
    """The clients of each load, by the name of its stage."""
    return {f"vitrail_{clients}": clients for clients in (args.clients, args.more) if clients}


def serve_vitrail(args: argparse.Namespace, photos: Path, keep: Keep) -> None:
    args.port = free_port()
    command = [sys.executable, "-m", "vitrail", "serve", f"model={args.model}", "--port", str(args.port)]
    command += ["--engine", args.engine, "--max-batch", str(args.batch), "--timeout", "120"]
    command += ["--queue", str(2 * args.clients)]
    with started(command + (["--device", args.device] if args.device else []), args.port):
        warm_up(args, photos, "/v1/predict")
        for name, clients in loads(args).items():
            keep(name, partial(loaded, args, photos, "/v1/predict", clients, args.seconds))


def serve_litserve(args: argparse.Namespace, photos: Path) -> Row:
    args.port = free_port()
    with started([*LIT, *flags(args, "model", "engine", "device", "batch", "port")], args.port):
        warm_up(args, photos, "/predict")
        return loaded(args, photos, "/predict", args.clients, args.seconds)


def warm_up(args: argparse.Namespace, photos: Path, path: str) -> None:
    """A short load, which also waits until the models are loaded."""
    loaded(args, photos, path, args.clients, min(5.0, args.seconds))


def compare(args: argparse.Namespace, rows: Row) -> None:
    """The ratios, and whether each goal is met."""
    first = rows[f"vitrail_{args.clients}"]
    rate = first["images_per_second"]
    rows["of_own_rate"] = round(rate / rows["own"]["images_per_second"], 3)
    goals = {"of the own rate": rows["of_own_rate"] >= GOAL, "no failed request": set(first["statuses"]) == {"200"}}
    if args.more:
        more = rows[f"vitrail_{args.more}"]
        rows["kept_with_more_clients"] = round(more["images_per_second"] / max(rate, 1e-9), 3)
        goals["kept with more clients"] = rows["kept_with_more_clients"] >= GOAL
        goals["only 200 and 503"] = more["failed"] == 0
    if isinstance(rows["litserve"], dict):
        rows["of_litserve"] = round(rate / max(rows["litserve"]["images_per_second"], 1e-9), 3)
        goals["not below LitServe"] = rows["of_litserve"] >= 1
    # A client that needs more of its core than it was given would take it from the server.
    found = [rows[name]["share_of_a_core"] for name in loads(args)]
    goals["the clients kept to their share"] = all(share <= 1.2 * args.share for share in found)
    rows["goals"] = goals


if __name__ == "__main__":
    main()
