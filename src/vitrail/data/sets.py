"""Sets of images with their targets, and how to open and split them."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.data import builtin, hub_sets, parquet, shards
from vitrail.data import groups as grouping
from vitrail.data.channels import stored_channels
from vitrail.data.content import BITS, Item, content_hash
from vitrail.data.decode import BadImage, EncodedImage
from vitrail.data.folders import read_class_folders
from vitrail.data.pixels import to_bytes, with_channels
from vitrail.data.sources import images_in, named_files, refuse_empty
from vitrail.data.streaming import Streamed
from vitrail.data.targets import Labels, Target
from vitrail.errors import UserError
from vitrail.files import reading

log = logging.getLogger("vitrail")


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images and their targets. A set is never changed after it is created."""

    name: str
    keys: list[str]
    """identifies each image: its path below the root, or its name or number in a file"""
    items: Sequence[Item] | Tensor
    """files, encoded bytes, files in tar files, or uint8 tensors [C, H, W]; it may be one tensor"""
    target: Target
    """labels, captions or another column (see `vitrail.data.targets`), one entry per image"""
    channels: int = 3
    """channels as stored; `image` can convert"""
    bad_rows: tuple[str, ...] = ()
    """why rows of the set's table are left out: they count as bad images; a subset has none"""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def labels(self) -> Tensor:
        """Class numbers, int64 [N]; zeros if the target has no classes."""
        return self.target.strata()

    @property
    def classes(self) -> list[str]:
        """Names of the classes; [] if the target has none."""
        return self.target.classes

    def read(self, i: int) -> Item:
        """An image as stored in `items`."""
        return self.items[i]

    def image(self, i: int, channels: int | None = None) -> Tensor:
        """uint8 [channels, H, W]. Raises BadImage with the key."""
        opened = self.open(i)
        if isinstance(opened, EncodedImage):
            return opened.pixels(channels or self.channels)
        try:
            return with_channels(to_bytes(opened), channels or self.channels)
        except ValueError as error:
            raise BadImage(f"{self.keys[i]}: {error}") from None

    def open(self, i: int) -> EncodedImage | Tensor:
        """An image with only its header read, if it is encoded."""
        item = self.read(i)
        return item if isinstance(item, Tensor) else EncodedImage(item, self.keys[i])

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        places = torch.as_tensor(indices, dtype=torch.int64)
        if isinstance(self.items, Tensor):
            items: Sequence[Item] | Tensor = self.items[places]
        elif isinstance(self.items, Streamed):
            items = self.items.at(places)
        else:
            items = Chosen(self.items, places.tolist())
        keys = [self.keys[i] for i in places.tolist()]
        return replace(self, keys=keys, items=items, target=self.target.subset(places), bad_rows=())

    def joined(self, other: ImageSet) -> ImageSet:
        """These images, then those of another set, whose target has the same type and classes."""
        items = [images.read(i) for images in (self, other) for i in range(len(images))]
        target, bad = self.target.joined(other.target), self.bad_rows + other.bad_rows
        return replace(self, keys=self.keys + other.keys, items=items, target=target, bad_rows=bad)

    @property
    def streamed(self) -> Streamed | None:
        """The images, if they are read from the Hub: then their order decides how much must be read."""
        return self.items if isinstance(self.items, Streamed) else None

    def spread(self, count: int | None) -> ImageSet:
        """At most `count` images, evenly spaced, so that most classes are included; None for all."""
        if count is None or count >= len(self):
            return self
        if self.streamed is not None:
            return self.subset(self.streamed.sample(count))
        return self.subset(torch.linspace(0, len(self) - 1, count).round().long())

    def shuffled(self, seed: int = 0) -> ImageSet:
        """A control experiment: each image gets the target of another one, by a permutation drawn with `seed`."""
        if len(self) < 2:
            raise UserError(f"{self.name} has only one image: its target cannot be exchanged with another")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        places = torch.empty_like(order)
        places[order] = order.roll(1)  # a single cycle, so no image keeps its target
        return replace(self, target=self.target.subset(places))


class Chosen(Sequence[Item]):
    """The items at some places of a sequence, without reading them."""

    def __init__(self, items: Sequence[Item], places: list[int]) -> None:
        self.items, self.places = items, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Item:  # type: ignore[override]
        return self.items[self.places[i]]


@dataclass
class Splits:
    """The splits of a set. If it has evaluation splits only, `train` is empty."""

    train: ImageSet
    val: ImageSet | None = None
    test: ImageSet | None = None
    beside: Sequence[str] = field(default=(), init=False)
    """folders of images beside the splits that belong to none"""

    def fingerprint(self, group: str | None = None) -> dict[str, Any]:
        """Plain data that identifies the set: names, targets, counts, groups. The images are not read."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        identity: dict[str, Any] = {
            "classes": self.train.classes,
            "splits": {split: {"images": len(own), "hash": hash_of(own)} for split, own in splits.items() if own},
        }
        return identity if group is None else {**identity, "groups": grouping.fingerprint(self, group)}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference between two fingerprints of a set, in words; None if they are equal."""
    if before["classes"] != now["classes"]:
        had, has = set(before["classes"]), set(now["classes"])
        named = {"missing": sorted(had - has), "new": sorted(has - had)}
        changed = ", ".join(f"{names[0]} is {how}" for how, names in named.items() if names) or "in another order"
        return f"it had {len(had)} classes and has {len(has)}: {changed}"
    for name in {**before["splits"], **now["splits"]}:
        had, has = (identity["splits"].get(name, {"images": 0}) for identity in (before, now))
        if had["images"] != has["images"]:
            return f"its {name} split had {had['images']:,} images and has {has['images']:,}"
        if had != has:
            return f"images of its {name} split have other names, labels or captions"
    if before.get("groups") != now.get("groups"):
        return "its images are in other groups"
    return None


def hash_of(images: ImageSet) -> str:
    """A hash of the keys and the target."""
    digest = hashlib.blake2b(digest_size=16)
    # File names need not be valid Unicode.
    digest.update("\0".join(images.keys).encode(errors="surrogatepass"))
    digest.update(images.target.fingerprint())
    return digest.hexdigest()


def open_data(data: str | Path, name: str | None = None, grouped: bool = False) -> Splits:
    """The set at a path, or a built-in one by name; a path that exists wins over a name.

    A path is a folder with one folder per class, possibly inside folders `train`, `val` and `test`; a table of images
    and labels, or a folder with one (see `vitrail.data.labelled`); Parquet in the Hub's layout, a file or a folder; tar
    files in WebDataset's layout (see `vitrail.data.shards`); or files in torchvision's layout. It may also be a folder
    that contains one of these as `name`, the built-in set that the caller expects. Built-in sets are searched in
    `$VITRAIL_DATA` first and downloaded to `~/.cache/vitrail` if they are not there; other data in `$VITRAIL_DATA` can
    be opened by name too. `hf://datasets/...` is a set on the Hub (see `vitrail.data.hub_sets`).
    With `grouped`, the class folders may contain folders that are groups (see `vitrail.data.groups`).
    """
    refuse_empty(data)
    if hub_sets.is_address(data):
        return _from_hub(hub_sets.read(str(data), grouped))
    path = Path(data).expanduser()
    with reading(path):
        there = path.exists()
        if there and name in builtin.NAMES and _may_be_a_set(path / name):
            path = path / name
    if there:
        splits = _open_path(path, grouped)
    elif str(data) in builtin.NAMES:
        splits = _open_builtin(str(data))
    elif (root := os.environ.get("VITRAIL_DATA")) and (Path(root) / path).exists():
        splits = _open_path(Path(root) / path, grouped)
    else:
        near = difflib.get_close_matches(str(data), builtin.NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"built-in sets are {', '.join(builtin.NAMES)}"
        raise UserError(f"no data at {data}, and no built-in set of that name: {hint}")
    return splits


def _may_be_a_set(folder: Path) -> bool:
    """Whether a folder exists and is not a class: a class contains images, a set contains folders or other files."""
    return folder.is_dir() and not images_in(folder)


def _open_builtin(name: str) -> Splits:
    if name == "digits":
        return _from_arrays(name, builtin.digits())
    if root := os.environ.get("VITRAIL_DATA"):
        if (Path(root) / name).is_dir():
            return _open_path(Path(root) / name)
        if (found := builtin.find(Path(root), name)) is not None:
            return _from_arrays(name, found)
    return _from_arrays(name, builtin.download(name))


def _open_path(path: Path, grouped: bool = False) -> Splits:
    from vitrail.data.table_sets import open_class_table  # which makes sets

    if parquet.files(path):
        return _from_parquet(path)
    if tars := shards.files(path):
        return _from_tables(path, shards.read(path, tars))
    if (labelled := open_class_table(path)) is not None:
        return labelled
    if path.is_file():
        raise UserError(f"{path} is a file: give a folder with one folder per class, a CSV, a Parquet or a tar file")
    with reading(path):
        if (found := builtin.find(path)) is not None:
            return _from_arrays(path.name, found)
        return _from_folder(path, grouped)


def _from_arrays(name: str, arrays: builtin.Arrays) -> Splits:
    sets = {}
    for split, (images, labels) in arrays.splits.items():
        keys = [f"{name}/{split}/{i}" for i in range(len(labels))]
        sets[split] = ImageSet(name, keys, images, Labels(labels, arrays.classes), images.shape[1])
    return Splits(**sets)


def _from_parquet(path: Path) -> Splits:
    by_split = named_files(parquet.files(path))
    return _from_tables(path, {split: parquet.read(files) for split, files in by_split.items()})


def _from_hub(found: hub_sets.HubData) -> Splits:
    splits = _from_tables(str(found.address), found.tables, found.address.name)
    log.warning(found.line(len(splits.train.classes)))
    return splits


def _from_tables(path: Path | str, tables: dict[str, parquet.Table], name: str | None = None) -> Splits:
    """The splits of tables with a label per image: a number or a name. `name` is that of the set, if not the path's."""
    tables = {split: table for split, table in tables.items() if table.labels}
    names = next((table.names for table in tables.values() if table.names is not None), None)
    classes = names or sorted({str(label) for table in tables.values() for label in table.labels}, key=natural)
    number = {name: i for i, name in enumerate(classes)}
    sets = {}
    for split, table in tables.items():
        try:
            numbers = [label if names else number[str(label)] for label in table.labels]
        except KeyError:
            raise UserError(f"{path}: the {split} split has labels that the others do not name") from None
        labels = torch.tensor(numbers, dtype=torch.int64)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise UserError(f"{path}: a label of the {split} split is not among its {len(classes)} classes")
        sets[split] = ImageSet(name or Path(path).stem, table.keys, table.images, Labels(labels, classes))
    return finish(path, classes, sets)


def natural(text: str) -> tuple[bool, float, str]:
    """A key by which 2 comes before 10, and numbers before words."""
    return (not text.isdecimal(), int(text) if text.isdecimal() else 0, text)


def _from_folder(path: Path, grouped: bool) -> Splits:
    folders = read_class_folders(path, grouped)
    classes = sorted({name for members in folders.splits.values() for name in members})
    number = {name: i for i, name in enumerate(classes)}
    sets = {}
    for split, members in folders.splits.items():
        files = [file for name in sorted(members) for file in members[name]]
        labels = torch.tensor([number[name] for name in sorted(members) for _ in members[name]], dtype=torch.int64)
        keys = [file.relative_to(path).as_posix() for file in files]
        sets[split] = ImageSet(path.name, keys, files, Labels(labels, classes))
    splits = finish(path, classes, sets)
    if not len(splits.train):
        splits.beside = folders.beside
    return splits


def finish(path: Path | str, classes: list[str], sets: dict[str, ImageSet]) -> Splits:
    """The sets of one class per image as splits. Refuses sets that no classifier can learn or be scored on."""
    if not any(len(images) for images in sets.values()):
        raise UserError(f"{path} holds no images")
    if "train" in sets:
        _refuse_untrained(path, classes, sets)
    if len(classes) < 2:
        raise UserError(f"{path} holds one class ({classes[0]}): a classifier needs at least two")
    channels = stored_channels(next(images for images in sets.values() if len(images)))
    sets.setdefault("train", ImageSet(Path(path).name, [], [], Labels(torch.zeros(0, dtype=torch.int64), classes)))
    return Splits(**{split: replace(images, channels=channels) for split, images in sets.items()})


def _refuse_untrained(path: Path | str, classes: list[str], sets: dict[str, ImageSet]) -> None:
    """Refuse classes with images to evaluate but none to train on."""
    trained = torch.bincount(sets["train"].labels, minlength=len(classes)) > 0
    for split, images in sets.items():
        lacking = (torch.bincount(images.labels, minlength=len(classes)) > 0) & ~trained
        if lacking.any():
            name = classes[int(lacking.nonzero()[0])]
            raise UserError(f"the {split} split of {path} has a class that the training split lacks: {name}")


SMALL = 3
"""the fewest different images of a class from which some are held back"""


def split_val(images: ImageSet, fraction: float = 0.1, group: str | None = None) -> tuple[ImageSet, ImageSet]:
    """Split a training set into training and validation, with about `fraction` of the images for validation.

    A hash of an image's content alone decides its side: it does not change when other images are added or files are
    renamed, and copies of an image are on the same side. With `group` (see `vitrail.data.groups`), a hash of the
    group's name decides. Each class keeps at least one image, or group, for training; classes too small to split are
    logged and keep all. Raises UserError if nothing can be held back.
    """
    if len(images) < 2:
        raise UserError(
            f"{images.name} has {len(images)} images to train on: a validation split needs one of at least two"
        )
    if (streamed := images.streamed) is not None:
        places, units, how = streamed.sides()
        log.warning(f"{images.name} has no validation split: {fraction:.0%} is held back, {how}")
    else:
        hashes = [content_hash(images.read(i)) for i in range(len(images))]
        places = units = torch.tensor(hashes, dtype=torch.float64) / (1 << BITS)
    names = None if group is None else grouping.groups_of(images, group)
    if names is not None and len(set(names)) == 1:
        raise UserError(f"--group {group}: all {len(images):,} images of {images.name} are in one group, {names[0]!r}")
    units = units if names is None else grouping.hash_fractions(names)
    chosen, small = _choose(images, places, units, fraction)
    if small:
        what = f"{'one group, or ' if names else ''}fewer than {SMALL} different images"
        named = ", ".join(small[:5]) + (f" and {len(small) - 5:,} others" if len(small) > 5 else "")
        log.warning(f"too small to hold images back for validation ({what}), so all train: {named}")
    if names is None and streamed is None:
        grouping.warn_of_prefixes(images, chosen)
    elif names is not None:
        grouping.log_held_back(names, chosen)
    return images.subset((~chosen).nonzero()[:, 0]), images.subset(chosen.nonzero()[:, 0])


def _choose(images: ImageSet, places: Tensor, units: Tensor, fraction: float) -> tuple[Tensor, list[str]]:
    """Which images are held back, bool [N], and the names of the strata (classes) that are too small to split.

    `places` [N] are the hashes of the images, `units` [N] the hashes that decide their side.
    """
    strata = images.target.strata()
    count = int(strata.max()) + 1
    images_of, units_of = _count_distinct(strata, places, count), _count_distinct(strata, units, count)
    splittable = (units_of > 1) & (images_of >= SMALL)
    if not splittable.any():  # a tiny set: split what has two images
        splittable = units_of > 1
    # Units are never divided: what a class must keep stays in training for other classes too.
    kept = torch.isin(units, units[~splittable[strata]])
    last = torch.zeros(count, dtype=torch.float64).scatter_reduce(0, strata, units, "amax", include_self=False)
    bare = (last < fraction) & (torch.bincount(strata, kept.double(), count) == 0)
    free = ~kept & ~torch.isin(units, last[bare])
    if not free.any():
        raise UserError(
            f"{images.name} has no image or group to hold back for validation if each class keeps one for "
            "training: add images, or a folder val"
        )
    chosen = free & (units < fraction)
    if not chosen.any():
        chosen = units == units[free].min()
    sizes = torch.bincount(strata, minlength=count)
    small = (~splittable & (sizes > 0)).nonzero()[:, 0].tolist()
    return chosen, [f"{name} ({int(sizes[i])})" for i in small if (name := images.target.stratum(i))]


def _count_distinct(strata: Tensor, places: Tensor, count: int) -> Tensor:
    """The number of different places in each stratum, int64 [count]."""
    values, inverse = places.unique(return_inverse=True)
    pairs = (strata * len(values) + inverse).unique()
    return torch.bincount(pairs // len(values), minlength=count)
