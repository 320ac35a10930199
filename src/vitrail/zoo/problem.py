"""`problem_type`: the meaning of a head's outputs, in configs of transformers and sometimes timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from vitrail.errors import UserError
from vitrail.tasks.values import Portable, Problem


def problem_of(config: Mapping[str, Any], path: Path) -> Problem:
    """The `problem_type` of a config; single-label classification by default."""
    for problem in get_args(Problem):
        if config.get("problem_type") in (None, problem):
            return problem
    raise UserError(
        f"{path}: its config has problem_type {str(config['problem_type'])[:40]!r}, and a head's outputs are "
        f"{', '.join(get_args(Problem))}: correct it"
    )


def problem_in(head: Portable) -> dict[str, Problem]:
    """The `problem_type` entry for a config, if the head needs one."""
    return {} if head.problem is None else {"problem_type": head.problem}
