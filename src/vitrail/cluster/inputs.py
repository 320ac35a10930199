"""The images of `vitrail cluster ray predict --data`: a folder, Parquet, or either in a bucket, listed without reading.

Each image has a name, which its row carries, and by which a later run knows that it is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from vitrail.data.parquet import IMAGES, choose_column, own_names
from vitrail.data.sources import ENDINGS, images_of, is_litter
from vitrail.errors import RunError, UserError
from vitrail.predictions.tables import pyarrow_for_tables

TRIES = 3
"""how often a file of a bucket is requested before the error counts"""
Work = dict[str, Any]
"""what a worker reads, as plain data: a file, or some rows of a Parquet file"""


class Inputs(Protocol):
    """The images of a source."""

    def names(self) -> list[str]:
        """The name of each image."""

    def work(self, done: set[str]) -> list[Work]:
        """What is to be read, without the images that are done."""


def is_url(text: str) -> bool:
    """Whether fsspec opens it, and not the local file system."""
    return re.match(r"[A-Za-z][\w+.-]+://", text) is not None


def list_inputs(data: str) -> Inputs:
    """The images at a path or URL. UserError if there is none."""
    if not is_url(data):
        if not Path(data).exists():
            raise UserError(f"no data at {data}: give a folder of images, Parquet, or a URL such as s3://bucket/folder")
        from vitrail.data import parquet

        if tables := parquet.files(Path(data)):
            return Tables([str(path.resolve()) for path in tables])
        return Files([(str(path), str(path.resolve())) for path in images_of([data])])
    found = sorted(_list_bucket(data))
    names = [url for url in found if not any(map(is_litter, PurePosixPath(url.partition("://")[2]).parts))]
    if tables_there := [url for url in names if url.lower().endswith(".parquet")]:
        return Tables(tables_there)
    images = [url for url in names if PurePosixPath(url).suffix.lower() in ENDINGS]
    if not images:
        raise UserError(f"{data} holds neither images nor Parquet files: check the address")
    return Files([(url, url) for url in images])


def _list_bucket(url: str) -> Iterable[str]:
    """The URLs of all files below a URL."""
    try:
        system, root = _file_system(url)
        return [str(system.unstrip_protocol(path)) for path in system.find(root)]
    except ImportError as error:
        raise UserError(f"{url.partition('://')[0]}:// needs another package: {error}") from None
    except UserError:
        raise
    except Exception as error:  # each file system has its own errors
        raise UserError(f"{url} cannot be listed: {type(error).__name__}: {error}") from None


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        raise UserError(f"{url} cannot be opened: {error}") from None
    return system, path


@dataclass(frozen=True)
class Files:
    """One file per image: names, and the paths or URLs where workers find them."""

    places: Sequence[tuple[str, str]]

    def names(self) -> list[str]:
        return [name for name, _ in self.places]

    def work(self, done: set[str]) -> list[Work]:
        return [{"name": name, "path": path} for name, path in self.places if name not in done]


@dataclass(frozen=True)
class Tables:
    """One row of a Parquet file per image. A name is the row's own if all rows have different ones."""

    paths: Sequence[str]

    def names(self) -> list[str]:
        return [name for _, _, names in self._groups() for name in names]

    def work(self, done: set[str]) -> list[Work]:
        return [
            {"table": path, "group": group, "rows": rows, "names": [names[row] for row in rows]}
            for path, group, names in self._groups()
            if (rows := [row for row, name in enumerate(names) if name not in done])
        ]

    def _groups(self) -> list[tuple[str, int, list[str]]]:
        """Each row group: its file, its number in it, and the names of its rows."""
        found = [(path, *group) for path in self.paths for group in _row_groups(path)]
        own = [name for _, _, names in found for name in names if name]
        if len({*own}) == sum(len(names) for _, _, names in found):
            return [(path, group, [str(name) for name in names]) for path, group, names in found]
        result, counts = list[tuple[str, int, list[str]]](), dict[str, int]()
        for path, group, names in found:
            start = counts.get(path, 0)
            result.append((path, group, [f"{path}/{i}" for i in range(start, start + len(names))]))
            counts[path] = start + len(names)
        return result


def _row_groups(path: str) -> Iterator[tuple[int, list[str | None]]]:
    """The row groups of a Parquet file, with the names that its rows have themselves. Images are not read."""
    import pyarrow as pa

    with open_table(path) as table:
        column = choose_column(table.schema_arrow.names, IMAGES, Path(path))
        kind = table.schema_arrow.field(column).type
        wanted = column if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            wanted = f"{column}.path"
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            named = None if wanted is None else table.read_row_group(group, columns=[wanted])
            yield group, [None] * count if named is None else own_names(named.column(0))


def open_table(path: str) -> Any:
    """A Parquet file at a path or URL. UserError if it is none."""
    _, pq = pyarrow_for_tables()
    import pyarrow as pa

    try:
        system, root = _file_system(path)
        return pq.ParquetFile(system.open(root))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from None


# ---- in the workers


def read(work: Work) -> Iterator[tuple[str, Path | bytes | None]]:
    """The name of each image of a piece of work, and its file or content; None if there is nothing.

    RunError if a bucket does not answer: such an image is no bad image, and a later run asks again.
    """
    if "table" not in work:
        yield work["name"], fetch(work["path"])
        return
    with open_table(work["table"]) as table:
        column = choose_column(table.schema_arrow.names, IMAGES, Path(work["table"]))
        images = table.read_row_group(work["group"], columns=[column]).column(0)
        folder = work["table"].rpartition("/")[0]
        for row, name in zip(work["rows"], work["names"], strict=True):
            yield name, _content(images[row].as_py(), folder)


def _content(value: Any, folder: str) -> Path | bytes | None:
    """The image of a row: bytes, a path beside the Parquet file, or the Hub's `{bytes, path}`."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and value:
        return fetch(value if is_url(value) or Path(value).is_absolute() else f"{folder}/{value}")
    return bytes(value) if value else None


def fetch(place: str) -> Path | bytes | None:
    """A local file, or the content of a URL; None if it is not there."""
    if not is_url(place):
        return Path(place)
    for last in (False,) * (TRIES - 1) + (True,):
        try:
            system, path = _file_system(place)
            return bytes(system.cat_file(path))
        except FileNotFoundError:
            return None
        except Exception as error:  # each file system has its own errors
            if last:
                raise RunError(f"{place} cannot be read: {type(error).__name__}: {error}") from None
    return None
