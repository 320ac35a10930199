"""Sets whose labels are in a table (see `vitrail.data.labelled`): one class per image, several labels, or numbers."""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from vitrail.data import sources
from vitrail.data.folders import find_splits
from vitrail.data.kinds import role_of
from vitrail.data.labelled import EMPTY, Entry, Labelled, read_labelled, tables_in
from vitrail.data.named_splits import as_splits, unnamed_for_training
from vitrail.data.sets import ImageSet, Splits, finish, natural
from vitrail.data.sources import find_data, split_of
from vitrail.data.targets import Labels, Numbers, Tags, Target
from vitrail.errors import UserError

log = logging.getLogger("vitrail")
Cell = TypeVar("Cell")

LABEL = "label"
"""the column of classes, or of several labels"""
MARK = "|"
"""between several labels of one image"""
OTHER_MARKS = ";,"
"""other marks that people write there"""
LARGEST = float(torch.finfo(torch.float32).max)
SHOWN = 8
"""names in one line"""


class BadRow(Exception):
    """A row that cannot be used: why, in words."""


def open_class_table(path: Path) -> Splits | None:
    """The set of a table with the column `label`, one class per image; None for a path without one.

    Raises UserError for a folder that has such a table and class folders as well.
    """
    tables = tables_in(path, LABEL)
    if not tables:
        return None
    if path.is_dir():
        _refuse_class_folders(path, _name(tables))
    found = read_labelled(path, tables)
    column = found.where_is(LABEL)
    if column is None:
        raise UserError(
            f"{_name(tables)} has no column label (its columns: {_listed(found.columns)}): rename the one with the "
            "class of each image; `vitrail train tag` learns columns of 0 and 1, `vitrail train regress` other numbers"
        )
    names = _kept(found, lambda entry: _class_of(entry, column))
    _refuse_numbers(path, list(names.values()))
    classes = sorted(set(names.values()), key=natural)
    number = {name: i for i, name in enumerate(classes)}

    def labels(entries: Sequence[Entry]) -> Labels:
        numbers = [number[names[entry.image]] for entry in entries]
        return Labels(torch.tensor(numbers, dtype=torch.int64), classes)

    _say(path, found, f"{len(classes):,} classes, from the column label", {column})
    return finish(path, classes, unnamed_for_training(path, _splits(found, labels)))


def open_tags(data: str | Path, val_fraction: float = 0.1, group: str | None = None) -> Splits:
    """The images with any number of labels each that a table names.

    The column `label` has the labels of an image with a bar between them, and none for an image without a label; or
    each column has the name of a label, with 1 for the images that have it and 0 for the others.
    """
    path, found = _opened(data, "labels", "the columns image and label, or image and a column of 0 and 1 per label")
    column = found.where_is(LABEL)
    if column is not None:
        cells = _kept(found, lambda entry: _tags_of(entry, column))
        classes = sorted(set().union(*cells.values()), key=natural)
        what = f"{len(classes):,} labels, from the column label"
        used = {column}
    else:
        classes, used = found.columns, {*range(len(found.columns))}
        cells = _kept(found, lambda entry: {name for i, name in enumerate(classes) if _flag(entry.cells[i], name)})
        what = f"{len(classes):,} labels, from columns of 0 and 1"
    if not classes:
        raise UserError(f"{path} names no label: write the labels of an image in the column label, as in cat|dog")
    number = {name: i for i, name in enumerate(classes)}

    def tags(entries: Sequence[Entry]) -> Tags:
        values = torch.zeros(len(entries), len(classes))
        for row, entry in enumerate(entries):
            values[row, [number[name] for name in cells[entry.image]]] = 1.0
        return Tags(values, classes)

    without = sum(not own for own in cells.values())
    _say(path, found, what + (f"; {without:,} images have none of them" if without else ""), used)
    splits = as_splits(path, _splits(found, tags), tags([]), val_fraction, group)
    _warn_of_unlearned(path, splits, classes)
    return splits


def open_numbers(
    data: str | Path, val_fraction: float = 0.1, group: str | None = None, values: Sequence[str] | None = None
) -> Splits:
    """The images with numbers that a table names: the columns `values`, by default all but those of image and split."""
    needed = f"the columns image and {_listed(values)}" if values else "the column image and columns of numbers"
    path, found = _opened(data, "numbers", needed)
    names = list(values or found.columns)
    if missing := next((name for name in names if name not in found.columns), None):
        raise UserError(f"{path} has no column {missing!r} (its columns: {_listed(found.columns)}): rename one")
    if not names:
        raise UserError(f"{path} has no column of numbers beside the image: add one, such as age")
    places = [found.columns.index(name) for name in names]
    _refuse_words(path, found, names, places)
    cells = _kept(found, lambda entry: [_number(entry.cells[i], name) for i, name in zip(places, names, strict=True)])

    def numbers(entries: Sequence[Entry]) -> Numbers:
        rows = [cells[entry.image] for entry in entries]
        return Numbers(torch.tensor(rows, dtype=torch.float64).view(len(rows), len(names)), names)

    _say(path, found, f"numbers, from the columns {_listed(names)}", {*places})
    return as_splits(path, _splits(found, numbers), numbers([]), val_fraction, group)


def _opened(data: str | Path, what: str, columns: str) -> tuple[Path, Labelled]:
    layouts = f"a CSV file with {columns}, or a folder with such a file called labels.csv"
    path = find_data(data, f"table of {what}", layouts)
    if not (tables := tables_in(path)):
        raise UserError(f"{path} holds no table of {what}: give {layouts}")
    return path, read_labelled(path, tables)


def _splits(found: Labelled, target: Callable[[Sequence[Entry]], Target]) -> dict[str, ImageSet]:
    """The images of each split, "" for none."""
    by_split: dict[str, list[Entry]] = {}
    for entry in found.entries:
        by_split.setdefault(entry.split, []).append(entry)
    # Rows of a split of which no row can be used count in another one.
    lost = [reason for split, own in found.bad.items() if split not in by_split for reason in own]
    sets = {}
    for place, (split, entries) in enumerate(by_split.items()):
        bad = [*found.bad.get(split, ()), *(lost if place == 0 else ())]
        keys = [found.key(entry.image) for entry in entries]
        images = [entry.image for entry in entries]
        sets[split] = ImageSet(found.path.name, keys, images, target(entries), bad_rows=tuple(bad))
    return sets


def _kept(found: Labelled, read: Callable[[Entry], Cell]) -> dict[Path, Cell]:
    """What each row says, by its image. One that `read` refuses by a BadRow is left out."""
    values, kept = {}, []
    for entry in found.entries:
        try:
            values[entry.image] = read(entry)
        except BadRow as error:
            found.leave_out(entry.split, f"{entry.where}: {error}")
        else:
            kept.append(entry)
    if not kept:
        first = next(reason for own in found.bad.values() for reason in own)
        raise UserError(f"{found.path}: no row can be used (the first: {first})")
    found.entries = kept
    return values


def _class_of(entry: Entry, column: int) -> str:
    cell = entry.cells[column]
    if cell.lower() in EMPTY:
        raise BadRow("the label is empty")
    if MARK in cell:
        raise UserError(
            f"{entry.where}: {cell!r} names several classes: train a model of several labels with `vitrail train tag`, "
            f"or write one class per image, without {MARK}"
        )
    return cell


def _tags_of(entry: Entry, column: int) -> set[str]:
    cell = entry.cells[column]
    names = {name.strip() for name in cell.split(MARK)} - {""}
    if found := next((mark for mark in OTHER_MARKS if mark in cell and (mark == ";" or MARK not in cell)), None):
        raise UserError(
            f"{entry.where}: {cell!r} may be one label or several: write {MARK} between labels, and no {found!r} in one"
        )
    return set() if cell.lower() in EMPTY else names


def _flag(cell: str, name: str) -> bool:
    if cell not in ("0", "1", "0.0", "1.0"):
        raise BadRow(f"{name} is {cell!r}, not 0 or 1")
    return cell.startswith("1")


def _number(cell: str, name: str) -> float:
    if not cell:
        raise BadRow(f"{name} is empty")
    try:
        value = math.nan if "_" in cell else float(cell)
    except ValueError:
        comma = re.fullmatch(r"[-+]?\d+,\d+", cell)
        raise BadRow(f"{name} is {cell!r}, not a number" + (": write a point" if comma else "")) from None
    if not abs(value) < LARGEST:  # also for nan
        raise BadRow(f"{name} is {cell!r}, not a finite number")
    return value


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _refuse_numbers(path: Path, names: Sequence[str]) -> None:
    """Refuse labels that are numbers with fractions: no one counts classes in such steps."""
    if not all(map(_is_number, names)):
        return
    if fraction := next((name for name in names if float(name.replace(",", ".")) % 1), None):
        raise UserError(
            f"{path}: the labels are numbers such as {fraction}, not classes: train a model of numbers with `vitrail "
            "train regress`, or give the classes names"
        )


def _refuse_words(path: Path, found: Labelled, names: Sequence[str], places: Sequence[int]) -> None:
    """Refuse a column in which hardly any cell is a number: it is no column to learn."""
    for name, place in zip(names, places, strict=True):
        words, numbers = _words_and_numbers(found, place)
        if len(words) <= len(numbers):
            continue
        counts = [[len(cells) for cells in _words_and_numbers(found, i)] for i in range(len(found.columns))]
        others = [other for other, (no, yes) in zip(found.columns, counts, strict=True) if yes >= max(no, 1)]
        remedy = f"choose columns of numbers, as in --values {shlex.join(others[:3])}" if others else "add numbers"
        rename = "" if name.lower() == LABEL else f"rename {name} to {LABEL} and "
        raise UserError(
            f"{path}: the column {name} holds {words[0]!r:.40} and other words, not numbers: {remedy}; if these are "
            f"classes, {rename}use `vitrail train folder`"
        )


def _words_and_numbers(found: Labelled, place: int) -> tuple[list[str], list[str]]:
    """The cells of a column that are no numbers, and those that are, without empty ones."""
    filled = [entry.cells[place] for entry in found.entries if entry.cells[place].lower() not in EMPTY]
    return [cell for cell in filled if not _is_number(cell)], [cell for cell in filled if _is_number(cell)]


def _refuse_class_folders(path: Path, table: Path) -> None:
    root = sources.unwrapped(sources.scan(path))
    classes = [f for f in root.with_images() if role_of(f.name) != "images" and split_of(f.name) is None]
    if find_splits(root) or len(classes) > 1:
        raise UserError(
            f"{path} has class folders and {table.name}, which has a column label: give --data {table} to read the "
            "table, or move it elsewhere to use the folders"
        )


def _warn_of_unlearned(path: Path, splits: Splits, classes: Sequence[str]) -> None:
    """Name the labels that no image of the training split has."""
    if not len(splits.train):
        return
    learned: Tensor = Tags.of(splits.train).values.any(dim=0)
    if lacking := [name for name, own in zip(classes, learned.tolist(), strict=True) if not own]:
        log.warning(f"{path}: no image of the training split has the label {_listed(lacking)}: it cannot be learned")


def _say(path: Path, found: Labelled, what: str, used: set[int]) -> None:
    """One line on what a table was taken for."""
    unused = [name for i, name in enumerate(found.columns) if i not in used]
    rest = f" (columns not used: {_listed(unused)})" if unused else ""
    log.warning(f"{path.name}: {len(found.entries):,} images, {what}{rest}")


def _name(tables: dict[str, Path]) -> Path:
    return next(iter(tables.values()))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} others" if more > 0 else "")
