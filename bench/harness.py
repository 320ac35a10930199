"""Shared by the scripts in this folder: options, running commands, timing, tiny data and results."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitrail.files import write_atomic
from vitrail.process import cores
from vitrail.tasks.task import Task
from vitrail.train.device import native_bf16
from vitrail.zoo import create

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PACKAGES = ("torchvision", "timm", "pillow", "simplejpeg", "pycocoevalcap")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = ("train", "val", "test")
Row = dict[str, Any]


# ---- options


class Parser(argparse.ArgumentParser):
    """The options of a script. Its docstring is the help; every script has `--results` and `--tiny`."""

    def __init__(self, text: str | None, needs: Sequence[str] = (), passes_on: bool = False, **tiny: Any) -> None:
        """`tiny` are the defaults with `--tiny`. Options in `needs` are required without it.

        `passes_on`: arguments after `--` are stored as `train`, for `vitrail train`.
        """
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.needs, self.passes_on, self.tiny = needs, passes_on, tiny
        results = "folder of the JSON file: results/, or with --tiny runs/tiny/"
        self.add_argument("--results", type=Path, metavar="DIR", default=RESULTS, help=results)
        self.add_argument(
            "--tiny", action="store_true", help="try the whole script on tiny synthetic input; the figures mean nothing"
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse, except that arguments after `--` are not positional arguments of the script."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if self.passes_on and "--" in words else len(words)
        if "--tiny" in words[:end]:
            self.set_defaults(results=ROOT / "runs" / "tiny", **self.tiny)
        found, rest = super().parse_known_args(words[:end], namespace)
        found.train = words[end + 1 :]
        if missing := [name for name in self.needs if not found.tiny and not getattr(found, name)]:
            self.error(f"{missing[0]} is needed, or --tiny to try the script without")
        if found.tiny and found.results.resolve() == RESULTS:
            self.error("--tiny writes no published results: choose another folder for --results")
        return found, rest


# ---- whole commands and timing


def vitrail(*words: str, **environment: str) -> tuple[Row, float]:
    """The output of `vitrail WORDS --json`, and the wall seconds of the whole command."""
    began = time.monotonic()
    command = [sys.executable, "-m", "vitrail", *words, "--json"]
    environment = {**os.environ, **environment}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(printed), round(time.monotonic() - began, 1)


def seconds(step: Callable[[], object], calls: int = 1, device: str = "cpu") -> float:
    """Mean seconds of `calls` calls, until a GPU has finished them."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return (time.perf_counter() - began) / calls


def in_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, calls: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each step in each round. The steps alternate, so other load on the machine affects all equally."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, calls, device))
    return times


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, precision: torch.dtype, backend: str | None = None
) -> Callable[[], None]:
    """A function that makes one training step as in a plain script: autocast and fused AdamW, compiled by `backend`."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, fused=True)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, backend=backend) if backend else model

    def step() -> None:
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def random_model(size: str, **config: Any) -> Task:
    """A classifier whose logits differ. The head of a new one is zero: then everything would agree with it."""
    torch.manual_seed(0)
    task: Any = create(size, classes=1000, **config)
    nn.init.normal_(task.head.linear.weight, std=task.encoder.config.width**-0.5)
    return task.eval()


# ---- tiny data


def tiny_images(folder: Path, classes: Sequence[str], each: int, size: tuple[int, int] = (40, 32)) -> Path:
    """A folder with `each` JPEGs of `size` (width, height) per class: a smooth random image of the class and noise."""
    draw = np.random.default_rng(0)
    for name in classes:
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noisy = smooth + draw.integers(-20, 21, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{name}_{i}.jpg", quality=95)
    return folder


def tiny_cifar10(folder: Path) -> Path:
    """`train/` and `test/` with two images of each of CIFAR-10's classes."""
    for split in ("train", "test"):
        tiny_images(folder / split, CIFAR10, 2, (32, 32))
    return folder


def tiny_captions(folder: Path, each: int) -> Path:
    """A captioned set whose splits have `each` images of each of two kinds, with two captions per image."""
    texts = {
        "dog": ("a dog runs over the grass .", "a brown dog is running in a field ."),
        "sea": ("two children play in the water .", "children are playing in the sea ."),
    }
    tiny_images(folder / "images", list(texts), each * len(SPLITS), (160, 140))
    lines = [
        f"{kind}/{kind}_{i}.jpg,{text},{SPLITS[i % len(SPLITS)]}\n"
        for kind, own in texts.items()
        for i in range(each * len(SPLITS))
        for text in own
    ]
    (folder / "captions.csv").write_text("image,caption,split\n" + "".join(lines))
    return folder


def tiny_streets(folder: Path, classes: Sequence[str]) -> Path:
    """`train/` and `val/` with four images of 48x64 pixels; the left half is the first class, the right the second."""
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i in range(4):
            mask = np.repeat([[0] * 30 + [1] * 34], 48, axis=0).astype(np.uint8)
            pixels = draw.integers(0, 100, (48, 64, 3)).astype(np.uint8) + 100 * mask[..., None]
            Image.fromarray(pixels).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i}.png")
    return folder


# ---- results


def recorded(name: str, results: Path) -> Row:
    """The rows of `NAME.json`; {} if there is no such file."""
    file = results / f"{name}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else {}


def record(name: str, rows: Row, results: Path) -> Path:
    """Write `NAME.json` atomically: the rows with command, commit, machine and date. Returns its path.

    Raises ValueError if a number is not finite.
    """
    refuse_infinite(rows)
    content = {
        "command": _command(),
        **code(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": rows,
    }
    path = results / f"{name}.json"
    write_atomic(path, json.dumps(content, indent=2) + "\n")
    return path


def refuse_infinite(value: object, place: str = "rows") -> None:
    """Raise ValueError, with its place, for the first number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}, which is not a result")
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, each in inside:
        refuse_infinite(each, f"{place}, {key}")


def code() -> Row:
    """The commit, and whether a tracked file differs from it; results do not count, which scripts write."""
    changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"))
    return {"commit": _git("rev-parse", "HEAD"), "changed": changed}


def machine() -> Row:
    """The machine and versions that the figures were measured with."""
    found: Row = {
        "cpu": _cpu(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2),
        "bf16": native_bf16(torch.device("cpu")),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _command() -> str:
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return shlex.join(["python", str(script), *portable(sys.argv[1:])])


def portable(words: list[str]) -> list[str]:
    """A command's words without this machine's folders, which do not exist elsewhere: `VITRAIL_DATA` finds data."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
