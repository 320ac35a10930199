"""Parquet in the Hub's layout: a column of images as `{bytes, path}`, a column of labels, names in the metadata."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.data.names import Finder
from vitrail.data.sources import cache_folder, listing
from vitrail.errors import UserError
from vitrail.files import sync

log = logging.getLogger("vitrail")

IMAGES = ("image", "img", "picture", "jpg", "png")
LABELS = ("label", "labels", "fine_label", "class", "target")
IN_MEMORY = 1 << 30
"""bytes of files that are read into memory; larger sets become a memory-mapped Arrow file in the cache"""


@dataclass
class Table:
    """One split of a set."""

    images: Sequence[Any]
    labels: list[int | str]
    keys: list[str]
    names: list[str] | None


def files(path: Path) -> list[Path]:
    """The Parquet files at a path: the file itself, or those in a folder and its subfolders."""
    if not path.is_dir():
        return [path] if path.is_file() and path.suffix.lower() == ".parquet" else []
    folders, found = listing(path)
    for folder in folders:
        found += listing(folder)[1]
    return sorted(file for file in found if file.suffix.lower() == ".parquet")


def read(paths: list[Path]) -> Table:
    """The rows of some files of one split."""
    table, schema = rows(
        paths, lambda names: [choose_column(names, IMAGES, paths[0]), choose_column(names, LABELS, paths[0])]
    )
    image, label = table.column_names
    names = class_names(schema.metadata or {}, label)
    good = labelled(table.column(label), names)
    if missing := good.count(False):
        log.warning(f"{paths[0]}: {missing:,} of {len(table):,} rows have no {label} and are left out")
        table = table.filter(good)
    labels = table.column(label).to_pylist()
    return Table(Images(table, paths[0]), labels, _keys(table.column(image), paths), names)


def labelled(column: Any, names: list[str] | None) -> list[bool]:
    """Which rows have a label. If numbers index names, -1 means none: the Hub marks hidden labels so."""
    return [label is not None and (names is None or label != -1) for label in column.to_pylist()]


def rows(paths: list[Path], choose: Callable[[list[str]], list[str]]) -> tuple[Any, Any]:
    """The columns that `choose` selects of some files of one split: an Arrow table in that order, and its schema."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("reading Parquet needs pyarrow: pip install 'vitrail[data]'") from None
    try:
        schema = pq.read_schema(paths[0])
        columns = choose(schema.names)
        if sum(path.stat().st_size for path in paths) < IN_MEMORY:
            table = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
        else:
            table = _mapped(paths, columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{paths[0]} cannot be read as Parquet: {' '.join(str(error).split())}") from None
    return table.select(columns), schema


def choose_column(names: list[str], wanted: tuple[str, ...], path: Path | str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise UserError(f"{path} has the columns {', '.join(names)}, and none called {' or '.join(wanted[:3])}")


def class_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """The names of the classes that the Hub's metadata gives for a column; None if it does not."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _keys(column: Any, paths: list[Path]) -> list[str]:
    """The images' own names where each has one, else the file's name and a number."""
    own = [name for name in own_names(column) if name]
    if len(set(own)) == len(column):
        return own
    return [f"{paths[0].stem}/{i}" for i in range(len(column))]


def own_names(column: Any) -> list[str | None]:
    """The name of each image in the file: the path of `{bytes, path}`, or a column of paths itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "path")
    names: list[str | None] = [None] * len(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        names = column.to_pylist()
    return names


class Images(Sequence[bytes | Path]):
    """The first column of a table: encoded images, or paths relative to `file`. Each is copied only when it is read."""

    def __init__(self, table: Any, file: Path) -> None:
        self.column, self.root = table.column(0), file.parent
        if not _can_be_images(self.column.type):
            raise UserError(
                f"{file}: the column {table.column_names[0]} holds {self.column.type}, neither images nor paths: "
                "rename the column that does to image"
            )
        files = Finder()
        self.moved: dict[str, Path] = {}
        for name in _paths(self.column):
            if not (self.root / name).is_file() and (found := files.find(name, [self.root], str(file))) is not None:
                self.moved[name] = found

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, i: int) -> bytes | Path:  # type: ignore[override]
        value = self.column[i].as_py()
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and value:
            return self.moved.get(value, self.root / value)
        return bytes(value or b"")


def _paths(column: Any) -> list[str]:
    """The paths of a column, except those of rows with encoded images."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.filter(pc.is_null(pc.struct_field(column, "bytes")))
    return [name for name in own_names(column) if name]


def _can_be_images(kind: Any) -> bool:
    """Whether an Arrow type can be encoded images, paths, the Hub's `{bytes, path}`, or a column without values."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    known = ("binary", "large_binary", "binary_view", "string", "large_string", "string_view", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in known)


def _mapped(paths: list[Path], columns: list[str]) -> Any:
    """The table of a large set as an Arrow file in the cache, where any row can be read without the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    name = hashlib.blake2b(repr((state, columns)).encode(), digest_size=12).hexdigest()
    cached = cache_folder() / f"{name}.arrow"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        beside = cached.with_suffix(f".{os.getpid()}")
        try:
            with pa.OSFile(str(beside), "wb") as sink:
                writer = None
                for path in paths:
                    for batch in pq.ParquetFile(path).iter_batches(256, columns=columns):
                        writer = writer or pa.ipc.new_file(sink, batch.schema)
                        writer.write_batch(batch)
                if writer is not None:
                    writer.close()
            sync(beside)
            os.replace(beside, cached)
        finally:
            beside.unlink(missing_ok=True)
    return pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
