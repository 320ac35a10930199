"""vitrail's own checkpoints: a folder with `model.safetensors` and `config.json`, data, never code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError, first_line
from vitrail.tasks import TASKS, task_class
from vitrail.tasks.checkpoint import FORMAT
from vitrail.tasks.task import Task
from vitrail.tasks.values import Checkpoint
from vitrail.zoo.source import Files, Found, Weight

NAME = "vitrail"


def recognise(files: Files) -> bool:
    """A config with vitrail's format entry, of any version, and names of its models."""
    config = files.json.get("config.json", {})
    return "vitrail" in config and any(name.startswith("encoder.") for name in files.weights)


def read(files: Files) -> Found:
    """Every weight under its own name."""
    config = files.json["config.json"]
    if config["vitrail"] != FORMAT:
        raise UserError(
            f"{files.path} has a different format than vitrail's {FORMAT}: upgrade vitrail, or save it again"
        )
    return Found(
        source=f"vitrail's {config.get('task')}",
        encoder=None,
        classes=config.get("classes"),
        preprocess=Preprocess.from_dict(config["preprocess"]),
        weights={name: Weight((name,)) for name in files.weights},
        left={},
        task=lambda: build(config, files),
    )


def write(task: Task, folder: Path) -> None:
    """`model.safetensors` and `config.json`."""
    task.save(folder)


def build(config: dict[str, Any], files: Checkpoint) -> Task:
    """The task of a config, with new weights."""
    path = files.path
    if config["task"] not in TASKS:
        raise UserError(
            f"{path} holds the task {config['task']!r}, which this version of vitrail does not have: upgrade it"
        )
    try:
        return task_class(config["task"]).rebuild(config, files)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'config.json'} does not describe a model ({first_line(error)}): choose another checkpoint"
        ) from error
