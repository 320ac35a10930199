"""What went wrong, in one plain line. The command line prints the line and ends with the class's exit code."""

from __future__ import annotations

import logging
import math

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn of what happens more than once in a command, such as whenever weights are loaded, the first time alone."""
    if message not in _said:
        _said.add(message)
        logging.getLogger("vitrail").warning(message)


class UserError(ValueError):
    """Wrong input: the line says what is wrong and what to do. Exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """A fault of the run, such as a full disk or a loss that is no longer finite. Exit code 1."""

    exit_code = 1


class Stopped(Exception):
    """Somebody asked the run to stop; its state is saved and the line says how to resume. Exit code 130."""

    exit_code = 130


def first_line(error: Exception | str) -> str:
    """The first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require(config: object, low: float, below: float, *names: str) -> None:
    """Raise UserError for the first of these fields that is not a number in [low, below), or holds one that is not."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not (isinstance(number, int | float) and low <= number < below):
                limit = f"at least {low:g}" + (f" and below {below:g}" if below < math.inf else "")
                raise UserError(f"{name} must be {limit}, got {value}")
