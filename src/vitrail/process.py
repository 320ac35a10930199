"""What belongs to the whole process: its cores, environment variables and signals."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PREEMPTING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""signals by which a scheduler ends a job early; Windows lacks the second"""


CGROUPS = Path("/sys/fs/cgroup")
"""where Linux keeps the limits of containers and of schedulers' jobs"""
OWN_GROUPS = Path("/proc/self/cgroup")
"""the control groups of this process, one a line"""
MEMORY_FILES_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def cores() -> int:
    """The cores that this process may use: those of its affinity, and of its quota where it has one.

    A container may see all cores of a machine and have the time of two. The load of other processes does not count: it
    changes, and with another number of threads a resumed run would round differently.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.floor(min(count, _quota())))


def _quota(own: Path = OWN_GROUPS, root: Path = CGROUPS) -> float:
    """The cores' worth of time that the process's control groups allow, the smallest of all; infinite without any."""
    return min(map(_quota_in, _groups("cpu", own, root)), default=math.inf)


def memory_left(own: Path = OWN_GROUPS, root: Path = CGROUPS) -> float:
    """The bytes that the process's control groups allow beside what they hold; infinite without a limit.

    A container may see all memory of a machine, and its processes are killed at its own limit.
    """
    return min(map(_memory_left_in, _groups("memory", own, root)), default=math.inf)


def _groups(controller: str, own: Path, root: Path) -> Iterator[Path]:
    """The folders of the process's control groups that have this controller, each before those around it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        # Version 2 has no list of controllers. In a container the group may be the root of what is visible.
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / place.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder == root or root in folder.parents)


def _quota_in(folder: Path) -> float:
    """The quota of one control group, of version 2 or 1."""
    try:
        if (both := folder / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return math.inf


def _memory_left_in(folder: Path) -> float:
    """The bytes left in one control group, of version 2 or 1. The cache of files that it can drop is free."""
    names = ("memory.max", "memory.current") if (folder / "memory.max").exists() else MEMORY_FILES_OF_VERSION_1
    try:
        limit, used = (int((folder / name).read_text()) for name in names)
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf


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
