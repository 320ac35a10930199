"""Classes: how many images each has, and whether one comes from a source of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vitrail.data.sources import Folder, find_data
from vitrail.doctor.finding import Finding, a_few, counted
from vitrail.doctor.survey import Survey

RARE = 0.2
"""images of a rare class, as a fraction of an equal share"""
FEWEST = 10
"""images of a class to train on, below which scores are a matter of luck"""
ENOUGH = 8
"""images of a class whose source is judged"""
OWN, OTHERS = 0.95, 0.02
"""fraction of a class that shares a property, and of the others that may have it too, for a source of its own"""
SOURCES: dict[str, Callable[[np.ndarray], list[str]]] = {
    "size": lambda rows: [f"{w}x{h} pixels" for w, h in zip(rows["width"], rows["height"], strict=True)],
    "format": lambda rows: [str(name) for name in rows["format"]],
    "camera": lambda rows: [str(name) for name in rows["camera"]],
    "depth": lambda rows: [f"{bits} bits" for bits in rows["bits"]],
    "channels": lambda rows: ["grey" if grey else "colour" for grey in rows["grey"]],
    "compression": lambda rows: [f"JPEG table {table:x}"[:16] if table else "" for table in rows["tables"]],
}
"""properties that tell where an image comes from, from the rows of a survey"""


def counts(found: Survey) -> Iterator[Finding]:
    """Rare classes and too few images, of the training split."""
    if not found.classes or not len(found):
        return
    train = found.labels[found.split == 0]
    number = np.bincount(train, minlength=len(found.classes))

    def named(chosen: np.ndarray) -> list[tuple[str, ...]]:
        return [(f"{found.classes[k]} ({number[k]:,})",) for k in np.flatnonzero(chosen)]

    split = found.splits[0]
    if (empty := number == 0).any():
        yield Finding(
            "empty-classes",
            f"{counted(int(empty.sum()), 'class has', 'classes have')} no image in {split}",
            "add images, or remove the class from the list of classes",
            "certain",
            named(empty),
        )
    share = len(train) / len(number)
    if (rare := (number > 0) & (number <= RARE * share)).any():
        yield Finding(
            "rare-classes",
            f"{counted(int(rare.sum()), 'class has', 'classes have')} few of the {len(train):,} images of {split}; an "
            f"equal share is {share:,.0f}",
            "collect more of them, or train with --balanced; judge by the accuracy of each class, not the mean",
            "certain",
            named(rare),
        )
    if (few := (number > 0) & (number < FEWEST)).any() and split == "train":
        yield Finding(
            "few-images",
            f"{counted(int(few.sum()), 'class has', 'classes have')} fewer than {FEWEST} images to train on",
            "collect more: start from pretrained weights (--init) and repeat with several seeds before you trust a "
            "score",
            "certain",
            named(few),
        )


def empty_folders(root: Folder, found: Survey) -> Iterator[Finding]:
    """Folders beside those of the classes that hold no image."""
    parents = {Path(name).parent.parent for name in found.names}
    places = {root.path / parent for parent in parents if not parent.is_absolute()}
    empty = [
        (folder.path.relative_to(root.path).as_posix(),)
        for place in root.below()
        if place.path in places
        for folder in place.folders
        if not folder.holds_images()
    ]
    if empty and found.classes:
        yield Finding(
            "empty-classes",
            f"{counted(len(empty), 'folder', 'folders')} beside the classes {'holds' if len(empty) == 1 else 'hold'} "
            "no image",
            "add images, or remove the folder: the model does not get this class",
            "certain",
            empty,
        )


def sources(found: Survey) -> Iterator[Finding]:
    """Classes whose training images share a property that no other class has, which a model could learn instead."""
    good = found.good()
    good = good[found.split[good] == 0]
    labels, rows = found.labels[good], found.measured[good]
    if len(found.classes) < 2 or not len(good):
        return
    told: dict[int, list[str]] = {}
    for values_of in SOURCES.values():
        values = np.array(values_of(rows))
        for k in range(len(found.classes)):
            own, others = values[labels == k], values[labels != k]
            if len(own) < ENOUGH or len(others) < ENOUGH:
                continue
            names, number = np.unique(own, return_counts=True)
            value, share = names[number.argmax()], number.max() / len(own)
            if value and share >= OWN and (others == value).mean() <= OTHERS:
                told.setdefault(k, []).append(str(value))
    if told:
        where = [(f"{found.classes[k]} ({a_few(own)})",) for k, own in sorted(told.items())]
        yield Finding(
            "one-source",
            f"the images of {counted(len(told), 'class', 'classes')} share a property that other classes do not have",
            "mix sources: save all images with one size, format and depth, and collect each class in the same way; a "
            "model may learn the source instead of the content",
            "likely",
            where,
        )


def folder_of(data: str) -> Path | None:
    """The folder of data on disk; None for a file or a built-in set."""
    try:
        path = find_data(data, "", "")
    except ValueError:
        return None
    return path if path.is_dir() else None
