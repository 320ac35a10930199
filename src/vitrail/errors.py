"""What went wrong, in one plain line. The command line prints the line and ends with the class's exit code."""

from __future__ import annotations

import logging

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
    """Somebody asked the run to stop; its state is saved and the line says how to go on. Exit code 130."""

    exit_code = 130


def first_line(error: Exception | str) -> str:
    """The first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
