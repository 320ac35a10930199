"""The table of tasks at the top of the README: what each needs, costs and scores, from `results/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from table_data import Rows, read

PHOTOS = "243 photos of ants and bees"
TASKS: tuple[tuple[str, str, str, str, Callable[[Rows], tuple[str, str]]], ...] = (
    ("handwritten digits", "1,797 in the package", "vitrail train digits", "digits", lambda found: _series(found)),
    (
        "your own images, from scratch",
        PHOTOS,
        "vitrail train folder --data FOLDER",
        "folder",
        lambda found: _way(found, "scratch"),
    ),
    (
        "your own images, from the bundled weights",
        PHOTOS,
        "vitrail train folder --data FOLDER --init classify",
        "folder",
        lambda found: _way(found, "weights"),
    ),
    ("CIFAR-10", "50,000", "vitrail train cifar10-quick", "cifar10-quick", lambda found: _series(found)),
    ("CIFAR-10, better", "50,000", "vitrail train cifar10-laptop", "cifar10-laptop", lambda found: _series(found)),
    (
        "the class of every pixel",
        "367 of CamVid",
        "vitrail train segment --data camvid",
        "camvid",
        lambda found: _segmenters(found),
    ),
    (
        "captions",
        "6,000 of Flickr8k",
        "vitrail train caption-vit --data flickr8k --epochs 23.8",
        "ladder-e",
        lambda found: _captioners(found),
    ),
)
"""the task, the images that were trained on, the command, the file of results, and what it says: score and minutes"""


def tasks() -> list[list[str]]:
    """One row per task."""
    rows = [["task", "images", "score", "minutes", "command"]]
    for task, images, command, name, told in TASKS:
        found = read(name)
        score, minutes = ("", "") if found is None else told(found)
        rows.append([task, images, score, minutes, f"`{command}`"])
    return rows


def _series(found: Rows) -> tuple[str, str]:
    """Score and minutes of a file of `bench/seeds.py`, on the smallest number of cores that it was run on."""
    rows = found["rows"]
    cores = min(run["cores"] for run in rows["runs"])
    seconds = [run["wall_seconds"] for run in rows["runs"] if run["cores"] == cores]
    return f"{rows['mean_top1']:.1%} right", _minutes(seconds, cores)


def _way(found: Rows, way: str) -> tuple[str, str]:
    """Score and minutes of one way of training in `results/folder.json`."""
    rows, cores = found["rows"], found["machine"]["cores"]
    return f"{rows[f'{way} mean top-1']:.1%} right", _minutes([run[way]["wall_seconds"] for run in rows["runs"]], cores)


def _captioners(found: Rows) -> tuple[str, str]:
    """Score and minutes of a file of `bench/ladder.py`."""
    runs = found["rows"]["runs"]
    mean = sum(run["cider"] for run in runs) / len(runs)
    return f"CIDEr {mean:.2f}", _minutes([run["training_seconds"] for run in runs], runs[0]["cores"])


def _segmenters(found: Rows) -> tuple[str, str]:
    """Score and minutes of the first of the two commands that `bench/segment.py` runs."""
    runs = found["rows"]["ours"]["runs"]
    first = [run["crops"] for run in runs]
    mean = sum(run["miou"] for run in first) / len(first)
    return f"mIoU {mean:.1%}", _minutes([run["seconds"] for run in first], runs[0]["cores"])


def _minutes(seconds: list[Any], cores: int) -> str:
    """Of the quickest run: the others had less of a core."""
    return f"{min(seconds) / 60:.0f} on {'one core' if cores == 1 else f'{cores} cores'}"
