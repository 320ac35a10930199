"""Errors with one plain line for the user. The command line prints it and exits with the class's exit code."""

from __future__ import annotations

import logging
import math

_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning only the first time, for events that repeat within a command, such as loading weights."""
    if message not in _warned:
        _warned.add(message)
        logging.getLogger("vitrail").warning(message)


class UserError(ValueError):
    """Wrong input. The message says what is wrong and what to do. Exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """A failure of the run, such as a full disk or a loss that is no longer finite. Exit code 1."""

    exit_code = 1


class Stopped(Exception):
    """The user stopped the run. Its state is saved and the message says how to resume. Exit code 130."""

    exit_code = 130


class Preempted(Stopped):
    """SIGTERM or SIGUSR1 stopped the run, as a scheduler does. Exit code 75 (EX_TEMPFAIL): run it again later."""

    exit_code = 75


def first_line(error: Exception | str) -> str:
    """The first line of an error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require(config: object, low: float, below: float, *names: str) -> None:
    """Raise UserError for the first of these fields that is not in [low, below), or has an element that is not."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not (isinstance(number, int | float) and low <= number < below):
                limit = f"at least {low:g}" + (f" and below {below:g}" if below < math.inf else "")
                raise UserError(f"{name} must be {limit}, got {value}")
