"""Rows as a file: JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from vitrail.errors import UserError
from vitrail.files import printable
from vitrail.predictions.journal import Journal

CHUNK = 1_000
"""rows of a table per chunk"""
Row = dict[str, Any]


class JournalRows:
    """The rows of a journal, which can be iterated over repeatedly."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def __iter__(self) -> Iterator[Row]:
        for entry in self.journal.entries():
            yield from [entry["row"]] if entry["rows"] is None else entry["rows"]

    def columns(self) -> list[str]:
        """The names of all rows, in their order, with `error` last."""
        names = dict.fromkeys(name for row in self for name in row if name != "error")
        return [*names, "error"]


def write_jsonl(rows: JournalRows, file: IO[bytes]) -> None:
    """JSON lines, as `--json` prints them."""
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def write_csv(rows: JournalRows, file: IO[bytes]) -> None:
    """CSV in UTF-8 with a header, one value per cell; missing values are empty.

    The columns of a list count from 1: `labels`, a list of records with a label and a score, is `label_1`, `score_1`,
    `label_2` and so on; a list of numbers `embedding` is `embedding_1`, `embedding_2` and so on.
    """
    columns: dict[str, dict[str, None]] = {name: {} for name in rows.columns()}
    columns["error"] = {"error": None}
    for row in rows:
        for name, value in row.items():
            columns[name].update(dict.fromkeys(_cells(name, value)))
    text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
    writer = csv.writer(text)
    writer.writerow([cell for own in columns.values() for cell in own])
    for row in rows:
        found = {name: _cells(name, value) for name, value in row.items()}
        writer.writerow([found.get(name, {}).get(cell) for name, own in columns.items() for cell in own])
    text.detach()


def _cells(name: str, value: Any) -> dict[str, Any]:
    """A value as cells, by the name of their column."""
    if isinstance(value, bool):
        return {name: json.dumps(value)}
    if isinstance(value, dict):
        inner = [(f"{name}_{key}", own) for key, own in value.items()]
    elif isinstance(value, list):
        numbered = list(enumerate(value, 1))
        inner = [(f"{key}_{i}", own) for i, item in numbered if isinstance(item, dict) for key, own in item.items()]
        inner += [(f"{name}_{i}", item) for i, item in numbered if not isinstance(item, dict)]
    else:
        return {name: value}
    return {cell: own for key, each in inner for cell, own in _cells(key, each).items()}


def write_parquet(rows: JournalRows, file: IO[bytes]) -> None:
    """Parquet with lists and structs. Column types suit all rows."""
    pa, pq = pyarrow_for_tables()
    columns = rows.columns()
    schema = first_columns()
    for chunk in _chunks(rows, columns):
        found = pa.Table.from_pylist(chunk).schema
        schema = pa.unify_schemas([schema, found], promote_options="permissive")
    schema = pa.schema([schema.field(name) for name in columns])
    with pq.ParquetWriter(file, schema) as writer:
        for chunk in _chunks(rows, columns):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def first_columns() -> Any:
    """The schema of the columns that every table of predictions has."""
    pa, _ = pyarrow_for_tables()
    return pa.schema([("image", pa.string()), ("task", pa.string()), ("error", pa.string())])


def _chunks(rows: JournalRows, columns: Sequence[str]) -> Iterator[list[Row]]:
    """Chunks of rows, each row with every column."""
    chunk: list[Row] = []
    for row in rows:
        chunk.append({name: readable(row.get(name)) for name in columns})
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def readable(value: Any) -> Any:
    """Text as valid UTF-8: file names may contain other bytes."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [readable(item) for item in value]
    return {name: readable(item) for name, item in value.items()} if isinstance(value, dict) else value


def pyarrow_for_tables() -> tuple[Any, Any]:
    """pyarrow, and its Parquet. UserError with the remedy if it is missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'vitrail[data]', or choose .csv or .jsonl") from None
    return pa, pq


TABLES: Mapping[str, Callable[[JournalRows, IO[bytes]], None]] = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".parquet": write_parquet,
}
"""writers of tables, by the ending of `--out`"""
