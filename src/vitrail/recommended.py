"""Recommended encoders of the Hub by task, the bundled weights, and what `vitrail.load` reads: `recommended.json`.

`vitrail models`, the first lines of a training and docs/checkpoints.md show this one table. Parameters and memory are
written by bench/recommended.py. An encoder's `revision` is a commit that was looked up; null if none could be.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

MANY = 200_000
"""training images from which training from scratch is an alternative"""
SMALL = 96
"""image side in pixels below which these encoders, which take 224, are too slow for what they gain"""


class Encoder(NamedTuple):
    """Pretrained weights on the Hub."""

    id: str
    revision: str | None
    """the commit; None if none could be looked up"""
    licence: str
    learned: str
    """what it was trained on"""
    parameters: int
    """of the encoder, without a head"""
    train_gb: float
    """memory to train all weights with AdamW and 32 images of 224 pixels, in float32"""

    @property
    def source(self) -> str:
        """As commands take it, pinned where the revision is known."""
        return self.id if self.revision is None else f"{self.id}@{self.revision[:7]}"

    @property
    def weights_mb(self) -> float:
        """The weights in float32."""
        return self.parameters * 4 / 1e6


class Choice(NamedTuple):
    """What is recommended for one task."""

    command: str
    """with DATA and SOURCE in place of both"""
    encoders: list[Encoder]
    """the smaller ones first"""
    suits: dict[str, dict[str, str]]
    """by `cpu` or `gpu`: the id to start from, by the number of training images from which it is"""

    def command_for(self, encoder: Encoder, data: str = "DATA") -> str:
        """The command that starts from an encoder."""
        return self.command.replace("DATA", data).replace("SOURCE", encoder.source)


@cache
def table() -> dict[str, Any]:
    """The content of the file. Do not modify it: values are shared."""
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def tasks() -> list[str]:
    """The tasks that encoders are recommended for."""
    return list(table()["tasks"])


def choice(task: str) -> Choice:
    """What is recommended for a task of `tasks()`; `like` names the task whose encoders it shares."""
    own = table()["tasks"][task]
    found = table()["tasks"][own.get("like", task)]
    encoders = [Encoder(name, **table()["encoders"][name]) for name in found["encoders"]]
    return Choice(own["command"], encoders, found["suits"])


def suited(task: str, images: int, gpu: bool) -> Encoder | None:
    """The encoder to start from for a task, this number of training images and a device; None if there is none."""
    if task not in tasks() or images >= MANY:
        return None
    found = choice(task)
    by_images = found.suits.get("gpu" if gpu else "cpu", {})
    below = [name for least, name in by_images.items() if images >= int(least)]
    return next((each for each in found.encoders if below and each.id == below[-1]), None)


BUNDLED = Path(__file__).parent / "zoo" / "weights"


def bundled() -> list[str]:
    """Names of the bundled weights."""
    return sorted(folder.parent.name for folder in BUNDLED.glob("*/config.json"))


def rows(task: str | None = None) -> list[dict[str, Any]]:
    """All of it as plain data, one row per line of JSON: the encoders of one task or of all, then the rest."""
    found = [
        _encoder_row(name, own, each)
        for name in tasks()
        if task in (None, name)
        for own in [choice(name)]
        for each in own.encoders
    ]
    if task is None:
        found += map(_bundled_row, bundled())
        found += ({"kind": "format", "format": name, "reads": reads} for name, reads in table()["formats"])
    return found


def _encoder_row(task: str, own: Choice, each: Encoder) -> dict[str, Any]:
    source = each.id if each.revision is None else f"{each.id}@{each.revision}"
    return {
        "kind": "encoder",
        "task": task,
        "source": source,
        "revision": each.revision,
        "licence": each.licence,
        "learned": each.learned,
        "parameters": each.parameters,
        "weights_mb": round(each.weights_mb, 1),
        "train_gb": each.train_gb,
        "command": own.command_for(each),
    }


def _bundled_row(name: str) -> dict[str, Any]:
    folder, own = BUNDLED / name, table()["bundled"][name]
    task = json.loads((folder / "config.json").read_text(encoding="utf-8"))["task"]
    size = (folder / "model.safetensors").stat().st_size
    return {"kind": "bundled", "task": task, "source": name, **own, "weights_mb": round(size / 1e6, 1)}
