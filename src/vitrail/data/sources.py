"""Scan folders: which files are images, which folders are splits, what is hidden or linked, what is left out.

Class folders, captioned sets, Parquet files and `vitrail predict` all use this, so that they see the same files.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitrail.data.pixels import HEIC_IS_READ
from vitrail.errors import UserError
from vitrail.files import reading

log = logging.getLogger("vitrail")

HEIF = frozenset([".heic", ".heif", ".hif"])
ENDINGS = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".npy"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
    ]
)
"""extensions of images, in upper or lower case"""
if HEIC_IS_READ:
    ENDINGS |= HEIF

BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|II\*\0|MM\0\*|RIFF.{4}WEBP|\x93NUMPY|.{4}ftyp(avif"
    + (rb"|heic|heix|mif1" if HEIC_IS_READ else rb"")
    + rb")",
    re.DOTALL,
)
"""first bytes of images, for names without an extension"""

LITTER = frozenset(
    [
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "icon\r"),
        *("system volume information", "lost+found", "network trash folder", "temporary items", "picasa.ini"),
        *("@eadir", "@tmp", "@__thumb", "@recycle", "#recycle", "#snapshot", "__pycache__", "_vti_cnf"),
    ]
)
"""names left by operating systems, storage servers and tools; names that begin with a dot are ignored too"""
SIDE_FILES = frozenset(
    [
        *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".md", ".rst"),
        *(".html", ".htm", ".log", ".py", ".ipynb", ".sh", ".mat", ".pkl", ".sha256", ".md5", ".xls", ".xlsx"),
        *(".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".aae", ".xmp", ".url", ".lnk", ".db", ".names", ".data"),
    ]
)
"""extensions of files that are often beside images and are clearly not images"""
SIDE_NAMES = frozenset(["readme", "license", "licence", "copying", "citation", "notice", "authors", "version"])


@dataclass
class Folder:
    """The scanned folder, or one below it. Every list is sorted by name."""

    path: Path
    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """files that are not images"""
    folders: list[Folder] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)
    """links to folders that were already visited; they are not followed"""

    @property
    def name(self) -> str:
        return self.path.name

    def below(self) -> Iterable[Folder]:
        """This folder and all below it, parents first."""
        stack = [self]
        while stack:
            folder = stack.pop()
            yield folder
            stack.extend(reversed(folder.folders))

    def all_images(self) -> list[Path]:
        """The images of this folder, then those of each folder in it."""
        return [image for folder in self.below() for image in folder.images]

    def holds_images(self) -> bool:
        return any(folder.images for folder in self.below())

    def with_images(self) -> list[Folder]:
        """The subfolders that contain images, at any depth."""
        return [folder for folder in self.folders if folder.holds_images()]


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by an operating system or a tool."""
    return name.startswith((".", "~$")) or name.lower() in LITTER


def is_image(file: Path) -> bool:
    """By the extension, or without one by the first bytes: some collections use hashes as names."""
    if file.suffix:
        return file.suffix.lower() in ENDINGS
    try:
        with file.open("rb") as opened:
            return BEGINNINGS.match(opened.read(16)) is not None
    except OSError:
        return False


def listing(path: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, also linked ones, without litter. Raises UserError if it is unreadable.

    Pipes, sockets and devices are left out: reading one could block forever. A broken link counts as a file, so that
    a missing image is reported when it is read.
    """
    folders, files = [], []
    with reading(path), os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_litter(entry.name):
                continue
            try:
                if entry.is_dir():
                    folders.append(path / entry.name)
                elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                    files.append(path / entry.name)
            except OSError:  # a link to itself
                files.append(path / entry.name)
    return folders, files


def folders_in(path: Path) -> list[Path]:
    return listing(path)[0]


def images_in(path: Path) -> list[Path]:
    """The images directly in a folder."""
    return [file for file in listing(path)[1] if is_image(file)]


def scan(path: Path) -> Folder:
    """Everything below a folder. Linked folders are followed; a folder is visited only once.

    The search is breadth-first, links last within a level, so that each folder is found on its shortest path and a real
    folder comes before links to it. A link to one of its own parent folders is a loop, inside or outside of `path`.
    """
    root = Folder(path)
    visited = {_identity(path)}
    level = [root]
    while level:
        found: list[tuple[bool, Path, Folder]] = []
        for folder in level:
            folders, files = listing(folder.path)
            for file in files:
                (folder.images if is_image(file) else folder.others).append(file)
            found += [(inner.is_symlink(), inner, folder) for inner in folders]
        level = []
        for is_link, inner, folder in sorted(found, key=lambda entry: entry[0]):
            identity = _identity(inner)
            if identity in visited or (is_link and _leads_up(inner)):
                folder.again.append(inner)
                continue
            visited.add(identity)
            level.append(Folder(inner))
            folder.folders.append(level[-1])
    for folder in root.below():
        folder.folders.sort(key=lambda inner: inner.name)
    return root


def _identity(path: Path) -> tuple[int, int]:
    with reading(path):
        state = path.stat()
    return state.st_dev, state.st_ino


def _leads_up(link: Path) -> bool:
    here, target = Path(os.path.realpath(link.parent)), Path(os.path.realpath(link))
    return here.is_relative_to(target)


def unwrapped(folder: Folder) -> Folder:
    """Skips folders that contain only a folder of the same name or split, as unzipping leaves them."""
    while len(inner := folder.with_images()) == 1:
        same = inner[0].name.lower() == folder.name.lower()
        if not same and (split_of(inner[0].name) is None or split_of(inner[0].name) != split_of(folder.name)):
            break
        folder = inner[0]
    return folder


def refuse_empty(path: str | Path) -> None:
    """Refuse an empty path, which would mean the current folder: usually an unset shell variable."""
    if not str(path).strip():
        raise UserError("a path is empty: give a file or a folder (`.` is the current one)")


def cache_folder() -> Path:
    """Where downloads and converted files are kept, `~/.cache/vitrail`, or in the folder that XDG_CACHE_HOME names."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail"


def find_data(data: str | Path, what: str, remedy: str) -> Path:
    """The path of a set, or that of a file or folder of this name below `$VITRAIL_DATA`.

    Raises UserError if there is neither, with `what` the set has ("captions") and what to give instead.
    """
    refuse_empty(data)
    path = Path(data).expanduser()
    with reading(path):
        if path.exists():
            return path
    root = os.environ.get("VITRAIL_DATA")
    if root and (Path(root) / path).exists():
        return Path(root) / path
    raise UserError(f"no {what} at {data}: give {remedy}")


def images_of(paths: Sequence[str | Path]) -> list[Path]:
    """The given files, of any type, and the images in given folders, for `vitrail predict`."""
    found: list[Path] = []
    for given in paths:
        refuse_empty(given)
        path = Path(given)
        with reading(path):
            if not path.is_dir():
                found.append(path)
                continue
        root = scan(path)
        if not (images := root.all_images()):
            known = ", ".join(sorted(ENDINGS))
            raise UserError(f"{path} holds no images{found_instead(root)}: give a folder with files of {known}")
        warn_of_left_out(root)
        found += images
    return found


def warn_of_left_out(root: Folder) -> None:
    """Warn of what may be a lost image: files of other extensions, and links that are not followed."""
    if counts := _endings(file for folder in root.below() for file in folder.others if not _is_side_file(file)):
        total = sum(counts.values())
        what = "file that is not an image" if total == 1 else "files that are not images"
        verb = "is" if total == 1 else "are"
        hint = f"; {_heif_hint()}" if any(ending.lower() in HEIF for ending in counts) else ""
        log.warning(f"{total:,} {what} known to vitrail {verb} left out in {root.path} ({_counted(counts)}){hint}")
    if again := [link for folder in root.below() for link in folder.again]:
        more = f", and so do {len(again) - 1:,} more" if len(again) > 1 else ""
        log.warning(f"{again[0]} leads to a folder that is read already{more}: it is not entered again")


def found_instead(root: Folder) -> str:
    """The extensions of the files in a folder without images, as a clause of an error message."""
    counts = _endings(file for folder in root.below() for file in folder.others)
    if not counts:
        return ""
    hint = f"; {_heif_hint()}" if any(ending.lower() in HEIF for ending in counts) else ""
    return f" (its files: {_counted(counts)}{hint})"


def _heif_hint() -> str:
    return "`pip install 'vitrail[heic]'` lets vitrail read HEIC"


def _is_side_file(file: Path) -> bool:
    return file.suffix.lower() in SIDE_FILES or file.stem.lower() in SIDE_NAMES


def _endings(files: Iterable[Path]) -> Counter[str]:
    return Counter(file.suffix or "no ending" for file in files)


def _counted(counts: Counter[str], most: int = 6) -> str:
    more = len(counts) - most
    named = ", ".join(f"{ending}: {count:,}" for ending, count in counts.most_common(most))
    return f"{named} and {more:,} other endings" if more > 0 else named


SPLITS = {
    "train": ("train", "training", "trn", "trainset", "trainingset", "traindata", "trainval"),
    "val": ("val", "valid", "validate", "validation", "dev", "eval", "evaluation", "valset", "validset", "devset"),
    "test": ("test", "testing", "tests", "testset", "testdata"),
}
"""words in the names of files and folders of a split"""
NEUTRAL = frozenset(
    [
        *("set", "sets", "data", "dataset", "split", "part", "folder", "dir", "images", "image", "imgs", "img"),
        *("pictures", "photos", "files", "jpg", "jpeg", "png", "the", "my"),
    ]
)
"""words in a split's name that have no meaning of their own"""


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: `seg_train`, `TrainImages` and `train2017` have two, two and one."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+", name)]


def split_of(name: str, strict: bool = False) -> str | None:
    """The split named by a file or folder, or None; with `strict` only if the name has no other meaning."""
    words = words_of(name)
    named = {split for split, known in SPLITS.items() if not {*words}.isdisjoint(known)}
    if named == {"train", "val"}:  # as trainval
        named = {"train"}
    split = named.pop() if len(named) == 1 else None
    if strict and split and not all(word in NEUTRAL or word in SPLITS[split] for word in words):
        return None
    return split


def one_per_split(folders: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Folders by split. Raises UserError if two have the same split."""
    chosen: dict[str, Path] = {}
    for split, folder in folders:
        if (other := chosen.setdefault(split, folder)) != folder:
            raise UserError(f"{other} and {folder} both look like the {split} split: rename one of them, or remove it")
    return {split: chosen[split] for split in SPLITS if split in chosen}


def files_by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Parquet or tar files by the split in their name, or else in their folder's; "" if neither names one.

    All files of a split must be in one folder: other folders may be other configurations of the same images.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = split_of(file.stem) or split_of(file.parent.name, strict=True) or ""
        splits.setdefault(split, []).append(file)
    one_per_split((split, file.parent) for split, members in splits.items() if split for file in members)
    return splits


def named_files(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The same, but files that name no split are for training; a warning names one if others do name a split."""
    by_split = files_by_split(files)
    if unnamed := by_split.pop("", []):
        if by_split:
            log.warning(f"{unnamed[0]} names no split: it is used for training")
        by_split["train"] = by_split.get("train", []) + unnamed
    return by_split
