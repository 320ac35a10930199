"""Folders of images and masks: which file is the mask of which image, and in which split."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vitrail.data.kinds import IMAGE_FOLDERS, TARGET_FOLDERS, end_role_of, joined, remainders, role_of, target_base
from vitrail.data.lines import read_lines
from vitrail.data.sources import NEUTRAL, SPLITS, Folder, split_of, words_of
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

IMAGE_STEM = re.compile(r"[\s_.-]+(leftimg8bit|images?|imgs?|rgb|sat|photos?|originals?|inputs?)$")
MASK_STEM = re.compile(r"[\s_.-]+(gtfine|gtcoarse|label_?trainids)$")
"""what some sets add to the names of images and masks, beside the words of `target_base`"""
LESS = re.compile(
    r"instance(s|ids)?\b|instance|object|colou?r|depth|panoptic|polygon|overlay|preview|visuali[sz]ation|(?<![a-z])vis"
)
"""in the names of what lies beside masks of classes: instances, and masks coloured for people"""
FEW = 3
"""files that are left out with a line each; more are summarised"""
LISTS = ("ImageSets", "Segmentation")
"""the folder in which PASCAL VOC lists the images of each split"""


class Pair(NamedTuple):
    """An image and its mask, if there is one."""

    image: Path
    mask: Path | None


@dataclass
class Place:
    """A file with what its folders say about it."""

    file: Path
    key: str
    """folders that name neither a role nor a split, and the stem, in lower case"""
    split: str
    """"" if no folder names one"""
    role: str | None


@dataclass
class Found:
    """The pairs of each split of a folder; "" holds those of no named split."""

    splits: dict[str, list[Pair]] = field(default_factory=dict)
    lists: list[Path] = field(default_factory=list)
    """files that may hold the classes"""


def find_pairs(path: Path, root: Folder) -> Found | None:
    """The images and masks below a scanned folder; None if it holds no masks of its images.

    An image without a mask stays, as a bad image, unless its whole split has no mask. Masks without an image are left
    out and named. Raises UserError if several masks fit an image equally.
    """
    places = [*_walk(root, None, "", ())]
    masks = [place for place in places if place.role == "targets"]
    pictured = [place for place in places if place.role == "images"]
    images = pictured or [place for place in places if place.role is None]
    chosen, lost = _match(images, masks)
    if not chosen:
        return None
    pairs: dict[str, list[Pair]] = {}
    for image in images:
        mask = chosen.get(image.file)
        split = image.split or (mask.split if mask else "")
        pairs.setdefault(split, []).append(Pair(image.file, mask.file if mask else None))
    if (listed := _listed(root)) and not any(pairs.keys()):
        by_stem = {pair.image.stem: pair for pair in pairs[""]}
        pairs = {
            split: [by_stem.get(stem) or Pair(path / f"{stem}.jpg", None) for stem in stems]
            for split, stems in listed.items()
        }
    for split in [split for split, own in pairs.items() if not any(pair.mask for pair in own)]:
        own = pairs.pop(split)
        log.warning(f"{path}: none of the {len(own):,} images {_named(split)}, as {own[0].image}, has a mask: left out")
    _say("mask", "image", path, lost)
    if pictured and (beside := [place.file for place in places if place.role is None]):
        log.warning(f"{path}: {len(beside):,} images beside the folders of images, as {beside[0]}, are left out")
    return Found(pairs, [file for folder in root.below() if not _deep(path, folder) for file in folder.others])


def _deep(path: Path, folder: Folder) -> bool:
    return len(folder.path.relative_to(path).parts) > 3


def _named(split: str) -> str:
    return f"of the split {split}" if split else "without a split"


def _say(what: str, other: str, path: Path, files: list[Path]) -> None:
    for file in files if len(files) <= FEW else ():
        log.warning(f"left out: {file} is a {what} without an {other}")
    if len(files) > FEW:
        log.warning(f"{path}: {len(files):,} {what}s, as {files[0]}, have no {other} and are left out")


def _walk(folder: Folder, role: str | None, split: str, folders: tuple[str, ...]) -> Iterator[Place]:
    """The images below a folder, each with the role and the split that the names of its folders give."""
    stems = {file.stem.lower() for file in folder.images}
    for file in folder.images:
        stem = file.stem.lower()
        # A mask may lie beside its image: `1_mask.png` beside `1.png`.
        base = target_base(stem)
        own = "targets" if base != stem and base in stems else role
        yield Place(file, "/".join((*folders, stem)), split, own)
    names = {joined(inner.name): inner.name for inner in folder.folders}
    for inner in folder.folders:
        images_of = next((names[left] for left in sorted(remainders(inner.name)) if left in names), None)
        found = role_of(inner.name) or end_role_of(inner.name) or ("targets" if images_of else None)
        own_split = _split(images_of if images_of and _split(inner.name) is None else inner.name)
        own_folders = folders if found or own_split else (*folders, inner.name.lower())
        yield from _walk(inner, found or role, split or own_split or "", own_folders)


def _split(name: str) -> str | None:
    """The split of a folder whose name says nothing but a split and a role, as `train` and `val_masks`."""
    known = {*NEUTRAL, *IMAGE_FOLDERS, *TARGET_FOLDERS, *(word for words in SPLITS.values() for word in words)}
    return split_of(name) if known.issuperset(words_of(name)) else None


def _match(images: list[Place], masks: list[Place]) -> tuple[dict[Path, Place], list[Path]]:
    """The mask of each image that has one, and the masks without an image."""
    tables: list[dict[tuple[str | None, str], list[Place]]] = [{}, {}]
    for image in images:
        for key in {image.key, IMAGE_STEM.sub("", image.key)}:
            tables[0].setdefault((image.split, key), []).append(image)
            # One image of this name, in any folder or split, is it too.
            for split in {image.split, None}:
                tables[1].setdefault((split, key.rpartition("/")[2]), []).append(image)
    candidates: dict[Path, list[Place]] = {}
    lost = []
    for mask in masks:
        found = next((tables[0][mask.split, key] for key in _keys(mask.key) if (mask.split, key) in tables[0]), [])
        for split in (mask.split, None):
            for key in () if found else _keys(mask.key.rpartition("/")[2]):
                alike = tables[1].get((split, key), [])
                unsplit = split is not None or not mask.split or not all(image.split for image in alike)
                found = found or (alike if len(alike) == 1 and unsplit else [])
        for image in found:
            candidates.setdefault(image.file, []).append(mask)
        if not found:
            lost.append(mask.file)
    return {image: _best(image, places) for image, places in candidates.items()}, lost


def _keys(key: str) -> Iterator[str]:
    """The keys that a mask's image may have: the same, or without the words that masks add."""
    yield key
    folders, _, stem = key.rpartition("/")
    for _ in range(3):
        stem = target_base(MASK_STEM.sub("", stem))
        yield f"{folders}/{stem}" if folders else stem
    yield IMAGE_STEM.sub("", f"{folders}/{stem}" if folders else stem)


def _best(image: Path, masks: list[Place]) -> Place:
    """The mask of classes among those of an image. Raises UserError if two are as good."""
    least = min(_rank(mask.file) for mask in masks)
    best = [mask for mask in masks if _rank(mask.file) == least]
    if len(best) > 1:
        raise UserError(
            f"{image} has several masks, {best[0].file} and {best[1].file}: keep those of classes, remove the others"
        )
    return best[0]


def _rank(file: Path) -> int:
    name = f"{file.parent.name}/{file.stem}".lower()
    return 0 if "trainids" in name else 2 if LESS.search(name) else 1


def _listed(root: Folder) -> dict[str, list[str]]:
    """The stems of each split in the lists of PASCAL VOC: train and val, or all as trainval."""
    folders = [folder for folder in root.below() if folder.path.parts[-2:] == LISTS]
    files = {file.stem.lower(): file for folder in folders for file in folder.others if file.suffix == ".txt"}
    chosen = {split: files[split] for split in SPLITS if split in files}
    if "train" not in chosen and "trainval" in files:
        chosen["train"] = files["trainval"]
    return {split: [line.split()[0] for line in read_lines(file) if line.strip()] for split, file in chosen.items()}
