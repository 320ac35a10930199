"""Find the files that a table's names refer to, even if Windows or another machine wrote the table."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vitrail.data.sources import split_of
from vitrail.errors import UserError

DRIVE = re.compile(r"^(?://[?.]/)?(?:[A-Za-z]:|file:)?")
"""what precedes the folders: a drive letter, a device path, a URL's scheme"""


def tidied(name: str) -> str:
    """The name with slashes between folders, without a byte-order mark, surrounding spaces and `./`."""
    name = name.replace("\\", "/").strip().strip("\ufeff").strip()
    name = re.sub(r"(?<=.)/{2,}", "/", name)
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def is_absolute(name: str) -> bool:
    """Whether a tidied name begins at the root of some machine."""
    return name.startswith("/") or DRIVE.match(name)[0] != ""  # type: ignore[index]


def tails(name: str) -> Iterable[str]:
    """The ends of a tidied name, in decreasing length: all of it below the drive, then without its first folder, ..."""
    names = [each for each in DRIVE.sub("", name).split("/") if each not in ("", ".")]
    return ("/".join(names[i:]) for i in range(len(names)))


class Finder:
    """Finds files by their names in a table.

    A name is used as written if that file exists. Otherwise backslashes separate folders, case is ignored in folders
    and in the extension if exactly one file matches, and for an absolute path, ends of decreasing length are tried.
    """

    def __init__(self) -> None:
        self._shortened: dict[Path, str] = {}
        self._listed: dict[tuple[Path, Callable[[str], str]], dict[str, list[str]]] = {}

    def find(self, name: str, folders: Sequence[Path], where: str) -> Path | None:
        """The file in the first of the folders that has it. Raises UserError, with `where`, if several match."""
        clean = tidied(name)
        for written in dict.fromkeys((name, clean)):
            for folder in folders:
                if written and is_file(folder / written):
                    return folder / written
        for folder in folders if clean else ():
            if (found := self._in_another_case(folder, clean)) is not None:
                return found
        return self._by_its_end(clean, folders, where) if is_absolute(clean) else None

    def _by_its_end(self, name: str, folders: Sequence[Path], where: str) -> Path | None:
        whole = next(iter(tails(name)), "")
        for tail in tails(name):
            dropped = split_of(Path(whole.removesuffix(tail)).name)
            found: dict[Path, Path] = {}
            for folder in folders:
                file = folder / tail if is_file(folder / tail) else self._in_another_case(folder, tail)
                # 1.jpg of a folder train is not the 1.jpg of a folder val.
                if file is not None and (dropped is None or split_of(file.parent.name) in (None, dropped)):
                    found[file.resolve()] = file
            if len(found) > 1:
                first, second = sorted(found.values())[:2]
                raise UserError(f"{where}: {name!r} could be {first} or {second}: write the path below its folder")
            for file in found.values():
                if (other := self._shortened.setdefault(file, name)) != name:
                    raise UserError(
                        f"{where}: {name!r} is not found, and {file} is already {other!r}: write the paths below "
                        "the folder"
                    )
                return file
        return None

    def _in_another_case(self, folder: Path, name: str) -> Path | None:
        """`Images/x.JPG` for `images/x.jpg`, if that is the only one."""
        *parents, last = name.split("/")
        for parent in parents:
            alike = self._names(folder, str.lower).get(parent.lower(), [])
            folder = folder / (alike[0] if len(alike) == 1 else parent)
        alike = self._names(folder, _folded).get(_folded(last), [])
        return folder / alike[0] if len(alike) == 1 and is_file(folder / alike[0]) else None

    def _names(self, folder: Path, fold: Callable[[str], str]) -> dict[str, list[str]]:
        """The names in a folder by their folded form."""
        if (folder, fold) not in self._listed:
            names: dict[str, list[str]] = {}
            try:
                for entry in os.scandir(folder):
                    names.setdefault(fold(entry.name), []).append(entry.name)
            except (OSError, ValueError):  # no such folder, or not a valid name
                pass
            self._listed[folder, fold] = names
        return self._listed[folder, fold]


def _folded(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem + dot + ending.lower() if dot else name


def is_file(path: Path) -> bool:
    """Whether a file exists; False for an invalid name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or a folder without permission to read
        return False


def match_keys(names: Sequence[str], keys: Sequence[str], where: Callable[[int], str]) -> list[int | None]:
    """For each name in a table the index of the key that it refers to, or None.

    Keys are paths below a set's root, or the names of images in a Parquet file. A name may be the key, end with it (an
    absolute path), or be its end (the file's name alone). Raises UserError, with `where(number)`, if several match.
    """
    whole: dict[str, list[int]] = {}
    by_end: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        whole.setdefault(_folded(key), []).append(i)
        for tail in tails(key):
            by_end.setdefault(_folded(tail), []).append(i)
    exact: dict[str, int] = {key: place for place, key in enumerate(keys)}
    found: list[int | None] = []
    for number, name in enumerate(names):
        clean = tidied(name)
        place: int | None = exact.get(name, exact.get(clean))
        if place is None:
            alike = next((whole[tail] for tail in map(_folded, tails(clean)) if tail in whole), None)
            if alike is None:
                alike = by_end.get(_folded(clean), [])
            if len(alike) > 1:
                first, second = keys[alike[0]], keys[alike[1]]
                raise UserError(
                    f"{where(number)}: {name!r} could be {first} or {second}: write the path below the root"
                )
            place = alike[0] if alike else None
        found.append(place)
    return found
