"""Sets of captioned images, in the layouts in common use."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

from vitrail.data import parquet
from vitrail.data.caption_files import (
    Entry,
    LeftOut,
    finder,
    read_file,
    read_pairs,
    read_parquet,
)
from vitrail.data.named_splits import as_splits
from vitrail.data.sets import Chosen, ImageSet, Splits
from vitrail.data.sources import (
    Folder,
    files_by_split,
    find_data,
    folders_in,
    images_in,
    is_image,
    listing,
    one_per_split,
    scan,
    split_of,
    warn_of_left_out,
)
from vitrail.data.targets import Texts
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

MAX_WORDS = 1000
MAX_CHARACTERS = 10 * MAX_WORDS
"""A longer text is not a caption but a parsing error. It is left out, not truncated."""


def open_captions(data: str | Path, val_fraction: float = 0.1, group: str | None = None) -> Splits:
    """The captioned images at a path, or in a folder of that name below `$VITRAIL_DATA`.

    A path is `captions.txt`, a CSV, JSON (Karpathy's or COCO's) or Parquet file; a folder that contains such files,
    with the images beside them or in a folder beside them; one such folder per split (`train/`, `val/`, `test/`); or a
    folder of `name.jpg` beside `name.txt`. If nothing names a split, about `val_fraction` of the images are used for
    validation, by a hash of the image or of its `group` (see `vitrail.data.groups`); 0 leaves the set unsplit. What
    cannot be used is left out, logged and counted.
    """
    path = find_data(data, "captions", "a folder with captions.txt and images, or a CSV, JSON or Parquet file")
    left_out = LeftOut()
    found = _from_parquet(path, left_out) if parquet.files(path) else _disjoint(path, _from_files(path, left_out))
    left_out.summarise(str(path))
    splits = {split: chosen for split, chosen in found.items() if len(chosen)}
    if not splits:
        raise UserError(f"{path} holds no image with a caption")
    return as_splits(path, splits, Texts([]), val_fraction, group)


def _disjoint(path: Path, splits: dict[str, ImageSet]) -> dict[str, ImageSet]:
    """The splits without images in common. Raises UserError if two named splits share one.

    A table of all images may be beside one of the test images, so images without a named split yield to named ones.
    """
    for a, b in itertools.combinations(filter(None, splits), 2):
        if both := {*splits[a].keys} & {*splits[b].keys}:
            raise UserError(f"{path}: {min(both)} is in {a} and in {b}, one of {len(both):,}: remove them from one")
    if "" in splits:
        named = {key for split, chosen in splits.items() if split for key in chosen.keys}
        splits[""] = splits[""].subset([i for i, key in enumerate(splits[""].keys) if key not in named])
    return splits


def _from_files(path: Path, left_out: LeftOut) -> dict[str, ImageSet]:
    """The splits of a folder, or of a file of captions; "" for images without a named split."""
    if path.is_file():
        return _from_tables(path, [path], left_out)
    if files := _caption_files(path):
        return _from_tables(path, files, left_out)
    named = _split_folders(path)
    splits, without = {}, []
    for split, folder in (named or {"": path}).items():
        if files := _caption_files(folder):
            entries = [entry for file in files for entry in read_file(file, left_out)]
            find = finder(folder)
            for entry in entries:
                entry.item = find(entry)
            _check_images(entries)
            _name_the_uncaptioned(folder, entries, left_out)
        else:
            entries = read_pairs(folder)
        if entries:
            splits[split] = _make(path, entries, left_out)
        else:
            without.append(folder)
    if not splits:
        raise UserError(
            f"{path} holds no captions: it needs captions.txt beside a folder of images, a CSV, JSON or Parquet file, "
            "or name.txt beside each name.jpg"
        )
    for folder in without:
        log.warning(f"{folder} holds no captions and is left out")
    return splits


def _caption_files(folder: Path) -> list[Path]:
    """The tables and JSON files of captions in a folder; if names contain "caption", only those files."""
    places = [folder, *(place for place in folders_in(folder) if place.name.lower() == "annotations")]
    files = [file for place in places for file in listing(place)[1]]
    files = [file for file in files if file.suffix.lower() in (".txt", ".csv", ".tsv", ".json")]
    beside = {image.with_suffix("") for place in places for image in images_in(place)}
    pairs = {file for file in files if file.suffix.lower() == ".txt" and file.with_suffix("") in beside}
    named = [file for file in files if "caption" in file.stem.lower() and file not in pairs]
    if not named and pairs:
        return []  # the captions are name.txt beside name.jpg, and any table is something else
    return named or [file for file in files if file.suffix.lower() != ".txt"]


def _split_folders(path: Path) -> dict[str, Path]:
    """The folders of the splits. Names with more than the split's word count only if every folder has such a name."""
    folders = folders_in(path)
    named = {folder: split for folder in folders if (split := split_of(folder.name, strict=True))}
    if not named and all(split_of(folder.name) for folder in folders):
        named = {folder: split for folder in folders if (split := split_of(folder.name))}
    for folder in folders if named else ():
        if folder not in named and (count := len(scan(folder).all_images())):
            log.warning(f"{folder} is left out, with {count:,} images: it is not a split (train, val or test)")
    return {split: _unwrapped(folder) for split, folder in one_per_split((s, f) for f, s in named.items()).items()}


def _unwrapped(folder: Path) -> Path:
    """Skips folders that contain only a folder of the same split, as unzipping leaves them."""
    while not _caption_files(folder) and not images_in(folder) and len(inner := folders_in(folder)) == 1:
        if split_of(inner[0].name) != split_of(folder.name):
            break
        folder = inner[0]
    return folder


def _from_tables(path: Path, files: list[Path], left_out: LeftOut) -> dict[str, ImageSet]:
    """Entries of caption files by split: that of the image's row, or else of the file's name, or else of its folder."""
    by_split: dict[str, list[Entry]] = {}
    for file in files:
        file_split = split_of(file.stem) or ""
        find = finder(file.parent, file_split)
        for entry in read_file(file, left_out):
            entry.item = find(entry)
            by_split.setdefault(entry.split or file_split or _split_of_folder(entry, file.parent), []).append(entry)
    found = [entry for entries in by_split.values() for entry in entries]
    _check_images(found)
    if path.is_dir():
        _name_the_uncaptioned(path, found, left_out)
    return {split: _make(path, entries, left_out) for split, entries in by_split.items()}


def _split_of_folder(entry: Entry, base: Path) -> str:
    """The split that an image's folder below `base` is named for."""
    folder = entry.item.parent if isinstance(entry.item, Path) else base
    return split_of(folder.name) or "" if folder != base and folder.is_relative_to(base) else ""


def _check_images(entries: list[Entry]) -> None:
    """Raises UserError if not a single image is found."""
    sound = [entry for entry in entries if entry.captions or not entry.reported]
    if sound and not any(entry.item for entry in sound):
        raise UserError(
            f"{sound[0].where}: {sound[0].name!r} is not found, nor any other of {len(sound):,} images: "
            "put them beside the file, or in a folder `images` beside it"
        )


def _name_the_uncaptioned(path: Path, entries: list[Entry], left_out: LeftOut) -> None:
    """Logs images in the folders of captioned ones that no line names; counts files of other kinds."""
    captioned = {entry.item for entry in entries if isinstance(entry.item, Path)}
    others = []
    for folder in sorted({file.parent for file in captioned}):
        for file in listing(folder)[1]:
            if file in captioned:
                continue
            if is_image(file):
                left_out.add("images without a caption", f"{file}: {path} has no caption for it")
            else:
                others.append(file)
    warn_of_left_out(Folder(path, others=others))


def _make(path: Path, entries: list[Entry], left_out: LeftOut) -> ImageSet:
    """The entries with an image and a caption; those of the same image are one."""
    captions: dict[Path, list[str]] = {}
    for entry in entries:
        if _keep(entry, left_out):
            assert isinstance(entry.item, Path)
            texts = [text for _, text in entry.captions]
            known = captions.get(entry.item)  # from another file or record, which may repeat captions
            captions[entry.item] = texts if known is None else known + [text for text in texts if text not in known]
    root = path if path.is_dir() else path.parent
    keys = [file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file) for file in captions]
    return ImageSet(path.name, keys, [*captions], Texts([*captions.values()]))


def _keep(entry: Entry, left_out: LeftOut) -> bool:
    """Whether an image can be used. Removes captions that cannot be used from the entry."""
    if entry.reported and not entry.captions:
        return False
    if entry.item is None:
        name = repr(entry.name) if entry.name else "its image"
        left_out.add("missing images", f"{entry.where}: {name} is not found")
        return False
    if not entry.captions:
        left_out.add("images without a caption", f"{entry.where}: {entry.name or 'its image'} has no caption")
    kept = []
    for where, text in entry.captions:
        # JSON can write half a surrogate pair, which no encoding has bytes for.
        text = " ".join(text.encode("utf-8", "replace").decode().split())
        words = text.count(" ") + 1
        if not text:
            left_out.add("empty captions", f"{where}: the caption is empty")
        elif words > MAX_WORDS or len(text) > MAX_CHARACTERS:
            size = f"{words:,} words" if words > MAX_WORDS else f"{len(text):,} characters"
            left_out.add(f"captions of more than {MAX_WORDS:,} words", f"{where}: the caption has {size}")
        else:
            kept.append((where, text))
    entry.captions = kept
    return bool(kept)


def _from_parquet(path: Path, left_out: LeftOut) -> dict[str, ImageSet]:
    files = files_by_split(parquet.files(path))
    groups = [(split, members[0], *read_parquet(members)) for split, members in files.items()]
    splits: dict[str, ImageSet] = {}
    whose: dict[Any, str] = {}
    for each in ("test", "val", "train", ""):  # an image in several splits stays in the one to be scored
        for split, file, entries, images in groups:
            own = [entry for entry in entries if (entry.split or split) == each and _keep(entry, left_out)]
            kept = [entry for entry in own if whose.setdefault(entry.same, each) == each]
            for entry in own:
                if (other := whose[entry.same]) != each:
                    left_out.add("images of two splits", f"{entry.where}: its image is also in {other}")
            if kept:
                images_of_split = _from_rows(path, file, kept, images)
                splits[each] = splits[each].joined(images_of_split) if each in splits else images_of_split
    return splits


def _from_rows(path: Path, file: Path, entries: list[Entry], images: parquet.Images) -> ImageSet:
    rows = [entry.item for entry in entries if isinstance(entry.item, int)]
    own = [entry.name for entry in entries]
    keys = own if all(own) and len(set(own)) == len(own) else [f"{file.stem}/{row}" for row in rows]
    captions = [[text for _, text in entry.captions] for entry in entries]
    return ImageSet(path.stem, keys, Chosen(images, rows), Texts(captions))
