"""The log of a run for TensorBoard: the scalars of metrics.jsonl, which stays the one record of the run."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vitrail.errors import UserError
from vitrail.files import append_atomic, retrying

BESIDE = ("step", "epoch", "seconds")
"""entries of a row that say when it was written"""


def require() -> None:
    """Raises UserError if the package is missing."""
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs its package: pip install 'vitrail[track]'") from None


class Events:
    """Writes rows of the log as events, at once: a row is a few hundred bytes, and there is one in twenty steps.

    The first row of a process replaces the file by one of the whole log, from which a resumed run has removed what it
    trains again: so no step is there twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Path | None = None

    def add(self, row: Mapping[str, Any], rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Write a row; `rows` reads the whole log, with it."""
        if self._file is not None:
            return self._write([row], self._file)
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*tfevents*"):
            old.unlink()
        self._file = self.folder / f"events.out.tfevents.{time.time():.0f}.vitrail"
        self._write(rows(), self._file)

    @staticmethod
    def _write(rows: Iterable[Mapping[str, Any]], file: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        writer = RecordWriter(records)
        for row in rows:
            if values := [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]:
                event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
                writer.write(event.SerializeToString())
        retrying(partial(append_atomic, file, records.getvalue()))


def scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a row, under `train/loss`, `val/top1` and so on; none of the rows that start and end a run."""
    kind = row["kind"]
    if kind not in ("train", "val", "test"):
        return []
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name not in BESIDE}
    return [(f"{kind}/{name}", float(value)) for name, value in numbers.items()]
