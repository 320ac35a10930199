"""What the outputs of a head mean, as transformers' configs say it and timm's may."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from vitrail.errors import UserError
from vitrail.tasks.task import Problem, Task


def problem_of(config: Mapping[str, Any], path: Path) -> Problem:
    """What a config says that the outputs of its head mean; one class of all where it says nothing."""
    for problem in get_args(Problem):
        if config.get("problem_type") in (None, problem):
            return problem
    raise UserError(
        f"{path}: its config has problem_type {str(config['problem_type'])[:40]!r}, and a head's outputs are "
        f"{', '.join(get_args(Problem))}: correct it"
    )


def problem_in(task: Task) -> dict[str, Problem]:
    """The entry of a library's config that says what the outputs of the task's head mean, where it has to."""
    return {} if task.problem is None else {"problem_type": task.problem}
