"""What a loader's worker processes need around their work: how they end, and one plain line if they fail."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

from vitrail.errors import RunError

T = TypeVar("T")

STALLED = 300
"""seconds to wait for a batch before the workers are considered stuck"""


def identity(fetched: Any) -> Any:
    return fetched


def ignore_first_sigterm(worker: int) -> None:
    """Make a worker ignore its first SIGTERM: Slurm sends it to all processes of a job, so that the run can save.

    The workers end with the run. One that hangs gets a second SIGTERM, from PyTorch or at Python's exit.
    """

    def restore(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, restore)


def explain_failures(batches: Iterator[T]) -> Iterator[T]:
    """Batches, with one plain error line if the system killed a worker or if none answers."""
    try:
        yield from batches
    except RuntimeError as error:
        text = str(error)
        if "timed out" in text:
            raise RunError(
                f"the workers made no batch in {STALLED} seconds: check the disk, or try --workers 0"
            ) from None
        if "exited unexpectedly" in text or "is killed by signal" in text:
            raise RunError(
                "a worker was killed by the system, probably because memory (or /dev/shm) ran out: "
                "lower --workers or --batch-size"
            ) from None
        raise
