"""Parquet in the Hub's layout: a column of pictures as `{bytes, path}`, a column of labels, names in the metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.errors import UserError

IMAGES = ("image", "img", "picture", "jpg", "png")
LABELS = ("label", "labels", "fine_label", "class", "target")
IN_MEMORY = 1 << 30
"""bytes of files that are read at once; larger sets are written to the cache as an Arrow file, which maps to memory"""


@dataclass
class Table:
    """One part of a set."""

    pictures: Sequence[Any]
    labels: list[int | str]
    keys: list[str]
    names: list[str] | None


def files(path: Path) -> list[Path]:
    """The Parquet files at a path: itself, or those of a folder and the folders in it."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted({*path.glob("*.parquet"), *path.glob("*/*.parquet")})


def read(paths: list[Path]) -> Table:
    """The rows of some files of one part."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("reading Parquet needs pyarrow: pip install 'vitrail[data]'") from None
    try:
        schema = pq.read_schema(paths[0])
        image, label = _column(schema.names, IMAGES, paths[0]), _column(schema.names, LABELS, paths[0])
        if sum(path.stat().st_size for path in paths) < IN_MEMORY:
            table = pa.concat_tables([pq.read_table(path, columns=[image, label]) for path in paths])
        else:
            table = _mapped(paths, [image, label])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{paths[0]} cannot be read as Parquet: {' '.join(str(error).split())}") from None
    column, is_struct = table.column(image), pa.types.is_struct(table.schema.field(image).type)
    return Table(
        _Pictures(column, is_struct, paths[0].parent),
        table.column(label).to_pylist(),
        _keys(table, image, is_struct, paths),
        _class_names(schema.metadata or {}, label),
    )


def _column(names: list[str], wanted: tuple[str, ...], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise UserError(f"{path} has the columns {', '.join(names)}, and none called {' or '.join(wanted[:3])}")


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _keys(table: Any, image: str, is_struct: bool, paths: list[Path]) -> list[str]:
    """The pictures' own names where each has one, else the file's name and a number."""
    if is_struct:
        import pyarrow.compute as pc

        own = [str(name) for name in pc.struct_field(table.column(image), "path").to_pylist() if name]
        if len(set(own)) == table.num_rows:
            return own
    return [f"{paths[0].stem}/{i}" for i in range(table.num_rows)]


class _Pictures(Sequence[bytes | Path]):
    """A column of encoded pictures, each copied only when it is asked for."""

    def __init__(self, column: Any, is_struct: bool, root: Path) -> None:
        self.column, self.is_struct, self.root = column, is_struct, root

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, i: int) -> bytes | Path:  # type: ignore[override]
        value = self.column[i].as_py()
        if self.is_struct and value is not None:
            if value.get("bytes") is None and value.get("path"):
                return self.root / value["path"]
            value = value.get("bytes")
        return bytes(value or b"")


def _mapped(paths: list[Path], columns: list[str]) -> Any:
    """The table of a large set, as an Arrow file in the cache: any row is then found without reading others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    name = hashlib.blake2b(repr((state, columns)).encode(), digest_size=12).hexdigest()
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail" / f"{name}.arrow"
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
            os.replace(beside, cached)
        finally:
            beside.unlink(missing_ok=True)
    return pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
