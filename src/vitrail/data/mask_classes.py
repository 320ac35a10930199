"""The classes of a set of masks: by its class list, or by the numbers that its masks hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitrail.data.class_lists import ClassList, means_void
from vitrail.data.decode import BadImage
from vitrail.data.mask_files import VOID, Coding, read_mask
from vitrail.errors import UserError
from vitrail.process import cores

log = logging.getLogger("vitrail")

TWO = ("background", "foreground")
"""the classes of masks that hold two numbers, if nothing names them"""
MAX_CLASSES = 250
"""largest number of classes without a list: grey images, which are no class numbers, have as many levels"""


@dataclass
class Seen:
    """The numbers that the masks of a set hold."""

    numbers: set[int]
    masks: int
    """how many were read"""
    failed: str = ""
    """why the first of the others was not"""


def classes_of(
    path: Path, listed: ClassList | None, masks: Sequence[Path], void: int, chosen: bool = False
) -> tuple[list[str], Coding]:
    """The names of the classes, and how the masks code them.

    Classes of a list whose name means void are void, and later classes move up. `masks` are those of the training
    split; they are read if no list names more than two classes. With `chosen`, the caller named the void number, and
    255 in masks of 0 and 255 is void if it is that. Raises UserError if `void` is the number of a class.
    """
    if listed is None:
        classes, coding = _from_numbers(path, _scan(path, masks, False), void, chosen)
    else:
        classes, coding = _from_list(listed, void)
        if len(classes) <= 2:
            seen = _scan(path, masks, bool(listed.colours))
            classes, coding = _of_two(listed, classes, coding, seen, void)
    if len(classes) < 2:
        named = f"the class {classes[0]} only" if classes else "no class"
        raise UserError(f"{path}: the masks have {named} (void is {void}): segmentation needs at least two")
    return classes, coding


def refuse_void(void: int, classes: Sequence[str], where: str) -> None:
    """Refuse a void number that is that of a class, unless its name means void."""
    if 0 <= void < len(classes) and not means_void(classes[void]):
        raise UserError(
            f"--void {void} is the number of the class {classes[void]} in {where}: all its pixels would be void; "
            f"choose a number of no class, such as {free_void(void, len(classes))}"
        )


def free_void(void: int, classes: int) -> int:
    """The number for void in batches: `void`, or one above all class numbers if it is the number of a class."""
    return void if not 0 <= void < classes else 255 if classes <= 255 else (1 << 16) - 1


def _from_list(listed: ClassList, void: int) -> tuple[list[str], Coding]:
    refuse_void(void, listed.names, str(listed.file))
    classes: list[str] = []
    numbers = {void: VOID}
    for i, name in enumerate(listed.names):
        numbers[i] = VOID if means_void(name) else len(classes)
        if not means_void(name):
            classes.append(name)
    if dropped := [name for name in listed.names if means_void(name)]:
        log.warning(f"{listed.file}: {', '.join(dropped)} is void and not one of the {len(classes)} classes")
    return classes, Coding(numbers, {colour: numbers[i] for i, colour in enumerate(listed.colours)})


def _of_two(listed: ClassList, classes: list[str], coding: Coding, seen: Seen, void: int) -> tuple[list[str], Coding]:
    """Masks of one or two listed classes may hold 0 and 255, or 0 and 1."""
    scaled = 255 in seen.numbers and seen.numbers <= {0, 255}
    if scaled and len(classes) < len(listed.names):
        raise UserError(
            f"{listed.file} lists {len(listed.names)} names, one of them void, but the masks hold only 0 and 255: list "
            "the names of these two"
        )
    counted = 1 in seen.numbers and seen.numbers - {void} <= {0, 1} and len(classes) == len(listed.names) == 1
    if not scaled and not counted:
        return classes, coding
    if len(classes) == 1:
        classes = [TWO[0], classes[0] if classes[0] != TWO[0] else TWO[1]]
    return classes, Coding({void: VOID, 0: 0, 255 if scaled else 1: 1}, coding.colours)


def _from_numbers(path: Path, seen: Seen, void: int, chosen: bool) -> tuple[list[str], Coding]:
    """Classes that are called by their numbers."""
    if not seen.masks:
        raise UserError(f"{path}: no mask can be read, the first because {seen.failed}" if seen.failed else "no masks")
    read = f"read from {seen.masks:,} mask{'s' * (seen.masks > 1)}"
    if 255 in seen.numbers and seen.numbers <= {0, 255} and void != 0 and not (chosen and void == 255):
        log.warning(f"{path}: the masks hold only 0 and 255, {read}: they are {TWO[0]} and {TWO[1]}")
        return [*TWO], Coding({0: 0, 255: 1})
    numbers = sorted(seen.numbers - {void})
    most = numbers[-1] if numbers else -1
    if most >= MAX_CLASSES:
        raise UserError(
            f"{path}: the masks hold numbers up to {most:,}, {read}, so they look like grey or depth images and not "
            "like classes: name the classes in classes.txt, one per line in the order of their numbers"
        )
    names = [i for i in range(most + 1) if i != void]
    log.warning(
        f"{path}: no class list, so the classes are the numbers {names[0] if names else 0} to {most}, of which "
        f"{len(numbers)} occur, {read}; classes.txt can name them, one per line"
    )
    return [str(i) for i in names], Coding({void: VOID, **{i: k for k, i in enumerate(names)}})


def _scan(path: Path, masks: Sequence[Path], coloured: bool) -> Seen:
    """The numbers in some masks; colour masks have none."""

    def numbers(mask: Path) -> set[int] | str:
        try:
            values = read_mask(mask, str(mask), coloured).values
        except BadImage as error:
            return str(error)
        if values.ndim == 3:
            return set()
        if values.dtype == np.uint8:
            seen = np.zeros(256, dtype=bool)
            seen[values] = True
            return {*np.flatnonzero(seen).tolist()}
        return {*np.unique(values).tolist()}

    with ThreadPoolExecutor(cores()) as pool:
        results = [*pool.map(numbers, masks)]
    found = [result for result in results if isinstance(result, set)]
    failed = next((result for result in results if isinstance(result, str)), "")
    return Seen({number for each in found for number in each}, len(found), failed)
