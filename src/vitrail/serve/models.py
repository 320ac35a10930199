"""The models that are served, by name, and what is known of each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitrail.errors import UserError
from vitrail.explain.trace import encoder_of
from vitrail.plain import flat_fields
from vitrail.serve.engines import Engine
from vitrail.tasks.task import Task
from vitrail.tasks.values import Prediction

Changes = tuple[tuple[str, Any], ...]
"""options of a task that a request sets, by name"""
MAX_LISTED = 1_000
"""classes, up to which a card lists them"""
CHECKPOINT_FOLDERS = ("best", "last")
"""folders of a run, which are named after the run"""


class Served:
    """A model that answers requests."""

    def __init__(self, name: str, task: Task, engine: Engine, about: Mapping[str, str | None]) -> None:
        """`about` is what its card says: `licence` and `training_data`."""
        self.name, self.task, self.engine, self.about = name, task, engine, dict(about)
        self.known = set(flat_fields(task.option))

    def answer(self, samples: Sequence[Any], changes: Changes = ()) -> list[Prediction]:
        """One answer per prepared image, by the chosen engine."""
        task = self.engine.task
        before = task.option
        try:
            task.choose(dict(changes))
            with self.engine.autocast():
                return task.answers(samples)
        finally:
            task.option = before

    def changes(self, top: int | None) -> Changes:
        """The options that a request sets. UserError where this task has none of that name."""
        if top is None:
            return ()
        if "top" not in self.known:
            raise UserError(f"top is not an option of the task {self.task.name} of the model {self.name}: leave it out")
        return (("top", top),)

    def card(self) -> dict[str, Any]:
        """What `GET /v1/models` says of it."""
        task = self.task
        count = sum(parameter.numel() for parameter in task.parameters())
        resize, patch = geometry(task)
        return {
            "name": self.name,
            "task": task.name,
            "parameters": count or None,
            "image_size": list(task.preprocess.size),
            "resize": resize,
            "crop_fraction": task.preprocess.crop_fraction,
            "patch": patch,
            "channels": task.preprocess.channels,
            "classes": len(task.classes),
            "class_names": list(task.classes) if len(task.classes) <= MAX_LISTED else None,
            "licence": self.about.get("licence"),
            "training_data": self.about.get("training_data"),
            "engine": self.engine.name,
            "precision": self.engine.number_format,
            "streams": task.streams,
        }


def geometry(task: Task) -> tuple[str, int | None]:
    """How an image becomes the model's input, and the side of its patches in pixels of that; None where it has none.

    `crop`, `squash` and `letterbox` are those of `Preprocess`; `whole` is a crop that leaves nothing out.
    """
    chosen = task.preprocess
    try:
        blank = task.prepare(torch.zeros(chosen.channels, 64, 128, dtype=torch.uint8))
        patch = encoder_of(task).config.patch
    except UserError:  # an export, or a network without patches
        return chosen.resize, None
    whole = chosen.resize == "crop" and tuple(blank.images.shape[-2:]) != chosen.size
    return "whole" if whole else chosen.resize, patch


@dataclass(frozen=True)
class Source:
    """A model that is to be served."""

    name: str
    source: str


def read_sources(words: Sequence[str]) -> list[Source]:
    """The models of a command line, `SOURCE` or `NAME=SOURCE`. UserError for two of one name."""
    found: dict[str, Source] = {}
    for word in words or ("classify",):
        name, equals, rest = word.partition("=")
        named = bool(equals) and re.fullmatch(r"[\w.-]+", name) is not None and not Path(word).exists()
        source = Source(name, rest) if named else Source(name_of(word), word)
        if source.name in found:
            raise UserError(
                f"two models are called {source.name} ({found[source.name].source} and {source.source}): give one "
                f"another name, such as {source.name}-2={source.source}"
            )
        found[source.name] = source
    return list(found.values())


def name_of(source: str) -> str:
    """What a model is called: the last word of its path or Hub id, without an ending; of a run its folder."""
    path = Path(source)
    if not path.exists():
        return source.rpartition("/")[2] or source
    path = path.resolve()
    if path.is_file():
        return path.stem
    return path.parent.name if path.name in CHECKPOINT_FOLDERS else path.name


def about(found: Path) -> dict[str, str | None]:
    """The licence and the training data of the model at a path, as its card or its run says; None where none does."""
    folder = found if found.is_dir() else found.parent
    rows: dict[str, str | None] = {"licence": None, "training_data": None}
    for file, read in (("CARD.md", _from_table), ("README.md", _from_hub), ("recipe.json", _from_run)):
        for place in (folder, folder.parent) if folder.name in CHECKPOINT_FOLDERS else (folder,):
            if (path := place / file).is_file():
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                rows |= {key: value for key, value in read(text).items() if value and not rows[key]}
    return rows


def _from_table(text: str) -> dict[str, str]:
    """The rows of a card's table."""
    cells = dict(re.findall(r"^\| (licence|training data) \| (.+) \|$", text, re.MULTILINE))
    return {key.replace(" ", "_"): value.replace("`", "") for key, value in cells.items()}


def _from_hub(text: str) -> dict[str, str]:
    """The head of a card of the Hub, of which two entries are read."""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if head is None:
        return {}
    licence = re.search(r"^license:[ \t]*([^\n]+)$", head[1], re.MULTILINE)
    data = re.search(r"^datasets:((?:\n[ \t]*-[ \t]*[^\n]+)+)", head[1], re.MULTILINE)
    listed = ", ".join(line.strip(" -\t'\"") for line in data[1].strip().splitlines()) if data else ""
    return {"licence": licence[1].strip(" '\"") if licence else "", "training_data": listed}


def _from_run(text: str) -> dict[str, str]:
    """The name of a run's data; of a path its last word, since a path of the server is not for clients."""
    try:
        data = json.loads(text).get("data")
    except (ValueError, AttributeError):
        return {}
    return {"training_data": Path(data).name if isinstance(data, str) else ""}
