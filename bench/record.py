"""Writes what a benchmark found to `results/`, with what one needs to make it again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vitrail.files import write_whole
from vitrail.train.device import native_bf16

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PACKAGES = ("torchvision", "timm", "pillow", "simplejpeg", "pycocoevalcap")


def record(name: str, rows: dict[str, Any], results: Path = RESULTS) -> Path:
    """Write `results/<name>.json`, whole: the rows with command, commit, machine and date. Gives its path."""
    content = {
        "command": _command(),
        "commit": _git("rev-parse", "HEAD"),
        # What is measured, that is, and not the results that this command and others have written.
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": rows,
    }
    path = results / f"{name}.json"
    write_whole(path, json.dumps(content, indent=2) + "\n")
    return path


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
    return " ".join(["python", str(script), *portable(sys.argv[1:])])


def portable(words: list[str]) -> list[str]:
    """A command's words without folders of this machine, which say nothing elsewhere: `VITRAIL_DATA` finds data."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
