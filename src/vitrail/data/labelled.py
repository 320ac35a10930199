"""Tables of labels: a row per image, with its name and what is known of it. Which rows count is decided here.

A table is a CSV file with a header. One column holds the name of the image (`image`, or another of `IMAGE_COLUMNS`);
a column `split` may name its split; what the other columns mean is the business of the target that is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitrail.data.caption_files import IMAGE_COLUMNS, IMAGE_FOLDERS, ROW, SPLIT_COLUMNS
from vitrail.data.names import Finder
from vitrail.data.sources import folders_in, listing, one_per_split, split_of
from vitrail.data.tables import Row, Table, read_table
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

ENDINGS = (".csv", ".tsv")
NAMED = "labels"
"""the table of a folder, `labels.csv`; or there is one per split, `train.csv`, `val.csv` and `test.csv`"""
EMPTY = ("", "nan")
"""cells without a value: pandas writes the second"""


@dataclass
class Entry:
    """A row with an image."""

    where: str
    """file and line, for messages"""
    image: Path
    cells: list[str]
    """what the row says, in the order of `Labelled.columns`"""
    split: str


@dataclass
class Labelled:
    """The rows of a set's tables."""

    path: Path
    columns: list[str]
    """the names of the columns, but for those of the image and the split"""
    entries: list[Entry] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=dict)
    """by split, "" for none: why rows are left out, one line each"""
    repeated: int = 0
    """rows that say again what another row says"""

    def where_is(self, name: str) -> int | None:
        """The number of a column; None if there is none of this name."""
        lower = [column.lower() for column in self.columns]
        return lower.index(name) if name in lower else None

    def leave_out(self, split: str, reason: str) -> None:
        self.bad.setdefault(split, []).append(reason)

    def key(self, image: Path) -> str:
        """An image's path below the set, or all of it elsewhere."""
        root = self.path if self.path.is_dir() else self.path.parent
        return image.relative_to(root).as_posix() if image.is_relative_to(root) else str(image)


def is_table(path: Path) -> bool:
    """Whether a path ends as a table does."""
    return path.suffix.lower() in ENDINGS


def tables_in(path: Path, column: str | None = None) -> dict[str, Path]:
    """The tables at a path by split, "" if the name has none: a file, or those of a folder; {} if there is none.

    With `column`, tables of a folder without a column of this name, and files that are no tables, are something else.
    Raises UserError for a folder with two tables for the same images.
    """
    if not path.is_dir():
        return {split_of(path.stem, strict=True) or "": path} if is_table(path) else {}
    files = [file for file in listing(path)[1] if is_table(file)]
    files = [file for file in files if file.stem.lower() == NAMED or split_of(file.stem, strict=True)]
    files = [file for file in files if column is None or has_column(file, column)]
    whole = [file for file in files if file.stem.lower() == NAMED]
    named = one_per_split((split, file) for file in files if (split := split_of(file.stem, strict=True)))
    both = [*whole, *named.values()]
    if len(whole) > 1 or (whole and named):
        raise UserError(f"{path} holds {both[0].name} and {both[1].name}: keep one of them, or give it with --data")
    return {"": whole[0]} if whole else named


def has_column(file: Path, name: str) -> bool:
    """Whether a file is a table with a column of images and one of this name."""
    try:
        table = read_table(file)
    except UserError:
        return False
    return None not in (table.find(IMAGE_COLUMNS), table.find([name]))


def read_labelled(path: Path, tables: dict[str, Path]) -> Labelled:
    """The rows of the tables with the files of their images.

    A row is left out if it has another number of cells than the header, if its image is not found, or if its split is
    none. So is an image that two rows describe differently. Raises UserError for a table without a column of images,
    if no row can be used, and for an image in two splits.
    """
    found: Labelled | None = None
    seen: dict[Path, Entry] = {}
    for split, file in tables.items():
        table = read_table(file)
        image = _image_column(table)
        places = [i for i in range(len(table.columns)) if i not in (image, table.find(SPLIT_COLUMNS))]
        columns = [table.columns[i] for i in places]
        if not all(columns) or len({name.lower() for name in columns}) < len(columns):
            raise UserError(f"{file}, line 1: two columns have the same name, or one has none: rename them")
        if found is None:
            found = Labelled(path, columns)
        elif missing := next((name for name in found.columns if name not in columns), None):
            log.warning(f"{file} is left out: it has no column {missing}, which the table before it has")
            continue
        _read(table, image, [places[columns.index(name)] for name in found.columns], split, found, seen)
    assert found is not None
    if not found.entries:
        reasons = [reason for own in found.bad.values() for reason in own]
        first = f"no row can be used (the first: {reasons[0]})" if reasons else "it has a header and no rows"
        raise UserError(f"{path}: {first}")
    if found.repeated:
        log.warning(f"{path}: {found.repeated:,} rows repeat what another row says of their image: read once")
    return found


def _image_column(table: Table) -> int:
    image = table.find(IMAGE_COLUMNS)
    if image is not None:
        return image
    if ROW.match(f"{table.columns[0]},"):
        raise UserError(f"{table.file} has no header: put a line such as image,label before the first image")
    names = ", ".join(table.columns)
    raise UserError(f"{table.file}, line 1: the columns are {names:.200}, and none is called image: rename one")


def _read(
    table: Table, image: int, places: Sequence[int], file_split: str, found: Labelled, seen: dict[Path, Entry]
) -> None:
    """Add the rows of a table; `places` are those of the columns that are kept."""
    split_column, files = table.find(SPLIT_COLUMNS), _Images(table.file.parent)
    conflicting: set[Path] = set()
    for row in table.rows:
        where = table.where(row)
        if (reason := _refused(row, len(table.columns), image)) is not None:
            found.leave_out(file_split, f"{where}: {reason}")
            continue
        name, word = row.cells[image], "" if split_column is None else row.cells[split_column]
        split = (split_of(word) or "") if word else file_split
        if word and not split:
            found.leave_out(file_split, f"{where}: {word!r} names no split: write train, val or test")
            continue
        file = files.find(name, split, where)
        if isinstance(file, str):
            found.leave_out(split, f"{where}: {file}")
            continue
        entry = Entry(where, file, [row.cells[i] for i in places], split)
        other = seen.setdefault(file, entry)
        if other is entry:
            found.entries.append(entry)
        elif other.split != split:
            both = f"in {split or 'no split'} here and in {other.split or 'no split'} in {other.where}"
            raise UserError(f"{where}: {name} is {both}: take it out of one")
        elif other.cells == entry.cells:
            found.repeated += 1
        else:
            conflicting.add(file)
            said = " and ".join(_short(each.cells) for each in (other, entry))
            found.leave_out(split, f"{where}: {name} is {said}, the first in {other.where}")
    found.entries = [entry for entry in found.entries if entry.image not in conflicting]


def _refused(row: Row, columns: int, image: int) -> str | None:
    """What is wrong with a row's cells, in words."""
    if len(row.cells) != columns:
        advice = ": put a cell that contains the mark between columns in quotes" if len(row.cells) > columns else ""
        return f"{len(row.cells)} cells for {columns} columns{advice}"
    return None if row.cells[image] else "the name of the image is empty"


def _short(cells: Sequence[str]) -> str:
    return repr(", ".join(cells))[:60]


class _Images:
    """Finds the images of a table: relative to it, in a folder `images` beside it, or in one named for the split."""

    def __init__(self, base: Path) -> None:
        self.base, self.files = base, Finder()
        below = folders_in(base)
        inner = [folder for folder in below if folder.name.lower() in IMAGE_FOLDERS]
        named = [each for folder in (base, *inner) for each in folders_in(folder) if split_of(each.name)]
        self.beside = [(folder, "") for folder in inner] + [(each, split_of(each.name)) for each in named]

    def find(self, name: str, split: str, where: str) -> Path | str:
        """The file, or why there is none, in words."""
        try:
            if (file := self.files.find(name, [self.base], where)) is not None:
                return file
            others = {file for file in self._others(name, split, where) if file is not None}
        except UserError as error:  # several files match
            return str(error).removeprefix(f"{where}: ")
        if len(others) > 1:
            first, second = sorted(others)[:2]
            return f"{name!r} could be {first} or {second}: write its path from the table"
        hint = "" if Path(name).suffix else " (a name needs its ending, such as .jpg)"
        return next(iter(others), f"{name!r} is not found{hint}")

    def _others(self, name: str, split: str, where: str) -> Iterator[Path | None]:
        for folder, own in self.beside:
            if own == "" or not split or own == split:
                yield self.files.find(name, [folder], where)
