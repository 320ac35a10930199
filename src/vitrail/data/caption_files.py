"""Readers of caption files: each gives entries, an image's name with its captions and where each was read."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vitrail.data import parquet
from vitrail.data.lines import read_lines
from vitrail.data.names import Finder
from vitrail.data.sources import ENDINGS, folders_in, scan, split_of, warn_of_left_out
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

IMAGE_COLUMNS = (
    *("image", "img", "picture", "photo", "jpg", "png", "file_name", "filename", "image_name", "image_path"),
    *("filepath", "file", "path", "image_id", "name"),
)
CAPTIONS = ("caption", "captions", "text", "sentence", "sentences", "description", "comment", "raw")
SPLIT_COLUMNS = ("split", "part", "subset")
NUMBERED = re.compile(r"(caption|sentence|text|comment)s?_?\d+")
"""numbered columns of one caption each, as `caption_0` to `caption_4`"""
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos")
"""folders that may contain one folder per split"""
MARKS = ",\t;|"
QUOTED = re.compile(r'"((?:[^"]|"")*)"')
ROW = re.compile(
    rf'"?[^"{MARKS}]*\.({"|".join(sorted(end[1:] for end in ENDINGS))})(#\d+)?"?\s*[{MARKS}]', re.IGNORECASE
)
"""a line that begins with the name of an image"""
MAX_LINES = 20
"""lines that a quoted caption may span: otherwise an unclosed quote would swallow the rest of the file"""


@dataclass
class Entry:
    """An image as a caption file names it, with its captions as written there."""

    name: str
    where: str
    """file and line, for messages"""
    split: str | None = None
    captions: list[tuple[str, str]] = field(default_factory=list)
    """of each: file and line, and the text"""
    folder: str = ""
    """the image's folder, if the file gives one"""
    reported: bool = False
    """whether a problem with it has been logged"""
    item: Path | int | None = None
    """the image, once it is found: a file, or a row of a Parquet column"""
    same: Path | bytes | int | None = None
    """identity of the image: equal for rows of a Parquet column with the same image"""


class LeftOut:
    """Logs what is left out, one line each, and counts it by kind."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, kind: str, line: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        log.warning(f"left out: {line}")

    def summarise(self, name: str) -> None:
        if self.counts:
            log.warning(f"{name}: left out " + ", ".join(f"{kind}: {n:,}" for kind, n in self.counts.items()))


def read_file(file: Path, left_out: LeftOut) -> list[Entry]:
    """A table or JSON, by its content."""
    lines = read_lines(file)
    first = next((line.lstrip() for line in lines if line.strip()), "")
    if not first:
        raise UserError(f"{file} is empty: it needs the columns image and caption")
    return read_json(file, lines, left_out) if first[0] in "{[" else read_table(file, lines, left_out)


def read_table(file: Path, lines: list[str], left_out: LeftOut) -> list[Entry]:
    """`captions.txt`, split at the first comma, and CSV with a header; also with tabs, semicolons or bars."""
    start = next(i for i, line in enumerate(lines) if line.strip())
    marks = re.search(f"[{MARKS}]", lines[start])
    if marks is None:
        raise UserError(f"{file}, line {start + 1}: one column only: a line needs an image's name, a comma, a caption")
    mark = marks[0]
    image, captions, split_column, columns = 0, [1], None, 2
    simple = ROW.match(lines[start].strip()) is not None
    if not simple:
        header = _csv(file, lines[: start + 1], start, mark)
        names = [name.strip() for _, values in header for name in values]
        image, captions, split_column = _columns(names, f"{file}, line {start + 1}")
        columns = len(names)
        simple, start = (image, captions, columns) == (0, [1], 2), start + 1
    rows = _two_columns(lines, start, mark) if simple else _csv(file, lines, start, mark)
    entries: dict[str, Entry] = {}
    for number, values in rows:
        where = f"{file}, line {number}"
        name = re.sub(r"#\d+$", "", values[image].strip()) if image < len(values) else ""
        entry = entries.setdefault(name, Entry(name, where))
        few, many = len(values) <= max(image, *captions), any(value.strip() for value in values[columns:])
        if few:
            left_out.add("lines with too few columns", f"{where}: no caption after the image's name")
        elif many:
            advice = f"put a caption that contains {mark!r} in quotes"
            left_out.add("lines with too many columns", f"{where}: {len(values)} columns, not {columns}: {advice}")
        if few or many:
            entry.reported = True
            continue
        split = _split(values[split_column]) if split_column is not None and split_column < len(values) else None
        if split and entry.split not in (None, split):
            raise UserError(f"{where}: {name} is in {split} here and in {entry.split} before: take it out of one")
        entry.split = split or entry.split
        entry.captions += [(where, values[column]) for column in captions]
    return list(entries.values())


def _columns(names: list[str], where: str) -> tuple[int, list[int], int | None]:
    """The indices of the columns of image names, of captions, and of splits (None if there is none)."""
    lower = [name.lower() for name in names]

    def first(wanted: Iterable[str]) -> int | None:
        return next((lower.index(name) for name in wanted if name in lower), None)

    image, caption = first(IMAGE_COLUMNS), first(CAPTIONS)
    wanted = re.escape(lower[caption]) if caption is not None else NUMBERED
    captions = [i for i, name in enumerate(lower) if re.fullmatch(wanted, name)]
    if image is None or not captions:
        wanted = "image, file_name or path" if image is None else "caption, text or sentence"
        raise UserError(f"{where}: the columns are {', '.join(names):.200}, and none is called {wanted}: rename one")
    return image, captions, first(SPLIT_COLUMNS)


def _split(name: Any) -> str | None:
    """The split that a value names. Karpathy's "restval" belongs to training."""
    name = str(name or "").strip()
    return "train" if name.lower() == "restval" else split_of(name)


def _two_columns(lines: list[str], i: int, mark: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers with name and caption, split at the first `mark`; the caption may be quoted, as in CSV."""
    while i < len(lines):
        number, line = i + 1, lines[i].strip()
        i += 1
        if not line:
            continue
        quoted = QUOTED.match(line)
        if quoted and line[quoted.end() :].lstrip().startswith(mark):
            name, caption = _unquoted(quoted[1]), line[quoted.end() :].lstrip()[1:]
        else:
            name, found, caption = line.partition(mark)
            if not found:
                yield number, [name]
                continue
        caption = caption.strip()
        if caption.startswith('"'):
            for more in range(min(MAX_LINES, len(lines) - i + 1)):
                if more and ROW.match(lines[i + more - 1].strip()):
                    break  # the next image: the quote belongs to the caption
                whole = QUOTED.fullmatch("\n".join([caption, *lines[i : i + more]]).rstrip())
                if whole:
                    caption, i = _unquoted(whole[1]), i + more
                    break
        yield number, [name, caption]


def _unquoted(text: str) -> str:
    return text.replace('""', '"')


def _csv(file: Path, lines: list[str], start: int, mark: str) -> list[tuple[int, list[str]]]:
    """Line numbers with the fields of a row."""
    # A caption that is too long is left out later, with a message. The limit is one for the whole process.
    before = csv.field_size_limit(sys.maxsize)
    try:
        return list(_rows(file, lines, start, mark))
    finally:
        csv.field_size_limit(before)


def _rows(file: Path, lines: list[str], start: int, mark: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((f"{line}\n" for line in lines[start:]), delimiter=mark, skipinitialspace=True)
    end = start
    try:
        for values in reader:
            number, end = end + 1, start + reader.line_num
            swallowed = any(ROW.search(line) for line in lines[number:end])
            if end - number >= MAX_LINES or swallowed:
                raise UserError(
                    f"{file}, line {number}: a quote is not closed before the next image or within "
                    f"{MAX_LINES} lines: close it, or double the quotes that belong to the caption"
                )
            if any(value.strip() for value in values):
                yield number, values
    except csv.Error as error:
        raise UserError(f"{file}, line {start + reader.line_num}: {error}") from None


def read_json(file: Path, lines: list[str], left_out: LeftOut) -> list[Entry]:
    """Karpathy's JSON (images with sentences and a split), or COCO's captions (images and annotations)."""
    try:
        data = json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{file}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{file} is not read: its lists are nested too deeply") from None
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not images:
        found = ", ".join(map(str, data)) if isinstance(data, dict) else "a list"
        raise UserError(f"{file} holds {found or 'nothing'}: JSON captions need a list `images`, as COCO has")
    return _coco(file, data, left_out) if "annotations" in data else _karpathy(file, images)


def _karpathy(file: Path, images: list[Any]) -> list[Entry]:
    entries = []
    for i, image in enumerate(images):
        where = f"{file}, images[{i}]"
        name = _need(image, ("filename", "file_name"), where)
        # COCO's images are in train2014 or val2014, whatever split this file puts them in.
        entry = Entry(str(name), where, _split(image.get("split")), folder=str(image.get("filepath") or ""))
        sentences = _need(image, ("sentences", "captions"), where) or []
        if not isinstance(sentences, list):
            raise UserError(f"{where}: its captions are not a list: {sentences!r:.40}")
        for sentence in sentences:
            entry.captions += [(f"{where} ({name})", text) for text in _texts(sentence, where)]
        entries.append(entry)
    return entries


def _coco(file: Path, data: dict[str, Any], left_out: LeftOut) -> list[Entry]:
    entries: dict[Any, Entry] = {}
    for i, image in enumerate(data["images"]):
        where = f"{file}, images[{i}]"
        name = str(_need(image, ("file_name",), where))
        entries[_number(image, "id", where)] = Entry(name, where)
    if not isinstance(data["annotations"], list):
        raise UserError(f"{file}: `annotations` is not a list")
    for i, annotation in enumerate(data["annotations"]):
        where = f"{file}, annotations[{i}]"
        texts, image = _texts(_need(annotation, ("caption",), where), where), _number(annotation, "image_id", where)
        if image in entries:
            entries[image].captions += [(where, text) for text in texts]
        else:
            left_out.add("captions of no image", f"{where}: there is no image with the id {image}")
    return list(entries.values())


def _number(record: Any, name: str, where: str) -> int | str:
    """The id of an image: a number or a name."""
    value = _need(record, (name,), where)
    if not isinstance(value, int | str):
        raise UserError(f"{where}: `{name}` is not a number: {value!r:.40}")
    return value


def _need(record: Any, names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if isinstance(record, dict) and name in record:
            return record[name]
    found = ", ".join(map(str, record)) if isinstance(record, dict) else repr(record)[:40]
    raise UserError(f"{where}: no `{names[0]}` among {found}")


def read_pairs(folder: Path) -> list[Entry]:
    """`name.jpg` beside `name.txt` with one caption per line, in a folder and those below; [] if there is no text."""
    root = scan(folder)
    images = root.all_images()
    if not any(file.with_suffix(".txt").is_file() for file in images):
        return []
    warn_of_left_out(root)
    entries = []
    for file in images:
        text = file.with_suffix(".txt")
        entry = Entry(file.name, str(file), item=file)
        if text.is_file():
            numbered = enumerate(read_lines(text), 1)
            entry.captions = [(f"{text}, line {number}", line) for number, line in numbered if line.strip()]
        entries.append(entry)
    return entries


def read_parquet(files: list[Path]) -> tuple[list[Entry], parquet.Images]:
    """Entries that refer to rows, and the column of images. Rows of a split with the same image are one entry."""
    where = str(files[0] if len(files) == 1 else files[0].parent)

    def choose(names: list[str]) -> list[str]:
        image, captions, split = _columns(names, where)
        return [names[i] for i in (image, *captions, *([] if split is None else [split]))]

    table, _ = parquet.rows(files, choose)
    names = [name for name in table.column_names[1:] if name.lower() not in SPLIT_COLUMNS]
    splits = table.column(-1).to_pylist() if len(names) + 1 < table.num_columns else [None] * table.num_rows
    images = parquet.Images(table, files[0])
    own = parquet.own_names(table.column(0))
    texts = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    entries: dict[Any, Entry] = {}
    for i, values in enumerate(texts):
        row, item = f"{where}, row {i}", images[i]
        there = item.is_file() if isinstance(item, Path) else bool(item)
        same = i if not there else item if isinstance(item, Path) else hashlib.blake2b(item, digest_size=16).digest()
        split = _split(splits[i])
        fresh = Entry(own[i] or "", row, split, item=i if there else None, same=same)
        entry = entries.setdefault((same, split), fresh)
        entry.captions += [(row, text) for value in values for text in _texts(value, row)]
    return list(entries.values()), images


def _texts(value: Any, where: str) -> list[str]:
    """A text, or a list of them."""
    if value is None or isinstance(value, str):
        return [value or ""]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each, where)]
    if isinstance(value, dict):
        return _texts(_need(value, ("raw", "caption", "text"), where), where)
    raise UserError(f"{where}: the caption is not text but {value!r:.40}")


def _readable(folder: Path) -> list[Path]:
    try:
        return folders_in(folder)
    except UserError:
        return []


def finder(base: Path, file_split: str = "") -> Callable[[Entry], Path | None]:
    """A function that finds an entry's image in `base`, its subfolders, and folders such as `images/train2017/`.

    Folders named for the entry's split come first. If the name of the caption file names a split, `file_split`, folders
    named for another split are ignored: `train2017/` and `val2017/` may both have a `1.jpg`.
    """
    bases = [base, base.parent] if base.name.lower() == "annotations" else [base]
    below = [folder for each in bases for folder in folders_in(each)]
    inner = [folder for each in below if each.name.lower() in IMAGE_FOLDERS for folder in _readable(each)]
    folders = [*bases, *below, *(folder for folder in inner if split_of(folder.name))]
    files = Finder()

    @cache
    def places(split: str | None) -> list[Path]:
        wanted = split or file_split
        some = folders
        if file_split and not split:
            some = [f for f in folders if f in bases or split_of(f.name) in (wanted, None)]
        return sorted(some, key=lambda folder: split_of(folder.name) != wanted)

    def find(entry: Entry) -> Path | None:
        names = [f"{entry.folder}/{entry.name}"] if entry.folder else []
        found = (files.find(name, places(entry.split), entry.where) for name in [*names, entry.name] if name)
        return next((file for file in found if file is not None), None)

    return find
