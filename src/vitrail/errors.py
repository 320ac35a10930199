"""Errors with one plain line for the user. The command line prints it and exits with the class's exit code."""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

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


def require_choices(config: object) -> None:
    """Raise UserError for the first field of a dataclass that is a `Literal`, or one or None, and has another value.

    Type checkers and the command line refuse such a value too; configs also come from JSON and from Python.
    """
    kind: Any = type(config)
    for name, choices in _choices(kind).items():
        if (value := getattr(config, name)) not in choices:
            raise UserError(f"no {name} {value!r}: choose from {', '.join(map(str, choices))}")


@cache
def _choices(kind: Any) -> dict[str, tuple[Any, ...]]:
    """The choices of the fields of a dataclass that have some, by name."""
    hints = get_type_hints(kind)
    found = {}
    for entry in fields(kind):
        members = get_args(hints[entry.name]) if get_origin(hints[entry.name]) is not Literal else (hints[entry.name],)
        if members and all(get_origin(each) is Literal or each is type(None) for each in members):
            found[entry.name] = tuple(
                value for each in members for value in (get_args(each) if each is not type(None) else (None,))
            )
    return found
