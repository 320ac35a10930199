"""Ray, if installed: the library, and a connection to a cluster or to this machine's own processes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitrail.errors import RunError, UserError, first_line

STARTS = 5
"""how often Ray is started before it counts as failed"""


def library() -> Any:
    """The module ray. UserError with the remedy if it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing to anybody
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("Ray is not installed: pip install 'vitrail[cluster]'") from None
    return ray


@contextmanager
def session(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address`; None: as Ray finds it, or else this machine alone.

    vitrail reports what matters itself, so Ray's own lines are left out.
    """
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _connect(ray, address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    """Connect, or start Ray here; on a busy machine that takes more than the 30 seconds that Ray waits."""
    local = {"include_dashboard": False} if address == "local" else {}
    for attempt in range(STARTS):
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **local
            )
            return
        except Exception as error:  # Ray raises plain exceptions, and those of gRPC
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == STARTS - 1:
                where = f"at {address}" if address else "could be found or started"
                raise RunError(f"no Ray cluster {where}: {first_line(error)}") from None


def shortened(error: BaseException) -> str:
    """The line of a Ray error that says what happened in the worker."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return re.sub(r"^(?:[\w.]+\.)?(?:RunError|UserError): ", "", last)[:300]
