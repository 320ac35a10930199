"""The tasks: one file or package per task, all with the interface of `task.py`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitrail.errors import UserError

if TYPE_CHECKING:
    from vitrail.tasks.task import Task
    from vitrail.tasks.values import Settings

TASKS = {
    "classify": "vitrail.tasks.classify:Classify",
    "tag": "vitrail.tasks.tag:Tag",
    "caption": "vitrail.tasks.caption:Caption",
    "segment": "vitrail.tasks.segment:Segment",
    "regress": "vitrail.tasks.regress:Regress",
    "embed": "vitrail.tasks.embed:Embed",
}
"""the only table of tasks: the name in `config.json` and `recipe.json`, and the import path of the class"""

OPTIONS = {
    "classify": "vitrail.tasks.classify.settings:ClassifyOptions",
    "caption": "vitrail.tasks.caption.settings:Decoding",
    "segment": "vitrail.tasks.segment.settings:Inference",
}
"""where the `options` of tasks are, for help without their code, which imports PyTorch"""


def options_class(name: str) -> type[Any]:
    """The `options` of a task."""
    if name not in OPTIONS:
        return task_class(name).options
    module, _, kind = OPTIONS[name].partition(":")
    found: type[Any] = getattr(import_module(module), kind)
    return found


def task_class(name: str) -> type[Task]:
    """The class of a task. UserError for a name not in `TASKS`."""
    if name not in TASKS:
        raise UserError(f"no task {name!r}: choose from {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), kind)
    return found


def task_of(settings: Settings) -> type[Task]:
    """The task class of these settings."""
    return task_class(settings.name)
