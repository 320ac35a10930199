"""The files that captions come in, each read to entries: an image's name, and its captions with where they stand."""

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
from vitrail.data.sources import ENDINGS, folders_in, say_left_out, scan, split_of
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

IMAGE_COLUMNS = (
    *("image", "img", "picture", "photo", "jpg", "png", "file_name", "filename", "image_name", "image_path"),
    *("filepath", "file", "path", "image_id", "name"),
)
CAPTIONS = ("caption", "captions", "text", "sentence", "sentences", "description", "comment", "raw")
PARTS = ("split", "part", "subset")
NUMBERED = re.compile(r"(caption|sentence|text|comment)s?_?\d+")
"""columns of a caption each, as `caption_0` to `caption_4`"""
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos")
"""folders that may hold one a part"""
MARKS = ",\t;|"
QUOTED = re.compile(r'"((?:[^"]|"")*)"')
ROW = re.compile(
    rf'"?[^"{MARKS}]*\.({"|".join(sorted(end[1:] for end in ENDINGS))})(#\d+)?"?\s*[{MARKS}]', re.IGNORECASE
)
"""a line that begins with an image's name"""
MOST_LINES = 20
"""lines that a quoted caption may run over; a quote that stays open would otherwise swallow the rest of the file"""


@dataclass
class Entry:
    """An image as a file names it, with its captions as they stand there."""

    name: str
    where: str
    """file and line, for people"""
    split: str | None = None
    captions: list[tuple[str, str]] = field(default_factory=list)
    """where, and the text"""
    folder: str = ""
    """where the file says that the image lies"""
    named: bool = False
    """whether what is wrong with it has been said"""
    item: Path | int | None = None
    """the image where the reader knows it: a file, or a row of a Parquet column"""
    same: Path | bytes | int | None = None
    """what rows of a Parquet column with the same image have in common"""


class Left:
    """What is left out: each named once, and counted by kind."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def out(self, kind: str, line: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        log.warning(f"left out: {line}")

    def sum_up(self, name: str) -> None:
        if self.counts:
            log.warning(f"{name}: left out " + ", ".join(f"{kind}: {n:,}" for kind, n in self.counts.items()))


def read_file(file: Path, left: Left) -> list[Entry]:
    """A table or JSON, by its content."""
    lines = read_lines(file)
    first = next((line.lstrip() for line in lines if line.strip()), "")
    if not first:
        raise UserError(f"{file} is empty: it needs the columns image and caption")
    return read_json(file, lines, left) if first[0] in "{[" else read_table(file, lines, left)


def read_table(file: Path, lines: list[str], left: Left) -> list[Entry]:
    """`captions.txt`, whose first comma splits, and CSV with a header; also with tabs, semicolons or bars."""
    start = next(i for i, line in enumerate(lines) if line.strip())
    marks = re.search(f"[{MARKS}]", lines[start])
    if marks is None:
        raise UserError(f"{file}, line {start + 1}: one column alone; a line is an image's name, a comma, a caption")
    mark = marks[0]
    image, captions, part, most = 0, [1], None, 2
    simple = ROW.match(lines[start].strip()) is not None
    if not simple:
        header = list(_csv(file, lines[: start + 1], start, mark))
        names = [name.strip() for _, values in header for name in values]
        image, captions, part = _columns(names, f"{file}, line {start + 1}")
        most = len(names)
        simple, start = (image, captions, most) == (0, [1], 2), start + 1
    rows = _two_columns(lines, start, mark) if simple else _csv(file, lines, start, mark)
    entries: dict[str, Entry] = {}
    for number, values in rows:
        where = f"{file}, line {number}"
        name = re.sub(r"#\d+$", "", values[image].strip()) if image < len(values) else ""
        entry = entries.setdefault(name, Entry(name, where))
        few, many = len(values) <= max(image, *captions), any(value.strip() for value in values[most:])
        if few:
            left.out("lines with too few columns", f"{where}: no caption after the image's name")
        elif many:
            advice = f"a caption with a {mark!r} in it is quoted"
            left.out("lines with too many columns", f"{where}: {len(values)} columns for {most}; {advice}")
        if few or many:
            entry.named = True
            continue
        split = _split(values[part]) if part is not None and part < len(values) else None
        if split and entry.split not in (None, split):
            raise UserError(f"{where}: {name} is in {split} here and in {entry.split} before: take it out of one")
        entry.split = split or entry.split
        entry.captions += [(where, values[column]) for column in captions]
    return list(entries.values())


def _columns(names: list[str], where: str) -> tuple[int, list[int], int | None]:
    """The places of an image's name, of its captions, and of the part that it belongs to."""
    lower = [name.lower() for name in names]

    def first(wanted: Iterable[str]) -> int | None:
        return next((lower.index(name) for name in wanted if name in lower), None)

    image, caption = first(IMAGE_COLUMNS), first(CAPTIONS)
    wanted = re.escape(lower[caption]) if caption is not None else NUMBERED
    captions = [i for i, name in enumerate(lower) if re.fullmatch(wanted, name)]
    if image is None or not captions:
        wanted = "image, file_name or path" if image is None else "caption, text or sentence"
        raise UserError(f"{where}: the columns are {', '.join(names):.200}, and none is called {wanted}: rename one")
    return image, captions, first(PARTS)


def _split(name: Any) -> str | None:
    """A split by any of its names. Karpathy's "restval" is for training."""
    name = str(name or "").strip()
    return "train" if name.lower() == "restval" else split_of(name)


def _two_columns(lines: list[str], i: int, mark: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers with name and caption. The first mark splits; the caption may be quoted, as in CSV."""
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
            for more in range(min(MOST_LINES, len(lines) - i + 1)):
                if more and ROW.match(lines[i + more - 1].strip()):
                    break  # the next image: the quote belongs to the caption
                whole = QUOTED.fullmatch("\n".join([caption, *lines[i : i + more]]).rstrip())
                if whole:
                    caption, i = _unquoted(whole[1]), i + more
                    break
        yield number, [name, caption]


def _unquoted(text: str) -> str:
    return text.replace('""', '"')


def _csv(file: Path, lines: list[str], start: int, mark: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers with the fields of a row."""
    before = csv.field_size_limit(sys.maxsize)  # a field that is too long is left out later, by name
    try:
        reader = csv.reader((f"{line}\n" for line in lines[start:]), delimiter=mark, skipinitialspace=True)
        end = start
        for values in reader:
            number, end = end + 1, start + reader.line_num
            swallowed = any(ROW.search(line) for line in lines[number:end])
            if end - number >= MOST_LINES or swallowed:
                raise UserError(
                    f"{file}, line {number}: a quote opens that is not closed, at least not before the next image "
                    f"and within {MOST_LINES} lines"
                )
            if any(value.strip() for value in values):
                yield number, values
    except csv.Error as error:
        raise UserError(f"{file}, line {start + reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)


def read_json(file: Path, lines: list[str], left: Left) -> list[Entry]:
    """Karpathy's JSON (images with sentences and a split), or COCO's captions (images and annotations)."""
    try:
        data = json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: no JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{file}: no JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{file}: lists within lists without end") from None
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not images:
        found = ", ".join(map(str, data)) if isinstance(data, dict) else "a list"
        raise UserError(f"{file} holds {found or 'nothing'}: captions in JSON have a list `images`, as COCO's")
    return _coco(file, data, left) if "annotations" in data else _karpathy(file, images)


def _karpathy(file: Path, images: list[Any]) -> list[Entry]:
    entries = []
    for i, image in enumerate(images):
        where = f"{file}, images[{i}]"
        name = _need(image, ("filename", "file_name"), where)
        # COCO's are of the folders train2014 and val2014, whatever part they are given here.
        entry = Entry(str(name), where, _split(image.get("split")), folder=str(image.get("filepath") or ""))
        sentences = _need(image, ("sentences", "captions"), where) or []
        if not isinstance(sentences, list):
            raise UserError(f"{where}: its captions are no list: {sentences!r:.40}")
        for sentence in sentences:
            entry.captions += [(f"{where} ({name})", text) for text in _texts(sentence, where)]
        entries.append(entry)
    return entries


def _coco(file: Path, data: dict[str, Any], left: Left) -> list[Entry]:
    entries: dict[Any, Entry] = {}
    for i, image in enumerate(data["images"]):
        where = f"{file}, images[{i}]"
        name = str(_need(image, ("file_name",), where))
        entries[_number(image, "id", where)] = Entry(name, where)
    if not isinstance(data["annotations"], list):
        raise UserError(f"{file}: `annotations` is no list")
    for i, annotation in enumerate(data["annotations"]):
        where = f"{file}, annotations[{i}]"
        texts, image = _texts(_need(annotation, ("caption",), where), where), _number(annotation, "image_id", where)
        if image in entries:
            entries[image].captions += [(where, text) for text in texts]
        else:
            left.out("captions of no image", f"{where}: there is no image with the id {image}")
    return list(entries.values())


def _number(record: Any, name: str, where: str) -> int | str:
    """What tells an image from others: a number, or a name."""
    value = _need(record, (name,), where)
    if not isinstance(value, int | str):
        raise UserError(f"{where}: `{name}` is no number: {value!r:.40}")
    return value


def _need(record: Any, names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if isinstance(record, dict) and name in record:
            return record[name]
    found = ", ".join(map(str, record)) if isinstance(record, dict) else repr(record)[:40]
    raise UserError(f"{where}: no `{names[0]}` among {found}")


def read_pairs(folder: Path) -> list[Entry]:
    """`name.jpg` beside `name.txt`, a caption a line, in a folder and those below it; empty where no text is beside."""
    root = scan(folder)
    images = root.all_images()
    if not any(file.with_suffix(".txt").is_file() for file in images):
        return []
    say_left_out(root)
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
    """Entries that name rows, and the column of these. Rows of a part with the same image are one entry."""
    where = str(files[0] if len(files) == 1 else files[0].parent)

    def choose(names: list[str]) -> list[str]:
        image, captions, part = _columns(names, where)
        return [names[i] for i in (image, *captions, *([] if part is None else [part]))]

    table, _ = parquet.rows(files, choose)
    names = [name for name in table.column_names[1:] if name.lower() not in PARTS]
    parts = table.column(-1).to_pylist() if len(names) + 1 < table.num_columns else [None] * table.num_rows
    images = parquet.Images(table, files[0])
    own = parquet.own_names(table.column(0))
    texts = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    entries: dict[Any, Entry] = {}
    for i, values in enumerate(texts):
        row, item = f"{where}, row {i}", images[i]
        there = item.is_file() if isinstance(item, Path) else bool(item)
        same = i if not there else item if isinstance(item, Path) else hashlib.blake2b(item, digest_size=16).digest()
        split = _split(parts[i])
        fresh = Entry(own[i] or "", row, split, item=i if there else None, same=same)
        entry = entries.setdefault((same, split), fresh)
        entry.captions += [(row, text) for value in values for text in _texts(value, row)]
    return list(entries.values()), images


def _texts(value: Any, where: str) -> list[str]:
    """A text, or a list of them."""
    if value is None or isinstance(value, str):
        return [value or ""]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part, where)]
    if isinstance(value, dict):
        return _texts(_need(value, ("raw", "caption", "text"), where), where)
    raise UserError(f"{where}: the caption is no text but {value!r:.40}")


def _readable(folder: Path) -> list[Path]:
    try:
        return folders_in(folder)
    except UserError:
        return []


def finder(base: Path, told: str = "") -> Callable[[Entry], Path | None]:
    """A function from an entry to its image, in a folder, in the folders there, and in `images/train2017/` and such.

    Folders that are named for the entry's split come first. Where the file's name has `told` the split, those that are
    named for another one do not count: `train2017/` and `val2017/` may both have a `1.jpg`.
    """
    bases = [base, base.parent] if base.name.lower() == "annotations" else [base]
    below = [folder for each in bases for folder in folders_in(each)]
    inner = [folder for each in below if each.name.lower() in IMAGE_FOLDERS for folder in _readable(each)]
    folders = [*bases, *below, *(folder for folder in inner if split_of(folder.name))]
    files = Finder()

    @cache
    def places(split: str | None) -> list[Path]:
        wanted = split or told
        some = folders
        if told and not split:
            some = [f for f in folders if f in bases or split_of(f.name) in (wanted, None)]
        return sorted(some, key=lambda folder: split_of(folder.name) != wanted)

    def find(entry: Entry) -> Path | None:
        names = [f"{entry.folder}/{entry.name}"] if entry.folder else []
        found = (files.find(name, places(entry.split), entry.where) for name in [*names, entry.name] if name)
        return next((file for file in found if file is not None), None)

    return find
