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
    if [*sets] == [""] and val_fraction and len(whole := sets[""]) > 1:
        train, val = split_val(whole, val_fraction, group)
        sets = {"train": train, "val": val}
        log.info(
            f"{path.name} names no splits: {len(val):,} of its {len(whole):,} images, by a hash, are for validation"
        )
    sets = unnamed_for_training(path, sets)
    return Splits(sets.get("train", ImageSet(path.name, [], [], empty, channels)), sets.get("val"), sets.get("test"))


def unnamed_for_training(path: Path, sets: dict[str, ImageSet]) -> dict[str, ImageSet]:
    """Sets by split, in which the images of no named split, "", are for training."""
    named = {split: images for split, images in sets.items() if split}
    if (whole := sets.get("")) is None:
        return named
    if named:
        log.warning(f"{path}: {len(whole):,} images without a named split are used for training")
    return {**named, "train": whole.joined(named["train"]) if "train" in named else whole}
