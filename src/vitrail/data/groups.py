"""Groups of images that must not be split: the tiles of a slide, the images of a patient, the frames of a day.

A group is named by `--group`, which is one of
- `parent`: the name of the folder that contains the image: `slide07` for `tumour/slide07/3.png`. Images directly in a
  class folder are refused.
- the path of a CSV file with the columns image and group. Images that it lacks are refused.
- a regular expression, searched in the key (the path below the root): its first group, or else the whole match. Images
  that do not match are refused.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitrail.data.caption_files import IMAGE_COLUMNS, MARKS
from vitrail.data.names import is_file, match_keys
from vitrail.data.tables import read_table
from vitrail.errors import UserError

if TYPE_CHECKING:
    from vitrail.data.sets import ImageSet, Splits

log = logging.getLogger("vitrail")

TABLES = (".csv", ".tsv", ".txt")
COLUMNS = ("group", "groups", "group_id", "patient", "patient_id", "subject", "subject_id", "slide", "slide_id")


def groups_of(images: ImageSet, group: str) -> list[str]:
    """The group of each image. Raises UserError if an image has none."""
    if group == "parent":
        names, reason = _by_parent(images), "are directly in a class folder, not in a folder of a group"
    elif Path(group).suffix.lower() in TABLES or is_file(Path(group)):
        names, reason = _by_table(images, Path(group).expanduser()), "are not in the table, or have no group there"
    else:
        names, reason = _by_pattern(images, group), "do not match it"
    if lacking := [key for key, name in zip(images.keys, names, strict=True) if not name]:
        raise UserError(
            f"--group {group}: {len(lacking):,} of {len(images):,} images of {images.name} {reason}, as {lacking[0]}"
        )
    return names


def _by_parent(images: ImageSet) -> list[str]:
    names = []
    for key, stratum in zip(images.keys, images.target.strata().tolist(), strict=True):
        folder = PurePosixPath(key).parent.name
        names.append("" if folder == images.target.stratum(stratum) else folder)
    return names


def _by_pattern(images: ImageSet, group: str) -> list[str]:
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(
            f"--group {group}: not `parent`, not a CSV file, and not a valid regular expression: {error}"
        ) from None
    found = [pattern.search(key) for key in images.keys]
    return [(match[min(pattern.groups, 1)] or "") if match else "" for match in found]


def _by_table(images: ImageSet, file: Path) -> list[str]:
    if not is_file(file):
        raise UserError(f"--group {file}: there is no such file")
    table = read_table(file, MARKS)
    image, group = table.find(IMAGE_COLUMNS), table.find(COLUMNS)
    if image is None or group is None:
        raise UserError(
            f"{file}, line 1: the columns are {', '.join(table.columns) or 'none'}, without image and group"
        )
    rows = [(row.line, row.cells) for row in table.rows if len(row.cells) > max(image, group)]
    places = match_keys([row[image] for _, row in rows], images.keys, lambda i: f"{file}, line {rows[i][0]}")
    names = [""] * len(images)
    for place, (line, row) in zip(places, rows, strict=True):
        if place is not None:
            if names[place] not in ("", row[group]):
                both = f"in group {row[group]!r} here and in {names[place]!r} in an earlier line"
                raise UserError(f"{file}, line {line}: {images.keys[place]} is {both}")
            names[place] = row[group]
    return names


def hash_fractions(names: Sequence[str]) -> Tensor:
    """A number in [0, 1) from each group's name, float64 [N]: unchanged when images or groups are added."""
    hashes = {name: hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=6) for name in set(names)}
    numbers = {name: int.from_bytes(found.digest(), "little") / (1 << 48) for name, found in hashes.items()}
    return torch.tensor([numbers[name] for name in names], dtype=torch.float64)


def check_splits(splits: Splits, group: str) -> None:
    """Refuse a group that is in two of a set's own splits."""
    sets = {"train": splits.train, "val": splits.val, "test": splits.test}
    owner: dict[str, tuple[str, str]] = {}
    for split, images in sets.items():
        if images is None or not len(images):
            continue
        for key, name in zip(images.keys, groups_of(images, group), strict=True):
            other, first = owner.setdefault(name, (split, key))
            if other != split:
                raise UserError(
                    f"--group {group}: the group {name!r} is in the {other} split ({first}) and in the {split} split "
                    f"({key}): move it to one split, or leave --group out"
                )


def log_held_back(names: Sequence[str], chosen: Tensor) -> None:
    """Log the fraction that is held back: groups are few and differ in size, so it may be far from the one wanted."""
    held = len({names[i] for i in chosen.nonzero()[:, 0].tolist()})
    log.warning(
        f"{held:,} of {len(set(names)):,} groups are held back for validation, "
        f"{float(chosen.double().mean()):.0%} of the images"
    )


def fingerprint(splits: Splits, group: str) -> dict[str, Any]:
    """Plain data that identifies the groups: equal for equal groups."""
    sets = [images for images in (splits.train, splits.val, splits.test) if images is not None and len(images)]
    names = [name for images in sets for name in groups_of(images, group)]
    digest = hashlib.blake2b("\0".join(names).encode(errors="surrogatepass"), digest_size=16)
    return {"count": len(set(names)), "hash": digest.hexdigest()}


FILES_PER_GROUP = 3
"""files per prefix, on average, from which a prefix is taken for a group"""
COUNTER = re.compile(r"[a-z]{0,6}\d+", re.IGNORECASE)
"""the last word of a name, which numbers the images of a group: 001, x1024, tile12"""
CAMERA = re.compile(
    r"([a-z]+[-_ ]([a-z]+ )?)?(19|20)\d\d[-.]?[01]\d[-.]?[0-3]\d([-_ ]\d{6,9}|[-_ ]wa\d+| at )", re.IGNORECASE
)
"""names with date and time, as phones give them: they do not name a group"""
SYNSET = re.compile(r"n\d{8}$")


def warn_of_prefixes(images: ImageSet, chosen: Tensor) -> None:
    """Warn once if file names suggest groups, such as slides, that are on both sides of a split.

    They do if, in classes with at least half of the images, nearly all files share a few prefixes that contain a number
    (`slide07_001.png`). A prefix of a whole class does not count, nor does one from a camera.
    """
    held = chosen.tolist()
    by_class: dict[int, list[int]] = defaultdict(list)
    for i, stratum in enumerate(images.target.strata().tolist()):
        by_class[stratum].append(i)
    suspect = 0
    example: tuple[str, str] | None = None
    for members in by_class.values():
        for prefixes in _prefixes([images.keys[i] for i in members]):
            counts = Counter(prefixes)
            shared = {prefix for prefix, count in counts.items() if count > 1 and prefix}
            covered = sum(counts[prefix] for prefix in shared)
            if len(shared) < 2 or covered < 0.8 * len(members) or covered < FILES_PER_GROUP * len(shared):
                continue
            sides: dict[str, dict[bool, int]] = defaultdict(dict)
            for i, prefix in zip(members, prefixes, strict=True):
                if prefix in shared:
                    sides[prefix].setdefault(held[i], i)
            both = next((side for side in sides.values() if len(side) == 2), None)
            if both is not None:
                suspect += len(members)
                example = example or (images.keys[both[False]], images.keys[both[True]])
                break
    if example is not None and 2 * suspect >= len(images):
        log.warning(
            f"names such as {example[0]} (for training) and {example[1]} (held back) look like images of one "
            "slide, patient or day; if they are, the score is too high: give the groups with --group"
        )


def _prefixes(keys: list[str]) -> Iterator[list[str]]:
    """Prefixes of the names of a class's files: without one word at the end, without two, without three."""
    stems = [PurePosixPath(key).stem for key in keys]
    for less in (1, 2, 3):
        yield [_prefix(stem, less) for stem in stems]


def _prefix(stem: str, less: int) -> str:
    """A name without its last words if these number images and the rest may name a group; else ""."""
    pieces = re.split(r"([-_ .()]+)", stem.rstrip(")"))
    words = pieces[::2]
    if len(words) <= less or not all(COUNTER.fullmatch(word) for word in words[-less:]):
        return ""
    prefix = "".join(pieces[: -2 * less])
    if CAMERA.match(stem) or SYNSET.match(prefix):
        return ""
    return prefix if re.search(r"\d", prefix) or re.search(r"(?:[a-z]|[-_ .]|^)[A-Z]$", prefix) else ""
