"""The line at the start of a run whose images are read from disk: how fast this machine decodes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vitrail.data.loader import Loader


def decoding_line(loader: Loader, rows: Sequence[dict[str, Any]] = ()) -> str | None:
    """How many images per second are decoded, for a loader that reads from disk; None for a set in memory.

    What a GPU needs is known only if the run has trained on one before: `rows` are those of its log.
    """
    if loader.memory:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # More workers than cores decode no faster.
    rate = loader.rate() * min(max(1, loader.workers), cores)
    who = {0: "the main process decodes", 1: "1 worker decodes"}.get(loader.workers, f"{loader.workers} workers decode")
    need = needed(rows) if loader.device.type == "cuda" else None
    own = "" if need is None else f", and the GPU took about {need:,.0f} images/s when it did not wait for data"
    return f"the images are read from disk: {who} about {rate:,.0f} images/s{own}"


def needed(rows: Sequence[dict[str, Any]]) -> float | None:
    """Images per second of a run while it did not wait for data, by the last row of its log; None if it is unknown."""
    row = next((row for row in reversed(rows) if "images_per_s" in row), None)
    return row["images_per_s"] / (1 - row["wait"]) if row is not None and row["wait"] < 1 else None
