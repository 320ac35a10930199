"""Lists of classes beside masks: names in the order of their numbers, with the colours of colour masks if given."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.data.lines import read_lines
from vitrail.errors import UserError

Colour = tuple[int, int, int]

PLAIN = re.compile(r"(obj|class(es)?|labels?|categor(y|ies)|codes|names|class_?names?|label_?names?)")
COLOURED = re.compile(r"(class(es)?|labels?|categor(y|ies))?_?(dict|map|colou?rs?(_?map)?|palette)(_?(dict|map|list))?")
"""names of files that hold a class list, in lower case and without their ending"""
ENDINGS = (".txt", ".csv", ".tsv", ".json", ".names")
VOID_NAMES = frozenset(
    ["void", "ignore", "ignored", "ignorelabel", "unlabelled", "unlabeled", "unknown", "undefined", "unannotated"]
)
"""names of classes, without case and marks, that mean pixels of no class"""
NAME, NUMBER = ("name", "class", "label", "classname", "labelname", "category"), ("id", "index", "number")
CHANNELS = (("r", "red"), ("g", "green"), ("b", "blue"))
HEX = ("hex", "hexcode", "color", "colour")
MARK = r"[\s,;:]+"
RGB = r"(?P<r>\d{1,3})[\s,;]+(?P<g>\d{1,3})[\s,;]+(?P<b>\d{1,3})"
CODE = r"#(?P<hex>[0-9a-fA-F]{6})"
LINES = [
    re.compile(pattern)
    for pattern in (
        rf"^(?P<name>.*\D.*?){MARK}(?:{RGB}|{CODE})[\s,;:]*$",
        rf"^(?:{RGB}|{CODE}){MARK}(?P<name>.*\D.*)$",
    )
]
"""a name and its colour, in either order"""
NUMBERED = re.compile(rf"^(?P<number>\d+){MARK}(?P<name>.*\D.*)$")
NUMBERED_AFTER = re.compile(rf"^(?P<name>.*\D.*?){MARK}(?P<number>\d+)$")


@dataclass(frozen=True)
class Row:
    """A class as a list writes it."""

    name: str
    colour: Colour | None = None
    number: int | None = None


@dataclass(frozen=True)
class ClassList:
    """The classes of a set in the order of their numbers."""

    file: Path
    names: tuple[str, ...]
    colours: tuple[Colour, ...] = ()
    """of each class; () if the list has none"""


def means_void(name: str) -> bool:
    """Whether the name of a class says that its pixels belong to no class."""
    return re.sub(r"[\W_]+", "", name.lower()) in VOID_NAMES


def find_class_list(files: Iterable[Path]) -> ClassList | None:
    """The class list among some files, by their names. Raises UserError if several differ."""
    found: ClassList | None = None
    for file in files:
        stem = re.sub(r"[\s.-]+", "_", file.stem.lower())
        # A table called labels.csv lists images, unless it has colours.
        plain = PLAIN.fullmatch(stem) is not None and not (stem.startswith("label") and file.suffix == ".csv")
        if file.suffix.lower() not in ENDINGS or not (plain or COLOURED.fullmatch(stem) or PLAIN.fullmatch(stem)):
            continue
        new = read_class_list(file)
        if not plain and not new.colours:
            continue
        if found is None or (new.colours and not found.colours and new.names == found.names):
            found = new
        elif new.names != found.names or (new.colours and new.colours != found.colours):
            raise UserError(f"{found.file} and {new.file} list different classes: remove one of them")
    return found


def read_class_list(file: Path) -> ClassList:
    """The classes in a text, CSV or JSON file. Raises UserError, which names the file, the line and the remedy."""
    if file.suffix.lower() == ".json":
        rows = _from_json(file)
    else:
        lines = [(i, line.strip()) for i, line in enumerate(read_lines(file), 1)]
        # A comment begins with a hash, but so does a colour such as #ff0000.
        rows = _from_lines(file, [(i, s) for i, s in lines if s and (s[0] != "#" or re.match(rf"{CODE}\b", s))])
    if rows and re.fullmatch(r"_*ignore_*", rows[0].name) and rows[0].colour is None and len(rows) > 1:
        rows = rows[1:]  # labelme counts its __ignore__ as -1
    return _checked(file, rows)


def _checked(file: Path, rows: list[Row]) -> ClassList:
    if not rows:
        raise UserError(f"{file} lists no classes: write one name per line, in the order of their numbers")
    if all(row.number is not None for row in rows):
        rows = sorted(rows, key=lambda row: row.number or 0)
        if wrong := next((row for i, row in enumerate(rows) if row.number != i), None):
            raise UserError(f"{file}: {wrong.name!r} has the number {wrong.number}: number the classes 0, 1, 2, ...")
    bare = next((row for row in rows if row.colour is None), None)
    coloured = next((row for row in rows if row.colour is not None), None)
    if bare and coloured:
        raise UserError(f"{file}: {coloured.name!r} has a colour and {bare.name!r} has none: give each one or none")
    colours = tuple(row.colour for row in rows if row.colour is not None)
    for what, values in (("class", [row.name for row in rows]), ("colour", [*colours])):
        value, count = Counter(values).most_common(1)[0] if values else ("", 1)
        if count > 1:
            raise UserError(f"{file}: the {what} {value} is listed {count} times: each needs its own line")
    if wrong_colour := next((row for row in rows if row.colour and max(row.colour) > 255), None):
        raise UserError(f"{file}: {wrong_colour.name!r} has the colour {wrong_colour.colour}: values end at 255")
    return ClassList(file, tuple(row.name for row in rows), colours)


def _from_lines(file: Path, lines: list[tuple[int, str]]) -> list[Row]:
    if not lines:
        return []
    if (table := _from_table(file, lines)) is not None:
        return table
    matches = [next((m for pattern in LINES if (m := pattern.match(line))), None) for _, line in lines]
    if all(match is None for match in matches):
        rows = [Row(line.strip("\"'")) for _, line in lines]
    elif None in matches:
        number, line = lines[matches.index(None)]
        raise UserError(f"{file}, line {number}: {line!r:.80} has no colour as other lines have: write `name r g b`")
    else:
        rows = [Row(m["name"].strip("\"' \t,;:"), _colour(m.groupdict())) for m in matches if m is not None]
    numbered = [NUMBERED.match(row.name) for row in rows]
    if any(match is None for match in numbered):
        numbered = [NUMBERED_AFTER.match(row.name) for row in rows]
        # `class 1`, `class 2` are names, but `road 1`, `sky 0` are names with their numbers.
        if any(m is None for m in numbered) or len({m["name"] for m in numbered if m}) < max(2, len(rows)):
            return rows
    return [Row(m["name"], row.colour, int(m["number"])) for m, row in zip(numbered, rows, strict=True) if m]


def _colour(found: dict[str, str | None]) -> Colour:
    if (code := found.get("hex")) is not None:
        return int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)
    return int(found["r"] or 0), int(found["g"] or 0), int(found["b"] or 0)


def _from_table(file: Path, lines: list[tuple[int, str]]) -> list[Row] | None:
    """The rows of a table with a header, as class_dict.csv; None without a header."""
    mark = next((mark for mark in ",;\t" if mark in lines[0][1]), None)
    if mark is None and file.suffix.lower() in (".csv", ".tsv") and re.sub(r"[\W_]+", "", lines[0][1].lower()) in NAME:
        return [Row(line.strip("\"'")) for _, line in lines[1:]]
    if mark is None:
        return None
    header = [re.sub(r"[\W_]+", "", cell.lower()) for cell in next(csv.reader([lines[0][1]], delimiter=mark))]

    def column(names: tuple[str, ...]) -> int | None:
        return next((header.index(name) for name in names if name in header), None)

    name, number = column(NAME), column(NUMBER)
    channels, code = [column(names) for names in CHANNELS], column(HEX)
    if name is None:
        return None
    rows = []
    for (i, _), cells in zip(lines[1:], _cells([line for _, line in lines[1:]], mark), strict=True):
        try:
            values = [None if at is None else int(cells[at]) for at in (number, *channels)]
            r, g, b = values[1:]
            colour = None if r is None or g is None or b is None else (r, g, b)
            if colour is None and code is not None:
                colour = _json_colour(cells[code].strip())
            rows.append(Row(cells[name].strip(), colour, values[0]))
        except (ValueError, IndexError):
            raise UserError(f"{file}, line {i}: it needs a value for each of {', '.join(header)}") from None
    return rows


def _cells(lines: list[str], mark: str) -> Iterator[list[str]]:
    return (next(csv.reader([line], delimiter=mark)) for line in lines)


def _from_json(file: Path) -> list[Row]:
    """A list of names, {number: name}, {name: number}, {name: colour} or records with names; also below one key."""
    try:
        data = json.loads("\n".join(read_lines(file)))
    except ValueError:
        raise UserError(f"{file} is damaged: it is not JSON") from None
    except RecursionError:
        raise UserError(f"{file} is no class list: its lists are nested too deeply") from None
    while isinstance(data, dict) and (key := next((k for k in ("classes", "labels", "names") if k in data), None)):
        if not isinstance(data[key], list | dict):
            break
        data = data[key]
    try:
        if isinstance(data, list):
            return [Row(each) if isinstance(each, str) else _record(each) for each in data]
        return [_entry(key, value) for key, value in data.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f'{file} is no class list: write ["road", "sky"], {{"0": "road"}} or {{"road": [128, 64, 128]}}'
        ) from None


def _entry(key: str, value: Any) -> Row:
    if isinstance(value, dict):
        return _record({"name": key, **value})
    if isinstance(value, list) or (isinstance(value, str) and re.fullmatch(CODE, value)):
        return Row(key, _json_colour(value))
    return Row(value, number=int(key)) if isinstance(value, str) else Row(key, number=int(value))


def _record(record: dict[str, Any]) -> Row:
    name = next((record[key] for key in ("name", "label", "class", "readable") if key in record), None)
    if name is None:
        raise KeyError("name")
    colour = next((record[key] for key in ("color", "colour", "rgb") if record.get(key) is not None), None)
    number = next((int(record[key]) for key in ("id", "index") if record.get(key) is not None), None)
    return Row(str(name), None if colour is None else _json_colour(colour), number)


def _json_colour(value: Any) -> Colour:
    if isinstance(value, str):
        match = re.fullmatch(CODE, value)
        if match is None:
            raise ValueError(value)
        return _colour(match.groupdict())
    r, g, b = (int(each) for each in value)
    return r, g, b
