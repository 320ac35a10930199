"""Ray, if installed: the library, and a connection to a cluster or to this machine's own processes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitrail.errors import RunError, UserError, first_line


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
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **local)
    except Exception as error:  # Ray raises plain exceptions, and those of gRPC
        where = f"at {address}" if address else "could be found or started"
        raise RunError(f"no Ray cluster {where}: {first_line(error)}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def shortened(error: BaseException) -> str:
    """The line of a Ray error that says what happened in the worker."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return re.sub(r"^(?:[\w.]+\.)?(?:RunError|UserError): ", "", last)[:300]
