"""Keep standard error for vitrail's own lines while a command runs.

Decoders in C write to file descriptor 2, other packages warn and log: such lines are not useful, and repeat for every
file. If they matter, vitrail reports its own error.
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
    """A record as one line that begins with `vitrail`. Control characters, as names of files may have, are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return f"vitrail: {printable(' '.join(super().format(record).split()))}"


def printable(text: str) -> str:
    """The text in one line, with control characters escaped, as names of files may have."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


class CurrentError(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a progress bar replaces to keep lines above itself."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """The base class sets it once."""


@contextlib.contextmanager
def own_lines() -> Iterator[None]:
    """Discard what others write to standard error, and log vitrail's lines there. Worker processes inherit this.

    `sys.stderr` still works, on its own descriptor, so that `print`, tracebacks and progress bars are visible. Warnings
    are shown if the interpreter has options for them (`python -W`, `PYTHONWARNINGS`).
    """
    with _descriptor(), _warnings(), _logging():
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Log vitrail's records only, unless the calling program has set up logging itself."""
    ours, root = logging.getLogger("vitrail"), logging.getLogger()
    if root.handlers:
        yield
        return
    handler, nothing = CurrentError(), logging.NullHandler()
    handler.setFormatter(OneLine())
    ours.addHandler(handler)
    root.addHandler(nothing)  # without any handler Python prints the logs of other packages
    try:
        yield
    finally:
        ours.removeHandler(handler)
        root.removeHandler(nothing)


@contextlib.contextmanager
def _descriptor() -> Iterator[None]:
    """Redirect file descriptor 2 to the null device, and `sys.stderr` to the original descriptor."""
    try:
        own = os.dup(2)
    except OSError:
        own = None  # it is closed
    before = sys.stderr
    if own is None:
        with open(os.devnull, "w") as nothing:
            sys.stderr = nothing  # otherwise `print` would use standard output
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
            with contextlib.suppress(OSError):  # a pipe without a reader
                sys.stderr.flush()
            sys.stderr = before
        os.dup2(own, 2)
        os.close(own)


def _number(stream: TextIO | None) -> int | None:
    """A stream's file descriptor; None if it has none."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Discard warnings that pass the filters. The filters stay, so that warnings turned into errors remain errors."""
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
