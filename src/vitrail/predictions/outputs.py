"""Where predictions go: standard output, one file of rows, or figures in a folder.

What is answered goes to a journal beside the output, from which a stopped command resumes.
"""

from __future__ import annotations

import io
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from vitrail.data.decode import EncodedImage
from vitrail.errors import UserError
from vitrail.files import atomic_file, errors_name, refuse_existing, refuse_file_name, write_atomic
from vitrail.predictions.answers import Answered, Precision
from vitrail.predictions.journal import Journal, head_of
from vitrail.predictions.tables import TABLES, JournalRows, Row, pyarrow_for_tables, write_csv, write_parquet
from vitrail.tasks.task import Task

log = logging.getLogger("vitrail")

LONG_SIDE = 1_600
"""maximum longer side in pixels of an image in a figure"""


class Entry(NamedTuple):
    """A prediction as the command prints it."""

    row: Row
    """as `--json` prints it"""
    line: str | None
    """for people; None where only the file is written"""


class Output(AbstractContextManager["Output"]):
    """The output of predictions; this base class is for standard output only."""

    summary: str | None = None
    """the line to print at the end: the path of the output, and how much it holds"""
    done = 0
    """images that a stopped command has answered already"""
    precision: Precision | None = None
    """what it had chosen for the rest"""

    def begin(self, task: Task, images: Sequence[Path]) -> Output:
        """Check that a stopped command was this one. Nothing is written before."""
        return self

    def resumed(self) -> Iterator[Entry]:
        """What the stopped command answered."""
        yield from ()

    def add(self, answered: Answered) -> Entry:
        """Add a prediction."""
        text = "no answer" if answered.answer is None else answered.answer.text()
        # One line per image: an untrained language model writes line breaks too.
        return Entry(answered.row, f"{answered.path}: {' '.join(text.split())}")

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


class Journaled(Output):
    """An output with a journal, which is removed when all images are answered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path)
        self.bad = 0
        self.about: dict[str, Any] = {}
        """what else the resumed command must have in common"""

    def begin(self, task: Task, images: Sequence[Path]) -> Output:
        self.journal.open({**head_of(task, images), **self.about})
        self.done, self.images = self.journal.count, len(images)
        self.precision = self.journal.precision
        if self.done:
            log.warning(f"{self.journal.path}: {self.done:,} of {self.images:,} images are answered already")
        return self

    def resumed(self) -> Iterator[Entry]:
        for entry in self.journal.entries():
            self.bad += "error" in entry["row"]
            yield Entry(entry["row"], entry["line"])

    def add(self, answered: Answered) -> Entry:
        entry, rows = self._write(answered)
        self.bad += "error" in entry.row
        precision = answered.precision
        self.journal.add({"row": entry.row, "line": entry.line, "rows": rows, "precision": precision})
        return entry

    @abstractmethod
    def _write(self, answered: Answered) -> tuple[Entry, list[Row] | None]:
        """What to print, and the rows of a table if they are others."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self.journal.close(remove=False)
            raise
        if kind is not None and (count := self.journal.count):
            log.warning(
                f"stopped after {count:,} of {self.images:,} images: the same command resumes there, with "
                f"{self.journal.path}"
            )
        self.journal.close(remove=kind is None)

    def _finish(self) -> None:
        """Write what is written at the end, and set `summary`."""


class Table(Journaled):
    """One row per image, or in CSV one per record, in one file, which appears complete at the end, or not at all.

    Columns and types are known only at the end.
    """

    def __init__(self, path: Path, write: Callable[[JournalRows, IO[bytes]], None]) -> None:
        if path.is_dir():
            raise UserError(f"{path} is a folder, but --out has the ending of a file: choose another name")
        refuse_existing(path)
        if write is write_parquet:
            pyarrow_for_tables()
        super().__init__(path)
        self.write = write

    def _write(self, answered: Answered) -> tuple[Entry, list[Row] | None]:
        entry = Entry(answered.row, None)
        if self.write is not write_csv or answered.answer is None:
            return entry, None
        about = {name: answered.row[name] for name in ("image", "task")}
        return entry, [{**about, **record} for record in answered.answer.records()]

    def _finish(self) -> None:
        refuse_existing(self.path)  # somebody may have written it meanwhile
        with errors_name(self.path), atomic_file(self.path) as file:
            self.write(JournalRows(self.journal), file)
        bad = f", {self.bad:,} with an error" if self.bad else ""
        count = sum(1 for _ in JournalRows(self.journal))
        self.summary = f"{self.path}: {count:,} row{'s' * (count != 1)}{bad}"


class Figures(Journaled):
    """One figure per image, as a PNG file in a folder, and beside it the images of its answer.

    Unreadable files have none.
    """

    def __init__(self, folder: Path, given: Sequence[str | Path], images: Sequence[Path]) -> None:
        refuse_file_name(
            folder, "choose .jsonl, .csv or .parquet for a table, or a folder without an ending for figures"
        )
        if any(os.path.realpath(folder) == os.path.realpath(path) for path in given):
            raise UserError(f"{folder} holds the input images: choose another folder for --out")
        super().__init__(folder)
        self.folder, self.names = folder, figure_names(given, images)
        self.about = {"figures": [str(name) for name in self.names]}
        resumes = self.journal.exists  # then some figures are there: `begin` looks at the others
        sources = {os.path.realpath(path) for path in images}
        for name in self.names:
            if os.path.realpath(folder / name) in sources:
                raise UserError(f"the figure {folder / name} would overwrite an image: choose another folder for --out")
            if not resumes:
                refuse_existing(folder / name)

    def begin(self, task: Task, images: Sequence[Path]) -> Output:
        super().begin(task, images)
        for name in self.names[self.done + 1 :]:  # the next one may have been drawn, and not noted
            refuse_existing(self.folder / name)
        return self

    def _write(self, answered: Answered) -> tuple[Entry, list[Row] | None]:
        place = self.folder / self.names[self.journal.count]
        entry = Output.add(self, answered)
        if answered.answer is None:
            return entry, None
        self._save(place, answered.answer.draw(original(answered.path)))
        for word, image in answered.answer.images().items():
            beside = place.with_name(f"{place.stem}.{word}.png")
            if not self.done or self.journal.count > self.done:
                refuse_existing(beside)
            self._save(beside, image)
        return Entry({**entry.row, "figure": str(place)}, f"{entry.line} -> {place}"), None

    def _save(self, place: Path, image: Image.Image) -> None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        write_atomic(place, buffer.getvalue())

    def _finish(self) -> None:
        count = self.journal.count - self.bad
        self.summary = f"{self.folder}: {count:,} figure{'s' * (count != 1)}"


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
