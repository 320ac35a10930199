"""Read one folder per class: which folders are splits and which are classes. Refuses other kinds of data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrail.data import sources
from vitrail.data.kinds import refuse_other_kinds, target_base
from vitrail.data.sources import SPLITS, Folder, split_of, unwrapped, words_of
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

Classes = dict[str, list[Path]]


@dataclass
class ClassFolders:
    """The images of each class of each split."""

    splits: dict[str, Classes]
    beside: list[str]
    """folders of images beside the splits that belong to none"""


def read_class_folders(path: Path, grouped: bool = False) -> ClassFolders:
    """The images of a folder with one folder per class, possibly inside one folder per split.

    Raises UserError if the folders look like something else: splits with unknown names, captions, boxes or masks. With
    `grouped`, folders in the class folders are groups (`--group`), so the same names may recur in several classes.
    """
    scanned = sources.scan(path)
    root = unwrapped(scanned)
    splits = find_splits(root)
    refuse_other_kinds(path, root)
    if not splits:
        refuse_unsorted_splits(path, root)
    for folder in splits.values() or [root]:
        refuse_inner_split(folder, grouped)
        refuse_recurring(folder, grouped)
    found = {split: _classes(folder) for split, folder in (splits or {"train": root}).items()}
    if not any(found.values()):
        what = f"images but no class folders{_hint_of_table(root)}" if root.images else "no images"
        instead = "" if root.images else sources.found_instead(scanned)
        raise UserError(f"{path} holds {what}{instead}: put the images of each class in a folder of its name")
    beside = [folder for folder in root.with_images() if splits and not _holds_one(folder, splits)]
    refuse_one_class(path, found, splits or {"train": root}, root)
    if found.get("train"):
        for folder in beside:
            _warn_unsorted(folder)
        beside += _drop_unsorted(splits, found)
    read = {image for classes in found.values() for images in classes.values() for image in images}
    read |= {image for folder in beside for image in folder.all_images()}
    if loose := [image for image in scanned.all_images() if image not in read]:
        what = "1 image lies" if len(loose) == 1 else f"{len(loose):,} images lie"
        log.warning(f"{what} beside the class folders in {path}, as {loose[0]}: left out")
    for name in found.get("train", {}):
        if split_of(name, strict=True):
            log.warning(f"{path} has a class {name}: it would be a split if its images were in class folders")
    if not grouped:  # a slide or a day may have a file of each class
        _warn_same_stems(path, found)
    sources.warn_of_left_out(scanned)
    return ClassFolders(found, [folder.name for folder in beside])


def find_splits(root: Folder) -> dict[str, Folder]:
    """The folders of the splits, each with class folders in it; empty if the folders in `root` are the classes.

    A class may be called "test", but then its folder contains images and not folders. A name with more words than the
    split's, as `seg_train`, counts if another split is beside it, or if every other folder shares a word with it.
    """
    named = [(split, folder) for folder in root.folders if (split := split_of(folder.name))]
    named = [(split, folder) for split, folder in named if unwrapped(folder).with_images()]
    clear = any(split_of(folder.name, strict=True) for _, folder in named)
    if named and not clear and len({split for split, _ in named}) < 2:
        words = {word for _, folder in named for word in words_of(folder.name)}
        others = [folder for folder in root.with_images() if split_of(folder.name) is None]
        if any(words.isdisjoint(words_of(folder.name)) for folder in others):
            return {}
    folders = {folder.path: folder for _, folder in named}
    chosen = sources.one_per_split((split, folder.path) for split, folder in named)
    return {split: unwrapped(folders[path]) for split, path in chosen.items()}


def _classes(folder: Folder) -> Classes:
    classes = {}
    for each in folder.folders:
        if images := each.all_images():
            classes[each.name] = images
        else:
            log.warning(f"{each.path} holds no images{sources.found_instead(each)} and is left out")
    return classes


def _holds_one(folder: Folder, splits: dict[str, Folder]) -> bool:
    return any(split.path.is_relative_to(folder.path) for split in splits.values())


def _warn_unsorted(folder: Folder) -> None:
    log.warning(
        f"{folder.path} is left out, with {len(folder.all_images()):,} images: it is not a split (train, val or "
        "test) with a folder per class"
    )


def _drop_unsorted(splits: dict[str, Folder], found: dict[str, Classes]) -> list[Folder]:
    """Leave out, and return, the splits with all images in one folder that names no class, as `test/images/`."""
    dropped = []
    for split in [split for split in found if split != "train"]:
        names = [*found[split]]
        plain = {*words_of(names[0])} <= {"unknown", "unlabelled", "unlabeled", *sources.NEUTRAL, *SPLITS[split]}
        if len(names) == 1 and names[0] not in found["train"] and plain:
            _warn_unsorted(splits[split])
            dropped.append(splits[split])
            del found[split]
    return dropped


def refuse_unsorted_splits(path: Path, root: Folder) -> None:
    """Refuse folders of splits without class folders, which would otherwise be read as classes."""
    named = [(split_of(folder.name), split_of(folder.name, strict=True)) for folder in root.with_images()]
    if named and all(split for split, _ in named) and (len(set(named)) > 1 or all(strict for _, strict in named)):
        names = _names(root.with_images())
        raise UserError(
            f"{path}: {names} hold images but no folder per class{_hint_of_table(root)}: put the images of each class "
            "in a folder of its name"
        )


def refuse_inner_split(root: Folder, grouped: bool) -> None:
    """Refuse a split or a copy of the set among the class folders, as `train/train/cat` beside `train/cat`."""
    classes = {folder.name.lower() for folder in root.with_images()}
    for folder in root.with_images():
        inner = {each.name.lower() for each in unwrapped(folder).with_images()}
        repeated = inner & classes
        by_name = split_of(folder.name, strict=True) is not None and inner and (repeated or not grouped)
        if len(classes) > 1 and (by_name or (len(repeated) > 1 and repeated == inner)):
            raise UserError(
                f"{folder.path} is among class folders and contains folders itself "
                f"({_names(unwrapped(folder).with_images())}), so it looks like a split or a copy of the set, not "
                "a class: move its content up, or remove it"
            )


def _warn_same_stems(path: Path, found: dict[str, Classes]) -> None:
    """Warn if all class folders of a split contain files of the same names, as inputs and targets do."""
    for classes in found.values():
        stems = [{target_base(image.stem) for image in images} for images in classes.values()]
        numbered = all(stem.isdecimal() for stem in stems[0]) if stems else True
        if len(stems) > 1 and len(stems[0]) > 1 and not numbered and all(other == stems[0] for other in stems):
            names = ", ".join([*classes][:4]) + (", ..." if len(classes) > 4 else "")
            log.warning(
                f"{path}: the class folders ({names}) all hold files of the same names, as {min(stems[0])}: if "
                "they are inputs and targets, not classes, a classifier cannot use them"
            )
            return


def refuse_recurring(root: Folder, grouped: bool) -> None:
    """Refuse class folders that all contain the same folders: then the inner ones are the classes."""
    tops = [unwrapped(folder) for folder in root.with_images()]
    inner = [{folder.name.lower() for folder in top.with_images()} for top in tops]
    most = max(inner, key=len, default=set())
    loose, total = sum(len(top.images) for top in tops), sum(len(top.all_images()) for top in tops)
    if len(tops) < 2 or len(most) < 2 or loose * 10 > total or not all(names and names <= most for names in inner):
        return
    largest = next(top for top, names in zip(tops, inner, strict=True) if names is most)
    start = f"{root.path}: {_names(root.with_images())} all hold the same folders ({_names(largest.with_images())})"
    if all(split_of(name) for name in most):
        raise UserError(f"{start}: put the splits outside, as in train/{root.with_images()[0].name}")
    if not grouped:
        raise UserError(
            f"{start}: if they are splits, rename them to train, val or test; if they are classes, move their images "
            "up, or give `--group parent` if the folders in them are groups such as slides or days"
        )


def refuse_one_class(path: Path, found: dict[str, Classes], splits: dict[str, Folder], root: Folder) -> None:
    names = sorted({name for classes in found.values() for name in classes})
    if len(names) != 1:
        return
    folder = next(each for split in splits.values() for each in split.folders if each.name == names[0])
    hint = _hint_of_table(root)
    if unwrapped(folder).with_images():
        hint = f"; if the folders in it are the classes or the splits, give {folder.path}"
    raise UserError(f"{path} holds one class ({names[0]}): a classifier needs at least two{hint}")


def _hint_of_table(root: Folder) -> str:
    """A note that labels may be in a table, as in many competitions: not one that `vitrail.data.labelled` takes."""
    tables = [file for file in root.others if file.suffix.lower() in (".csv", ".tsv")]
    remedy = "give it with --data, with the columns image and label in its header"
    return f" ({tables[0].name} may hold the labels: {remedy})" if tables else ""


def _names(folders: Sequence[Folder], most: int = 4) -> str:
    names = [folder.name for folder in folders]
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} others" if len(names) > most else "")
