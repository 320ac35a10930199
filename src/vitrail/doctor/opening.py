"""Open data of any kind. What cannot be opened is still looked at, image by image."""

from __future__ import annotations

from pathlib import Path

import torch

from vitrail.data import sources
from vitrail.data.kinds import CAPTIONS, MASKS, OtherKind
from vitrail.data.masks import Masks
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Labels, Target, Texts
from vitrail.doctor.finding import Finding
from vitrail.errors import UserError
from vitrail.tasks import TASKS, task_class

OF_KIND: dict[str, type[Target]] = {CAPTIONS: Texts, MASKS: Masks}
"""the target whose refusal tells what is wrong with data that looks like this kind"""


def open_any(data: str) -> tuple[Splits, list[Finding]]:
    """The splits of data with any target that a task learns, and a finding if no task can open it.

    Raises UserError if there is nothing at the path, or no image in it.
    """
    kinds: dict[type[Target], None] = {task_class(name).target: None for name in TASKS}
    refusals: dict[type[Target], UserError] = {}
    for kind in kinds:
        try:
            return kind.open(data, val_fraction=0), []
        except UserError as error:
            refusals[kind] = error
    refusal = next(iter(refusals.values()))
    if isinstance(refusal, OtherKind):
        refusal = refusals.get(OF_KIND.get(refusal.kind, Labels), refusal)
    path = Path(data).expanduser()
    images = sources.scan(path).all_images() if path.is_dir() else []
    if not images:
        raise refusal
    keys = [image.relative_to(path).as_posix() for image in images]
    nothing = Labels(torch.zeros(len(images), dtype=torch.int64), [])
    finding = Finding(
        "not-a-data-set",
        str(refusal),
        "arrange the images as docs/data.md shows; the checks of single images follow",
        "certain",
        [(str(path),)],
    )
    return Splits(ImageSet(path.name, keys, images, nothing)), [finding]
