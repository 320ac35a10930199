"""The output of `vitrail cluster ray predict`: Parquet files, each complete or absent, with one row per image."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.errors import RunError, UserError
from vitrail.files import atomic_file, refuse_file_name, write_atomic
from vitrail.predictions.tables import Row, first_columns, pyarrow_for_tables, readable

SHARED = "_predictions.json"
"""what the rows of a folder have in common. Readers of Parquet folders pass over names that begin with `_`"""
ROWS, SECONDS = 10_000, 60.0
"""A file is written when it has so many rows, or after so many seconds: what a killed command has to do again"""


class RowFiles:
    """The Parquet files of a folder. Use as a context manager: the rows of the end are written on leaving."""

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        """Raises UserError if the folder holds other files, or rows of another model, options or data."""
        refuse_file_name(folder, "give --out a folder: it gets several Parquet files")
        pyarrow_for_tables()
        self.folder = folder
        self.waiting: list[Row] = []
        self.since = time.monotonic()
        self.errors = 0
        self.schema = first_columns()
        self.done: set[str] = set()
        """names of the images that have a row"""
        self.begin(dict(shared))
        files = sorted(folder.glob("rows-*.parquet"))
        numbers = [file.stem.removeprefix("rows-") for file in files]
        for file, number in zip(files, numbers, strict=True):
            if not number.isdecimal():
                raise UserError(f"{file} is not a file of this command: move it out of {folder}")
        self.next = 1 + max(map(int, numbers), default=-1)
        for file in files:
            self._read(file)

    def begin(self, shared: dict[str, Any]) -> None:
        place = self.folder / SHARED
        if not place.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} exists and is not empty: choose another --out")
            write_atomic(place, json.dumps(shared, indent=2) + "\n")
            return
        try:
            before = json.loads(place.read_text())
        except ValueError:
            raise UserError(f"{place} is damaged: choose another --out") from None
        changed = next((name for name in {**before, **shared} if before.get(name) != shared.get(name)), None)
        if changed is not None:
            what = {"weights": "another model", "data": "other data"}.get(changed, f"other {changed}")
            raise UserError(f"{self.folder} holds predictions with {what}: choose another --out")

    def _read(self, file: Path) -> None:
        """Take note of the rows of an earlier command."""
        pa, pq = pyarrow_for_tables()
        try:
            names = pq.read_table(file, columns=["image", "error"])
            self._widen(pq.read_schema(file))
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{file} cannot be read ({reason}): remove it, and its images are done again") from None
        self.done |= set(names.column("image").to_pylist())
        self.errors += len(names) - names.column("error").null_count

    def add(self, rows: Iterable[Row]) -> int:
        """Add the rows of some images; returns how many were new. An image keeps its first row."""
        count = 0
        for row in rows:
            if (name := readable(row["image"])) in self.done:  # of a batch that was answered twice
                continue
            self.done.add(name)
            self.waiting.append(row)
            self.errors += "error" in row
            count += 1
        due = len(self.waiting) >= ROWS or (self.waiting and time.monotonic() - self.since > SECONDS)
        # Readers take the columns of the first file, so that one waits for an answer.
        if due and (self.next or any("error" not in row for row in self.waiting)):
            self.write()
        return count

    def write(self) -> None:
        """Write the waiting rows as a file."""
        pa, pq = pyarrow_for_tables()
        self.since = time.monotonic()
        if not self.waiting:
            return
        rows = [{name: readable(value) for name, value in row.items()} for row in self.waiting]
        self._widen(_schema_of(pa, rows))
        table = pa.Table.from_pylist(rows, schema=_error_last(pa, self.schema))
        file = self.folder / f"rows-{self.next:06d}.parquet"
        if file.exists():
            raise RunError(f"{file} was written by another process: let one command at a time write to {self.folder}")
        with atomic_file(file) as opened:
            pq.write_table(table, opened)
        self.next += 1
        self.waiting = []

    def _widen(self, schema: Any) -> None:
        """Let the columns suit these rows too."""
        pa, _ = pyarrow_for_tables()
        self.schema = pa.unify_schemas([self.schema, schema], promote_options="permissive")

    def __enter__(self) -> RowFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()  # also after an error: these rows are complete

    def text(self) -> str:
        """What the folder holds, in a line."""
        bad = f", {self.errors:,} with an error" if self.errors else ""
        return f"{self.folder}: {len(self.done):,} row{'s' * (len(self.done) != 1)} in {self.next:,} Parquet files{bad}"


def _schema_of(pa: Any, rows: Sequence[Row]) -> Any:
    """The types of all columns: pyarrow itself takes the columns of the first row alone."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]).schema


def _error_last(pa: Any, schema: Any) -> Any:
    """The same columns, `error` at the end, as in the other tables of predictions."""
    return pa.schema([*(field for field in schema if field.name != "error"), schema.field("error")])
