"""Standard error for vitrail's own lines alone, while a command runs.

Decoders in C write to file descriptor 2, other packages warn and log: such lines tell a person nothing, and come once
per file. What matters of them reaches the person as vitrail's own error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO


class OneLine(logging.Formatter):
    """A record as one line that begins with `vitrail`."""

    def format(self, record: logging.LogRecord) -> str:
        return f"vitrail: {' '.join(super().format(record).split())}"


@contextlib.contextmanager
def own_lines() -> Iterator[None]:
    """Drop what others write to standard error, and write what vitrail logs there. Worker processes inherit this.

    `sys.stderr` still works, on a descriptor of its own, so that `print`, tracebacks and bars are seen. Warnings are
    shown where the interpreter was told which to show (`python -W`, `PYTHONWARNINGS`).
    """
    with _descriptor(), _warnings(), _logging():
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Write what vitrail logs, and nothing else, unless a program that calls this has set up logging itself."""
    ours, root = logging.getLogger("vitrail"), logging.getLogger()
    if root.handlers:
        yield
        return
    handler, nothing = logging.StreamHandler(sys.stderr), logging.NullHandler()
    handler.setFormatter(OneLine())
    ours.addHandler(handler)
    root.addHandler(nothing)  # without any handler Python prints what other packages log
    try:
        yield
    finally:
        ours.removeHandler(handler)
        root.removeHandler(nothing)


@contextlib.contextmanager
def _descriptor() -> Iterator[None]:
    """Point file descriptor 2 at nothing, and `sys.stderr`, where it is on it, at what that was."""
    try:
        own = os.dup(2)
    except OSError:
        own = None  # it is closed
    before = sys.stderr
    if own is None:
        with open(os.devnull, "w") as nothing:
            sys.stderr = nothing  # else `print` takes standard output in its place
            try:
                yield
            finally:
                sys.stderr = before
        return
    ours = _number(before) == 2
    if ours:
        before.flush()
        sys.stderr = open(own, "w", buffering=1, encoding=before.encoding, errors=before.errors, closefd=False)  # noqa: SIM115
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        if ours:
            with contextlib.suppress(OSError):  # a pipe that nobody reads any longer
                sys.stderr.flush()
            sys.stderr = before
        os.dup2(own, 2)
        os.close(own)


def _number(stream: TextIO | None) -> int | None:
    """A stream's descriptor; None where it has none."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Drop the warnings that pass the filters. The filters stay, so that one that is an error remains one."""
    if sys.warnoptions:
        yield
        return

    def drop(*args: Any, **named: Any) -> None:
        pass

    before, warnings.showwarning = warnings.showwarning, drop
    try:
        yield
    finally:
        warnings.showwarning = before
