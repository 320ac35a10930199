"""Sets of images with masks, in the layouts in common use."""

from __future__ import annotations

import logging
from pathlib import Path

from vitrail.data import coco, parquet
from vitrail.data.class_lists import find_class_list
from vitrail.data.kinds import role_of
from vitrail.data.mask_classes import classes_of, free_void
from vitrail.data.mask_folders import Found, find_pairs
from vitrail.data.masks import Masks
from vitrail.data.named_splits import as_splits
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.sources import Folder, find_data, found_instead, scan, warn_of_left_out
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

LAYOUTS = "a folder with images/ and masks/, possibly inside folders train and val, or COCO's JSON beside its images"


def open_masks(
    data: str | Path, val_fraction: float = 0.1, group: str | None = None, void: int | None = None
) -> Splits:
    """The images with masks at a path, or in a folder of that name below `$VITRAIL_DATA`.

    A path is a folder with a folder of images beside one of masks (`images/` and `masks/`, and other usual names), with
    or without folders for the splits around or in them; masks beside their images (`1_mask.png`); COCO's instance or
    panoptic JSON, a file or a folder with such files. `void` is the number of pixels without a class, by default 255,
    unless the masks hold only 0 and 255. If nothing names a split, about `val_fraction` of the images are used for
    validation, by a hash of the image or of its `group`; 0 leaves the set unsplit.
    """
    number = 255 if void is None else void
    path = find_data(data, "images with masks", LAYOUTS)
    if path.is_file() and path.suffix.lower() != ".json":
        raise UserError(f"{path} holds no masks that vitrail can read: give {LAYOUTS}")
    file = path.is_file()
    annotations = file and role_of(path.parent.name) == "targets"  # the images are beside the folder, as COCO has it
    root = scan(path.parent.parent if annotations else path.parent if file else path)
    if files := [path] if file else coco.find_files(root):
        classes, splits = coco.read(root, files, number)
        if void is not None:
            log.warning(f"{path}: --void {void} has no effect: it is for masks of numbers, and COCO's JSON has none")
        sets = {split: _from_coco(root.path, found, classes, number) for split, found in splits.items()}
    elif (found := find_pairs(path, root)) is not None:
        classes, sets = _from_pairs(path, found, number, void is not None)
    else:
        _refuse(path, root)
    warn_of_left_out(root)
    return as_splits(path, sets, Masks([], [], classes, free_void(number, len(classes))), val_fraction, group)


def _from_pairs(path: Path, found: Found, void: int, chosen: bool) -> tuple[list[str], dict[str, ImageSet]]:
    training = found.splits.get("train") or found.splits.get("") or [p for own in found.splits.values() for p in own]
    masks = [pair.mask for pair in training if pair.mask is not None]
    classes, coding = classes_of(path, find_class_list(found.lists), masks, void, chosen)
    sets = {}
    for split, pairs in found.splits.items():
        keys = [_below(path, pair.image) for pair in pairs]
        names = [_below(path, pair.mask or pair.image) for pair in pairs]
        target = Masks([pair.mask for pair in pairs], names, classes, free_void(void, len(classes)), coding)
        sets[split] = ImageSet(path.name, keys, [pair.image for pair in pairs], target)
    return classes, sets


def _from_coco(root: Path, found: list[coco.Annotated], classes: list[str], void: int) -> ImageSet:
    keys = [_below(root, each.image) for each in found]
    target = Masks([each.mask for each in found], keys, classes, free_void(void, len(classes)))
    return ImageSet(root.name, keys, [each.image for each in found], target)


def _below(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _refuse(path: Path, root: Folder) -> None:
    """Refuse a folder without masks; the error says what it holds instead."""
    coco.refuse_boxes(root)
    if parquet.files(path):
        raise UserError(f"{path} holds Parquet files, from which vitrail reads no masks: give {LAYOUTS}")
    if not root.holds_images():
        raise UserError(f"{path} holds no images{found_instead(root)}: give {LAYOUTS}")
    raise UserError(
        f"{path} holds {len(root.all_images()):,} images but no masks of them: give {LAYOUTS}; if it has one folder "
        f"per class, train a classifier with `vitrail train finetune --data {path}`"
    )
