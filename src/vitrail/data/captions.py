"""Sets of captioned images, in the layouts that people have them in."""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitrail.data import parquet
from vitrail.data.caption_files import (
    Entry,
    Left,
    finder,
    read_file,
    read_pairs,
    read_parquet,
)
from vitrail.data.channels import stored_channels
from vitrail.data.sets import Chosen, ImageSet, Splits, split_val
from vitrail.data.sources import (
    Folder,
    files_by_split,
    folders_in,
    images_in,
    is_image,
    listing,
    one_per_split,
    refuse_empty,
    say_left_out,
    scan,
    split_of,
)
from vitrail.data.targets import Texts
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

MOST_WORDS = 1000
MOST_CHARACTERS = 10 * MOST_WORDS
"""A longer text is no caption but a column gone wrong. It is left out whole: its first words may say nothing."""


def open_captions(data: str | Path, val_fraction: float = 0.1, group: str | None = None) -> Splits:
    """The captioned images at a path, or in a folder of that name below `$VITRAIL_DATA`.

    A path is `captions.txt`, a CSV, JSON (Karpathy's or COCO's) or Parquet file; a folder that holds such files, with
    the images beside them or in a folder beside them; one such folder per split (`train/`, `val/`, `test/`); or a
    folder of `name.jpg` beside `name.txt`. Where nothing names a split, about `val_fraction` of the images are for
    validation, by a hash of the image or of its `group` (see `vitrail.data.groups`); 0 leaves the set whole. What
    cannot be used is left out, named and counted.
    """
    path = _find(data)
    left = Left()
    found = _from_parquet(path, left) if parquet.files(path) else _apart(path, _from_files(path, left))
    left.sum_up(str(path))
    splits = {split: chosen for split, chosen in found.items() if len(chosen)}
    if not splits:
        raise UserError(f"{path} holds no image with a caption")
    channels = stored_channels(next(iter(splits.values())))
    splits = {split: replace(chosen, channels=channels) for split, chosen in splits.items()}
    whole = splits.pop("", None)
    if whole is not None and splits:
        log.warning(f"{path}: {len(whole):,} images whose split is not named are for training")
        splits["train"] = whole.joined(splits["train"]) if "train" in splits else whole
    elif whole is not None:
        splits = _split(whole, val_fraction, group)
    empty = ImageSet(path.name, [], [], Texts([]), channels)
    return Splits(splits.get("train", empty), splits.get("val"), splits.get("test"))


def _find(data: str | Path) -> Path:
    refuse_empty(data)
    path = Path(data).expanduser()
    if path.exists():
        return path
    root = os.environ.get("VITRAIL_DATA")
    if root and (Path(root) / path).exists():
        return Path(root) / path
    raise UserError(
        f"no captions at {data}: give a folder with captions.txt and images, or a CSV, JSON or Parquet file"
    )


def _split(whole: ImageSet, val_fraction: float, group: str | None) -> dict[str, ImageSet]:
    if not val_fraction or len(whole) < 2:
        return {"train": whole}
    train, val = split_val(whole, val_fraction, group)
    log.info(f"{whole.name} names no splits: {len(val):,} of its {len(whole):,} images, by a hash, are for validation")
    return {"train": train, "val": val}


def _apart(path: Path, splits: dict[str, ImageSet]) -> dict[str, ImageSet]:
    """The splits, of which no two have a file in common; UserError where two that are named do.

    A table of all images may stand beside one of those to test on, so what names no split gives way.
    """
    for a, b in itertools.combinations(filter(None, splits), 2):
        if both := {*splits[a].keys} & {*splits[b].keys}:
            raise UserError(f"{path}: {min(both)} is in {a} and in {b}, one of {len(both):,}: take them out of one")
    if "" in splits:
        named = {key for split, chosen in splits.items() if split for key in chosen.keys}
        splits[""] = splits[""].subset([i for i, key in enumerate(splits[""].keys) if key not in named])
    return splits


def _from_files(path: Path, left: Left) -> dict[str, ImageSet]:
    """The splits of a folder, or of a file of captions; "" for what names no split."""
    if path.is_file():
        return _from_tables(path, [path], left)
    if files := _caption_files(path):
        return _from_tables(path, files, left)
    named = _split_folders(path)
    splits = {}
    for split, folder in (named or {"": path}).items():
        if files := _caption_files(folder):
            entries = [entry for file in files for entry in read_file(file, left)]
            find = finder(folder)
            for entry in entries:
                entry.item = find(entry)
            _check_images(entries)
            _name_the_uncaptioned(folder, entries, left)
        else:
            entries = read_pairs(folder)
        if entries:
            splits[split] = _make(path, entries, left)
        elif split:
            log.warning(f"{folder} holds no captions and is left out")
    if not splits:
        raise UserError(
            f"{path} holds no captions: it needs captions.txt beside a folder of images, a CSV, JSON or Parquet file, "
            "or name.txt beside each name.jpg"
        )
    return splits


def _caption_files(folder: Path) -> list[Path]:
    """The tables and JSON files of a folder that are of captions; where some are called so, these alone."""
    places = [folder, *(place for place in folders_in(folder) if place.name.lower() == "annotations")]
    files = [file for place in places for file in listing(place)[1]]
    files = [file for file in files if file.suffix.lower() in (".txt", ".csv", ".tsv", ".json")]
    beside = {image.with_suffix("") for place in places for image in images_in(place)}
    pairs = {file for file in files if file.suffix.lower() == ".txt" and file.with_suffix("") in beside}
    called = [file for file in files if "caption" in file.stem.lower() and file not in pairs]
    if not called and pairs:
        return []  # the captions are name.txt beside name.jpg, and a table is of something else
    return called or [file for file in files if file.suffix.lower() != ".txt"]


def _split_folders(path: Path) -> dict[str, Path]:
    """The folders of the splits. Names that tell more than the split count where every folder has such a name."""
    folders = folders_in(path)
    told = {folder: split for folder in folders if (split := split_of(folder.name, strict=True))}
    if not told and all(split_of(folder.name) for folder in folders):
        told = {folder: split for folder in folders if (split := split_of(folder.name))}
    for folder in folders if told else ():
        if folder not in told and (count := len(scan(folder).all_images())):
            log.warning(f"{folder} is left out, with {count:,} images: it is no split (train, val or test)")
    return {split: _unwrapped(folder) for split, folder in one_per_split((s, f) for f, s in told.items()).items()}


def _unwrapped(folder: Path) -> Path:
    """The folder inside a split's that holds nothing but one of the same split, as unzipping leaves them."""
    while not _caption_files(folder) and not images_in(folder) and len(inner := folders_in(folder)) == 1:
        if split_of(inner[0].name) != split_of(folder.name):
            break
        folder = inner[0]
    return folder


def _from_tables(path: Path, files: list[Path], left: Left) -> dict[str, ImageSet]:
    """Files of captions by split: as each image says, or else the file's name, or else the folder it lies in."""
    by_split: dict[str, list[Entry]] = {}
    for file in files:
        told = split_of(file.stem) or ""
        find = finder(file.parent, told)
        for entry in read_file(file, left):
            entry.item = find(entry)
            by_split.setdefault(entry.split or told or _split_of_folder(entry, file.parent), []).append(entry)
    found = [entry for entries in by_split.values() for entry in entries]
    _check_images(found)
    if path.is_dir():
        _name_the_uncaptioned(path, found, left)
    return {split: _make(path, entries, left) for split, entries in by_split.items()}


def _split_of_folder(entry: Entry, base: Path) -> str:
    """The split that an image's folder below `base` is named for."""
    folder = entry.item.parent if isinstance(entry.item, Path) else base
    return split_of(folder.name) or "" if folder != base and folder.is_relative_to(base) else ""


def _check_images(entries: list[Entry]) -> None:
    """Raises UserError where no image is there at all."""
    sound = [entry for entry in entries if entry.captions or not entry.named]
    if sound and not any(entry.item for entry in sound):
        raise UserError(
            f"{sound[0].where}: {sound[0].name!r} is not there, nor any other of {len(sound):,} images: "
            "put them beside the file or in a folder images beside it"
        )


def _name_the_uncaptioned(path: Path, entries: list[Entry], left: Left) -> None:
    """Images that lie among the captioned ones, and that no line names; files of other kinds are counted."""
    there = {entry.item for entry in entries if isinstance(entry.item, Path)}
    others = []
    for folder in sorted({file.parent for file in there}):
        for file in listing(folder)[1]:
            if file in there:
                continue
            if is_image(file):
                left.out("images without a caption", f"{file}: {path} has no caption for it")
            else:
                others.append(file)
    say_left_out(Folder(path, others=others))


def _make(path: Path, entries: list[Entry], left: Left) -> ImageSet:
    """The entries with an image and a caption; those of the same image are one."""
    captions: dict[Path, list[str]] = {}
    for entry in entries:
        if _keep(entry, left):
            assert isinstance(entry.item, Path)
            texts = [text for _, text in entry.captions]
            known = captions.get(entry.item)  # from another file or record, which may say the same once more
            captions[entry.item] = texts if known is None else known + [text for text in texts if text not in known]
    root = path if path.is_dir() else path.parent
    keys = [file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file) for file in captions]
    return ImageSet(path.name, keys, [*captions], Texts([*captions.values()]))


def _keep(entry: Entry, left: Left) -> bool:
    """Whether an image is of use; its captions become those that are."""
    if entry.named and not entry.captions:
        return False
    if entry.item is None:
        name = repr(entry.name) if entry.name else "its image"
        left.out("images that are not there", f"{entry.where}: {name} is not there")
        return False
    if not entry.captions:
        left.out("images without a caption", f"{entry.where}: {entry.name or 'its image'} has no caption")
    kept = []
    for where, text in entry.captions:
        # JSON can write half a surrogate pair, which no encoding has bytes for.
        text = " ".join(text.encode("utf-8", "replace").decode().split())
        words = text.count(" ") + 1
        if not text:
            left.out("empty captions", f"{where}: the caption is empty")
        elif words > MOST_WORDS or len(text) > MOST_CHARACTERS:
            size = f"{words:,} words" if words > MOST_WORDS else f"{len(text):,} characters"
            left.out(f"captions of more than {MOST_WORDS:,} words", f"{where}: the caption has {size}")
        else:
            kept.append((where, text))
    entry.captions = kept
    return bool(kept)


def _from_parquet(path: Path, left: Left) -> dict[str, ImageSet]:
    files = files_by_split(parquet.files(path))
    groups = [(split, members[0], *read_parquet(members)) for split, members in files.items()]
    splits: dict[str, ImageSet] = {}
    whose: dict[Any, str] = {}
    for each in ("test", "val", "train", ""):  # what is to be scored keeps an image that others have too
        for split, file, entries, images in groups:
            own = [entry for entry in entries if (entry.split or split) == each and _keep(entry, left)]
            kept = [entry for entry in own if whose.setdefault(entry.same, each) == each]
            for entry in own:
                if (other := whose[entry.same]) != each:
                    left.out("images of two splits", f"{entry.where}: its image is in {other} too")
            if kept:
                made = _from_rows(path, file, kept, images)
                splits[each] = splits[each].joined(made) if each in splits else made
    return splits


def _from_rows(path: Path, file: Path, entries: list[Entry], images: parquet.Images) -> ImageSet:
    rows = [entry.item for entry in entries if isinstance(entry.item, int)]
    own = [entry.name for entry in entries]
    keys = own if all(own) and len(set(own)) == len(own) else [f"{file.stem}/{row}" for row in rows]
    captions = [[text for _, text in entry.captions] for entry in entries]
    return ImageSet(path.stem, keys, Chosen(images, rows), Texts(captions))
