"""`vitrail predict`: predictions for files, and their output as rows of one file or figures in a folder."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from vitrail.data.decode import EncodedImage
from vitrail.data.pixels import Source, doubt
from vitrail.data.prepare import Sample
from vitrail.errors import UserError
from vitrail.files import named, printable, refuse_existing, refuse_file_name, replacing, write_whole
from vitrail.tasks.task import Task
from vitrail.tasks.values import Prediction

log = logging.getLogger("vitrail")

BATCH = 32
"""batch size"""
CHUNK = 1_000
"""rows of a table per chunk"""
LONG_SIDE = 1_600
"""maximum longer side in pixels of an image in a figure"""
Row = dict[str, Any]


class Answered(NamedTuple):
    """A file and the model's prediction."""

    path: Path
    row: Row
    """`image`, `task`, and what `Prediction.row` gives, or `error`"""
    answer: Prediction | None
    """None for an unreadable file"""


def answer_files(task: Task, paths: Sequence[Path]) -> Iterator[Answered]:
    """The prediction for each file, in order. Holds one batch of images; warns of doubtful values at the end."""
    sources: list[Source] = []
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        found = answer_items(task, [(str(path), path) for path in batch], sources)
        yield from (Answered(path, row, answer) for path, (row, answer) in zip(batch, found, strict=True))
    if (doubtful := doubt(sources)) is not None:
        log.warning(doubtful)


def answer_items(
    task: Task, items: Sequence[tuple[str, Path | bytes]], sources: list[Source]
) -> list[tuple[Row, Prediction | None]]:
    """The row and the prediction for each image of a batch: a name, and a file or its content.

    An image that cannot be read has a row with its error and None. `sources` gets how the others were stored.
    """
    prepared: list[Sample | str] = []
    for name, item in items:
        try:
            opened = EncodedImage(item, name)
            prepared.append(task.prepare(opened))
            sources.append(opened.source)
        except UserError as error:
            prepared.append(str(error))  # the error object would keep the image in memory
    answers = iter(task.answers([image for image in prepared if not isinstance(image, str)]))
    found: list[tuple[Row, Prediction | None]] = []
    for (name, _), image in zip(items, prepared, strict=True):
        answer = None if isinstance(image, str) else next(answers)
        fields = {"error": image} if answer is None else answer.row()
        found.append(({"image": name, "task": task.name, **fields}, answer))
    return found


class Output(AbstractContextManager["Output"]):
    """The output of predictions; this base class is for standard output only."""

    line: str | None = None
    """the line to print for the last prediction; None for nothing"""
    where: str | None = None
    """the line to print at the end: the path of the output"""

    def take(self, answered: Answered) -> Row:
        """Add a prediction. Returns its row, as `--json` prints it."""
        text = "no answer" if answered.answer is None else answered.answer.text()
        # One line per image: an untrained language model writes line breaks too.
        self.line = f"{answered.path}: {' '.join(text.split())}"
        return answered.row

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass


def output_to(out: Path | None, given: Sequence[str | Path], images: Sequence[Path]) -> Output:
    """The output for `--out`: `images` are the files found in the `given` files and folders.

    Raises UserError, before any image is read, if it would overwrite anything or cannot be written.
    """
    if out is None:
        return Output()
    if (kind := out.suffix.lower()) in TABLES:
        return Table(out, TABLES[kind])
    return Figures(out, given, images)


class Table(Output):
    """One row per image, or in CSV one per record, in one file, which appears complete at the end, or not at all.

    The rows are buffered on disk as JSON lines, because columns and types are known only at the end.
    """

    def __init__(self, path: Path, write: Callable[[Lines, IO[bytes]], None]) -> None:
        if path.is_dir():
            raise UserError(f"{path} is a folder, but --out has the ending of a file: choose another name")
        refuse_existing(path)
        if write is as_parquet:
            pyarrow_for_tables()
        self.path, self.write, self.count, self.bad = path, write, 0, 0

    def __enter__(self) -> Table:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with named(self.path):
            self.waiting = tempfile.TemporaryFile("w+b", dir=self.path.parent)
        return self

    def take(self, answered: Answered) -> Row:
        rows = [answered.row]
        if self.write is as_csv and answered.answer is not None:
            about = {name: answered.row[name] for name in ("image", "task")}
            rows = [{**about, **record} for record in answered.answer.records()]
        with named(self.path):
            self.waiting.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        self.count += len(rows)
        self.bad += answered.answer is None
        return answered.row

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.waiting:
            if kind is None:
                with named(self.path), replacing(self.path) as file:
                    self.write(Lines(self.waiting), file)
        bad = f", {self.bad:,} with an error" if self.bad else ""
        self.where = f"{self.path}: {self.count:,} row{'s' * (self.count != 1)}{bad}"


class Lines:
    """The rows buffered in a file, which can be iterated over repeatedly."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def raw(self) -> Iterator[bytes]:
        self.file.seek(0)
        yield from self.file

    def __iter__(self) -> Iterator[Row]:
        return map(json.loads, self.raw())

    def columns(self) -> list[str]:
        """The names of all rows, in their order, with `error` last."""
        names = dict.fromkeys(name for row in self for name in row if name != "error")
        return [*names, "error"]


def as_jsonl(rows: Lines, file: IO[bytes]) -> None:
    """JSON lines, as `--json` prints them."""
    file.writelines(rows.raw())


def as_csv(rows: Lines, file: IO[bytes]) -> None:
    """CSV in UTF-8 with a header; nested values as JSON, missing values empty."""
    columns = rows.columns()
    text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    text.detach()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def as_parquet(rows: Lines, file: IO[bytes]) -> None:
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


def _chunks(rows: Lines, columns: Sequence[str]) -> Iterator[list[Row]]:
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


TABLES: Mapping[str, Callable[[Lines, IO[bytes]], None]] = {
    ".jsonl": as_jsonl,
    ".csv": as_csv,
    ".parquet": as_parquet,
}
"""writers of tables, by the ending of `--out`"""


class Figures(Output):
    """One figure per image, as a PNG file in a folder, and beside it the images of its answer. Unreadable files have
    none."""

    def __init__(self, folder: Path, given: Sequence[str | Path], images: Sequence[Path]) -> None:
        refuse_file_name(
            folder, "choose .jsonl, .csv or .parquet for a table, or a folder without an ending for figures"
        )
        if any(os.path.realpath(folder) == os.path.realpath(path) for path in given):
            raise UserError(f"{folder} holds the input images: choose another folder for --out")
        self.folder, self.count = folder, 0
        self.places = iter(figure_names(given, images))
        sources = {os.path.realpath(path) for path in images}
        for name in figure_names(given, images):
            if os.path.realpath(folder / name) in sources:
                raise UserError(f"the figure {folder / name} would overwrite an image: choose another folder for --out")
            refuse_existing(folder / name)

    def take(self, answered: Answered) -> Row:
        place = self.folder / next(self.places)
        if answered.answer is None:
            return super().take(answered)
        self._write(place, answered.answer.draw(original(answered.path)))
        for word, image in answered.answer.images().items():
            beside = place.with_name(f"{place.stem}.{word}.png")
            refuse_existing(beside)
            self._write(beside, image)
        self.count += 1
        super().take(answered)
        self.line = f"{self.line} -> {place}"
        return {**answered.row, "figure": str(place)}

    def _write(self, place: Path, image: Image.Image) -> None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        write_whole(place, buffer.getvalue())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.where = f"{self.folder}: {self.count:,} figure{'s' * (self.count != 1)}"


def figure_names(given: Sequence[str | Path], images: Sequence[Path]) -> list[Path]:
    """The path of each image's figure inside the folder of figures, without duplicates.

    An image keeps its path relative to the given folder. Duplicate names get a number, and so does a name such as
    `photo.mask` beside `photo`, whose answer may have an image of that name.
    """
    roots = [Path(path) for path in given if Path(path).is_dir()]
    wanted = []
    for image in images:
        root = next((root for root in roots if image.is_relative_to(root)), image.parent)
        below = image.relative_to(root)
        # Inside the folder of figures, whatever path was given.
        wanted.append(Path(image.name) if ".." in below.parts else below)
    first = {str(below.with_suffix("")).lower() for below in wanted}
    taken: set[str] = set()
    names = []
    for below in wanted:
        number, place = 1, below.with_suffix(".png")
        beside = str(below.with_suffix("").with_suffix("")).lower()
        clash = beside in first and beside != str(below.with_suffix("")).lower()
        while str(place).lower() in taken or (clash and number == 1):  # some file systems are not case-sensitive
            number += 1
            place = below.with_name(f"{below.stem}-{number}.png")
        taken.add(str(place).lower())
        names.append(place)
    return names


def original(path: Path) -> Image.Image:
    """An image for display: upright, in RGB, its longer side at most 1,600 pixels."""
    opened = EncodedImage(path)
    channels = 3 if 3 in (kinds := opened.readable_as()) else kinds[0]
    height, width = opened.measure(channels)
    scale = min(1.0, LONG_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pixels = opened.pixels(channels, at_least=size[::-1])
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)  # the first three of many bands
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
