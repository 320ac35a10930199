"""Read images with classes from tar files in WebDataset's layout: `KEY.jpg` beside `KEY.cls` or `KEY.json`.

`vitrail data shard` writes such tar files with an index, `_info.json`, so that a set opens at once and any image can be
read without the others. Tar files without an index are scanned when they are opened.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.data.content import BITS
from vitrail.data.members import Members
from vitrail.data.parquet import Table
from vitrail.data.sources import ENDINGS, SPLITS, is_image, is_litter, listing, named_files, scan, split_of
from vitrail.errors import UserError, warn_once
from vitrail.files import reading

log = logging.getLogger("vitrail")

INDEX = "_info.json"
"""The index has the name and the fields that timm's reader expects, and for each split the columns below."""
COLUMNS = ("keys", "labels", "offsets", "sizes", "hashes")
"""of each image: its name, its class, where it is in its tar file, and the hash of the image it was made from"""


@dataclass
class Sample:
    """An image in a tar file, and what the files beside it say about it."""

    key: str
    place: tuple[int, int]
    """offset and size"""
    label: int | str | None
    name: str | None
    """of its class"""
    hash: int | None


def files(path: Path) -> list[Path]:
    """The tar files at a path: the file itself, or those in a folder or its splits, if these hold no loose images."""
    if not path.is_dir():
        return [path] if path.is_file() and _is_tar(path) else []
    folders, found = listing(path)
    tars = [file for file in found if _is_tar(file)]
    if tars:  # beside class folders, a tar file may be what they were unpacked from
        return [] if any(map(is_image, found)) or any(scan(folder).holds_images() for folder in folders) else tars
    splits = [folder for folder in folders if split_of(folder.name)]
    inner = [listing(split) for split in splits]
    if any(folders for folders, _ in inner):
        for split, (classes, found) in zip(splits, inner, strict=True):
            if any(map(_is_tar, found)) and not classes and not any(map(is_image, found)):
                warn_once(
                    f"{split} holds tar files, and other splits hold class folders: it is left out; unpack its "
                    "files, or pack all splits with `vitrail data shard`"
                )
        return []
    return [file for _, found in inner for file in found if _is_tar(file)]


def _is_tar(file: Path) -> bool:
    return file.suffix.lower() == ".tar"


def read(path: Path, tars: list[Path]) -> dict[str, Table]:
    """The splits of tar files, by their index if there is one, or else by the names of the files."""
    if path.is_dir() and (index := _read_index(path / INDEX)) is not None:
        tables = {name: _from_index(path, split, index["classes"]) for name, split in index["splits"].items()}
        listed = {name for split in index["splits"].values() for name in split["filenames"]}
        if others := [tar for tar in tars if tar.name not in listed]:
            log.warning(f"{others[0]} is not in {INDEX}: left out, as all tar files that it does not list")
        return tables
    scanned = {split: _scan_all(own) for split, own in named_files(tars).items()}
    tables = {split: table for split, (table, _) in scanned.items()}
    return _with_classes(path, tables, [names for _, names in scanned.values()])


# ---- with an index


def _read_index(file: Path) -> dict[str, Any] | None:
    """The index of a set; None if there is none, or only one of another tool."""
    try:
        with reading(file):
            index = json.loads(file.read_bytes())
        if not all(name in split for split in index["splits"].values() for name in COLUMNS):
            return None
        if not {*index["splits"]} <= {*SPLITS} or not isinstance(index["classes"], list):
            raise KeyError("splits")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(file, f"it is not JSON with splits and classes ({type(error).__name__})") from None
    return index


def _from_index(folder: Path, split: dict[str, Any], classes: list[str]) -> Table:
    """A split of the index, with its numbers checked: they come from a file."""
    file = folder / INDEX
    try:
        keys, names, counts = [*split["keys"]], [*split["filenames"]], [*split["shard_lengths"]]
        numbers = (split[name] for name in ("labels", "offsets", "sizes", "hashes", "bytes"))
        labels, offsets, sizes, hashes, bytes_of = (np.array(each, dtype=np.int64) for each in numbers)
        total = sum(counts)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    if not len(keys) == total == len(labels) == len(offsets) == len(sizes) == len(hashes):
        raise _damaged(file, "its columns have different lengths")
    if not len(names) == len(counts) == len(bytes_of) or not all(
        isinstance(each, int) and each >= 0 for each in counts
    ):
        raise _damaged(file, "its lists of tar files have different lengths, or a number below 0")
    if not all(isinstance(name, str) for name in (*keys, *classes, *names)):
        raise _damaged(file, "a name in it is not text")
    if (labels < 0).any() or (labels >= len(classes)).any():
        raise _damaged(file, "a label in it has no class")
    which = np.repeat(np.arange(len(names)), counts)
    if (offsets < 0).any() or (sizes < 0).any() or (offsets > bytes_of[which] - sizes).any() or (hashes >> BITS).any():
        raise _damaged(file, "an image in it is outside its tar file, or has no valid hash")
    tars = [_checked(folder, name, size) for name, size in zip(names, bytes_of.tolist(), strict=True)]
    return Table(Members(tars, which, offsets, sizes, hashes), labels.tolist(), keys, classes)


def _checked(folder: Path, name: str, size: int) -> Path:
    """A tar file of the index, which must be there and have the size that the index says."""
    tar = folder / name
    if tar.name != name:  # the index may come from anywhere, so it names only files beside it
        raise _damaged(folder / INDEX, f"{name} is not the name of a file beside it")
    remedy = f"copy it again, or remove {folder / INDEX} to read the tar files without it"
    with reading(tar):
        if not tar.is_file():
            raise UserError(f"{tar} is missing, and {INDEX} lists it: {remedy}")
        if (found := tar.stat().st_size) != size:
            raise UserError(f"{tar} has {found:,} bytes, and {size:,} by {INDEX}: {remedy}")
    return tar


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged: {reason}: copy it again, or remove it to read the tar files without it")


# ---- without an index


def _scan_all(tars: list[Path]) -> tuple[Table, dict[int, str]]:
    """The labelled images of some tar files, and the known names of their classes."""
    found = [(i, sample) for i, tar in enumerate(tars) for sample in _scan(tar)]
    if not found:
        raise UserError(
            f"{tars[0]} holds no images as WebDataset names them (KEY.jpg beside KEY.cls): {_unpack(tars[0])}"
        )
    labelled = [(i, sample) for i, sample in found if sample.label is not None]
    if not labelled:
        where = "KEY.cls, or `label` in KEY.json"
        raise UserError(f"{tars[0]} holds images without a class ({where}): {_unpack(tars[0])}")
    if missing := len(found) - len(labelled):
        log.warning(f"{tars[0]}: {missing:,} of {len(found):,} images have no class and are left out")
    keys = [sample.key for _, sample in labelled]
    if len({*keys}) < len(keys):
        keys = [f"{tars[i].stem}/{sample.key}" for i, sample in labelled]
    hashes = [sample.hash for _, sample in labelled if sample.hash is not None]
    offsets, sizes = np.array([sample.place for _, sample in labelled]).T
    known = np.array(hashes) if len(hashes) == len(labelled) else None
    members = Members(tars, np.array([i for i, _ in labelled]), offsets, sizes, known)
    names = _names_of(tars[0], {(sample.label, sample.name) for _, sample in labelled})
    return Table(members, [sample.label for _, sample in labelled if sample.label is not None], keys, None), names


def _names_of(path: Path, pairs: Iterable[tuple[int | str | None, str | None]]) -> dict[int, str]:
    """The names of numbered classes. Raises UserError if a number has two."""
    names: dict[int, str] = {}
    for number, name in pairs:
        if isinstance(number, int) and name is not None and names.setdefault(number, name) != name:
            raise UserError(f"{path}: class {number} has two names, {names[number]!r} and {name!r}: correct KEY.json")
    return names


def _unpack(tar: Path) -> str:
    return f"unpack it (`tar -xf {tar.name}`), and give a folder with one folder per class"


def _with_classes(path: Path, tables: dict[str, Table], known: Sequence[Mapping[int, str]]) -> dict[str, Table]:
    """The tables with the names of the classes, if each number has one."""
    names = _names_of(path, (pair for own in known for pair in own.items()))
    numbers = {label for table in tables.values() for label in table.labels}
    if names and numbers == names.keys():
        classes = [names.get(i, str(i)) for i in range(max(names) + 1)]
        for table in tables.values():
            table.names = classes
    return tables


def _scan(tar: Path) -> Iterator[Sample]:
    """The images of a tar file, by the headers of its files. Neighbours with the same key belong together."""
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
            file.seek(-2 * tarfile.BLOCKSIZE, 2)
            if file.read().strip(b"\0"):
                raise tarfile.ReadError("its end is missing")
            members = (member for member in archive if member.isreg() and not is_litter(Path(member.name).name))
            for key, own in itertools.groupby(members, lambda member: _split_name(member.name)[0]):
                beside = {_split_name(member.name)[1]: member for member in own}
                image = next((member for ending, member in beside.items() if f".{ending}" in ENDINGS), None)
                if image is not None:
                    content = {}
                    for ending in {"cls", "json"} & beside.keys():
                        file.seek(beside[ending].offset_data)
                        content[ending] = file.read(beside[ending].size)
                    yield _sample(tar, key, image, content)
    except PermissionError as error:
        raise UserError(f"cannot read {tar}: {error.strerror}") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = f"is cut off, damaged or compressed ({error})"
        raise UserError(f"{tar} {reason}: copy it again, or decompress it with gunzip") from None


def _split_name(name: str) -> tuple[str, str]:
    """A file's key and its ending in lower case: the key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _sample(tar: Path, key: str, image: tarfile.TarInfo, content: Mapping[str, bytes]) -> Sample:
    """`content` are the files beside the image, by ending."""
    try:
        row = json.loads(content.get("json", b"{}"))
        row = row if isinstance(row, dict) else {}
        text = content["cls"].decode().strip() if "cls" in content else None
    except ValueError as error:
        raise UserError(f"{tar}: the files beside {image.name} cannot be read: {error}") from None
    label: Any = row.get("label") if text is None else int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
    if isinstance(label, bool) or not isinstance(label, int | str) or label in ("", -1):  # -1 means that it is hidden
        label = None
    name, own, number = (row.get(field) for field in ("class", "filename", "hash"))
    if not isinstance(own, str) or not isinstance(number, int) or not 0 <= number < 1 << BITS:
        own, number = image.name, None  # of another tool, whose names may repeat
    return Sample(own, (image.offset_data, image.size), label, name if isinstance(name, str) else None, number)
