"""What belongs to the whole process: its cores, environment variables and signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""signals by which a scheduler ends a job early; Windows lacks the second"""


def cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Within the block an environment variable has this value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def handled(handle: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Within the block these signals call a function, in this process but not in its workers."""
    process = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # a worker gets the signals of a terminal and of a scheduler too
            handle(number)

    try:
        old = [(number, signal.signal(number, handler)) for number in numbers]
    except ValueError:  # signals reach only the main thread
        old = []
    try:
        yield
    finally:
        for number, previous in old:
            signal.signal(number, previous)
