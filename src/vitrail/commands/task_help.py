"""The help of commands that run a model: their own options, and those of the model's task."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from vitrail.help import options_help
from vitrail.options import Parser
from vitrail.plain import flat_fields
from vitrail.recommended import BUNDLED, bundled
from vitrail.tasks import TASKS, options_class


def print_help(parser: Parser, source: str | None) -> int:
    """The help of a command, with the options of the named model's task where its config tells the task."""
    print(parser.format_help())
    task = None if source is None else task_named(source)
    if task is not None:
        print_options(task)
        return 0
    flag = "--model " * (parser.prog == "vitrail predict")
    if source is None:
        print(f"`{parser.prog} {flag}SOURCE --help` also shows the options of a model's task.")
    else:
        names = ", ".join(bundled())
        print(f"The task of {source} is known once it is loaded. `{parser.prog} {flag}NAME --help`, with one of")
        print(f"{names} as NAME, shows the options of its task.")
    return 0


def print_options(name: str) -> None:
    """The help of the options of a task."""
    kind = options_class(name)
    if flat_fields(kind()):
        print(f"\noptions of this model's task, {name}, with their defaults; a model may have its own:")
        print("\n".join(options_help(kind)))
    else:
        print(f"\nThis model's task, {name}, has no options of its own.")


def task_named(source: str) -> str | None:
    """The task of a model in vitrail's format, from its config alone; None if only loading can tell."""
    path = BUNDLED / source if source in bundled() and not Path(source).exists() else Path(source)
    for folder in (path, path / "best", path / "last"):
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if isinstance(config, dict) and config.get("task") in TASKS:
                return str(config["task"])
    return None
