"""The splits that data names, or a validation split cut off if it names none."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from vitrail.data.channels import stored_channels
from vitrail.data.sets import ImageSet, Splits, split_val
from vitrail.data.targets import Target

log = logging.getLogger("vitrail")


def as_splits(
    path: Path, sets: dict[str, ImageSet], empty: Target, val_fraction: float = 0.1, group: str | None = None
) -> Splits:
    """Sets by the split that the data names, "" for none. `empty` is the target of a training split without images.

    If nothing names a split, about `val_fraction` of the images are for validation; 0 leaves them unsplit. Images of no
    named split beside named ones are for training.
    """
    channels = stored_channels(next(iter(sets.values())))
    sets = {split: replace(images, channels=channels) for split, images in sets.items()}
    whole = sets.pop("", None)
    if whole is not None and sets:
        log.warning(f"{path}: {len(whole):,} images without a named split are used for training")
        sets["train"] = whole.joined(sets["train"]) if "train" in sets else whole
    elif whole is not None and val_fraction and len(whole) > 1:
        sets["train"], sets["val"] = split_val(whole, val_fraction, group)
        log.info(
            f"{path.name} names no splits: {len(sets['val']):,} of its {len(whole):,} images, by a hash, are for "
            "validation"
        )
    elif whole is not None:
        sets["train"] = whole
    return Splits(sets.get("train", ImageSet(path.name, [], [], empty, channels)), sets.get("val"), sets.get("test"))
