"""Which files are images, which folders are splits, what is hidden or linked, and what was left out.

Folders of classes, captioned sets, Parquet files and `vitrail predict` all ask here, so that they see the same files.
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
"""of images, in any case"""
if HEIC_IS_READ:
    ENDINGS |= HEIF

BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|II\*\0|MM\0\*|RIFF.{4}WEBP|\x93NUMPY|.{4}ftyp(avif"
    + (rb"|heic|heix|mif1" if HEIC_IS_READ else rb"")
    + rb")",
    re.DOTALL,
)
"""of files that are images, where the name has no ending"""

LITTER = frozenset(
    [
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "icon\r"),
        *("system volume information", "lost+found", "network trash folder", "temporary items", "picasa.ini"),
        *("@eadir", "@tmp", "@__thumb", "@recycle", "#recycle", "#snapshot", "__pycache__", "_vti_cnf"),
    ]
)
"""names that operating systems, storage servers and tools leave behind; those that begin with a dot are hidden too"""
SIDE_FILES = frozenset(
    [
        *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".md", ".rst"),
        *(".html", ".htm", ".log", ".py", ".ipynb", ".sh", ".mat", ".pkl", ".sha256", ".md5", ".xls", ".xlsx"),
        *(".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".aae", ".xmp", ".url", ".lnk", ".db", ".names", ".data"),
    ]
)
"""endings of files that often lie beside images and that nobody takes for one"""
SIDE_NAMES = frozenset(["readme", "license", "licence", "copying", "citation", "notice", "authors", "version"])


@dataclass
class Folder:
    """A folder below the one that was scanned. Every list is in the order of names."""

    path: Path
    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """files that are not images"""
    folders: list[Folder] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)
    """links to folders that were visited already, which are not entered"""

    @property
    def name(self) -> str:
        return self.path.name

    def below(self) -> Iterable[Folder]:
        """This folder and all below it, each before those in it."""
        stack = [self]
        while stack:
            folder = stack.pop()
            yield folder
            stack.extend(reversed(folder.folders))

    def all_images(self) -> list[Path]:
        """Those of this folder first, then those of each folder in it."""
        return [image for folder in self.below() for image in folder.images]

    def holds_images(self) -> bool:
        return any(folder.images for folder in self.below())

    def with_images(self) -> list[Folder]:
        """The folders in this one that hold images, at any depth."""
        return [folder for folder in self.folders if folder.holds_images()]


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by an operating system or a tool."""
    return name.startswith((".", "~$")) or name.lower() in LITTER


def is_image(file: Path) -> bool:
    """By the ending in any case; without one by the first bytes, since whole collections are named by hashes alone."""
    if file.suffix:
        return file.suffix.lower() in ENDINGS
    try:
        with file.open("rb") as opened:
            return BEGINNINGS.match(opened.read(16)) is not None
    except OSError:
        return False


def listing(path: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, linked ones too, without litter. Raises UserError if it may not be read.

    Pipes, sockets and devices are left out: reading one could wait for ever. A broken link counts as a file, so that
    an image that is missing is named when it is read.
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
    """The images that lie in a folder itself."""
    return [file for file in listing(path)[1] if is_image(file)]


def scan(path: Path) -> Folder:
    """All that lies below a folder. Linked folders are followed; a folder that was visited is not entered again.

    Level by level, and links last within a level, so that each folder is met on its shortest path, and a link never
    takes the place of the folder itself. A link to a folder that holds the link is a loop, whether or not it leads out
    of `path`.
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
    """The folder inside one that holds no other than one of the same name or split, as unzipping leaves them."""
    while len(inner := folder.with_images()) == 1:
        same = inner[0].name.lower() == folder.name.lower()
        if not same and (split_of(inner[0].name) is None or split_of(inner[0].name) != split_of(folder.name)):
            break
        folder = inner[0]
    return folder


def refuse_empty(path: str | Path) -> None:
    """Refuse a path without a character, which would mean the current folder: a shell's variable that is not set."""
    if not str(path).strip():
        raise UserError("a path is empty: give a file or a folder (`.` is the current one)")


def images_of(paths: Sequence[str | Path]) -> list[Path]:
    """Files as they are given, of any kind, and the images in folders, for `vitrail predict`."""
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
            raise UserError(f"{path} holds no images{found_instead(root)}: give a folder with some of {known}")
        say_left_out(root)
        found += images
    return found


def say_left_out(root: Folder) -> None:
    """Warn of what may have been meant as an image: files by their endings, and links that are not followed."""
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
    """The endings of the files in a folder without images, as the middle of an error line."""
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
"""words that may stand beside one of a split and say nothing of their own"""


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: `seg_train`, `TrainImages` and `train2017` have two, two and one."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+", name)]


def split_of(name: str, strict: bool = False) -> str | None:
    """The split that the name of a file or folder tells; with `strict` only where it tells nothing else."""
    words = words_of(name)
    told = {split for split, known in SPLITS.items() if not {*words}.isdisjoint(known)}
    if told == {"train", "val"}:  # as trainval
        told = {"train"}
    split = told.pop() if len(told) == 1 else None
    if strict and split and not all(word in NEUTRAL or word in SPLITS[split] for word in words):
        return None
    return split


def one_per_split(folders: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Folders by split; raises UserError where two claim the same."""
    chosen: dict[str, Path] = {}
    for split, folder in folders:
        if (other := chosen.setdefault(split, folder)) != folder:
            raise UserError(
                f"{other} and {folder} both look like the {split} split: give one of them another name, or take it out"
            )
    return {split: chosen[split] for split in SPLITS if split in chosen}


def files_by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Parquet files by the split that their name tells, or else their folder's; "" where neither tells one.

    Files of one split lie in one folder: elsewhere they may be another configuration of the same images.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = split_of(file.stem) or split_of(file.parent.name, strict=True) or ""
        splits.setdefault(split, []).append(file)
    one_per_split((split, file.parent) for split, members in splits.items() if split for file in members)
    return splits
