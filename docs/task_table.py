"""The table of tasks at the top of the README: what each needs, costs and scores, from `results/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from table_data import Rows, rows_of

PHOTOS = "243 photos of ants and bees"
TASKS: tuple[tuple[str, str, str, str, Callable[[Rows], tuple[str, str]]], ...] = (
    ("handwritten digits", "1,797 in the package", "vitrail train digits", "digits", lambda rows: _series(rows)),
    (
        "your own images, from scratch",
        PHOTOS,
        "vitrail train folder --data FOLDER",
        "folder",
        lambda rows: (f"{rows['scratch mean top-1']:.1%} right", _minutes([rows["scratch most seconds"]], 2)),
    ),
    (
        "your own images, from the bundled weights",
        PHOTOS,
        "vitrail train folder --data FOLDER --init classify",
        "folder",
        lambda rows: (f"{rows['weights mean top-1']:.1%} right", _minutes([rows["weights most seconds"]], 2)),
    ),
    ("CIFAR-10", "50,000", "vitrail train cifar10-quick", "cifar10-quick", lambda rows: _series(rows)),
    ("CIFAR-10, better", "50,000", "vitrail train cifar10-laptop", "cifar10-laptop", lambda rows: _series(rows)),
    (
        "the class of every pixel",
        "367 of CamVid",
        "vitrail train segment --data camvid",
        "camvid",
        lambda rows: _segmenters(rows["ours"]["runs"]),
    ),
    (
        "captions",
        "6,000 of Flickr8k",
        "vitrail train caption-match --data flickr8k",
        "caption",
        lambda rows: (f"CIDEr {rows['cider']:.2f}", ""),
    ),
)
"""the task, the images that were trained on, the command, the file of results, and what it says: score and minutes"""


def tasks() -> list[list[str]]:
    """One row per task."""
    rows = [["task", "images", "score", "minutes", "command"]]
    for task, images, command, name, told in TASKS:
        found = rows_of(name)
        score, minutes = ("", "") if found is None else told(found)
        rows.append([task, images, score, minutes, f"`{command}`"])
    return rows


def _series(rows: Rows) -> tuple[str, str]:
    """Score and minutes of a file of `bench/seeds.py`, on the smallest number of cores that it was run on."""
    cores = min(run["cores"] for run in rows["runs"])
    seconds = [run["wall_seconds"] for run in rows["runs"] if run["cores"] == cores]
    return f"{rows['mean_top1']:.1%} right", _minutes(seconds, cores)


def _segmenters(runs: list[Rows]) -> tuple[str, str]:
    """Score and minutes of the first of the two commands that `bench/segment.py` runs."""
    first = [run["crops"] for run in runs]
    mean = sum(run["miou"] for run in first) / len(first)
    return f"mIoU {mean:.1%}", _minutes([run["seconds"] for run in first], runs[0]["cores"])


def _minutes(seconds: list[Any], cores: int) -> str:
    """Of the quickest run: the others had less of a core."""
    return f"{min(seconds) / 60:.0f} on {'one core' if cores == 1 else f'{cores} cores'}"
