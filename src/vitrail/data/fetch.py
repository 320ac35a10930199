"""What a worker does: open images, crop or fit them to one size, read targets, and say which were bad.

The rest is done on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.data.augment import CROP, CROP_DRAWS, Augment, crop_boxes
from vitrail.data.decode import BadImage, Box, EncodedImage, Preprocess, resize
from vitrail.data.memory import Kept, size_of
from vitrail.data.random import uniform
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Target

if TYPE_CHECKING:
    from vitrail.data.affine import Affine

Size = tuple[int, int]


class Want(NamedTuple):
    """An image of a batch: its number in the set, the epoch, and the number that its draws depend on."""

    sample: int
    epoch: int
    draw: int


@dataclass
class Fetched:
    """A batch before augmentation."""

    images: Tensor
    """uint8 [B, C, h, w]"""
    samples: Tensor
    """int64 [B]"""
    draws: Tensor
    """int64 [B]"""
    values: list[Any]
    """what the target read of each sample, warped"""
    affine: Affine | None
    """of the images, where the target is spatial"""
    bad: dict[int, str]
    """what was wrong, by number in the set"""


class Opened(NamedTuple):
    """An image before its pixels are read, the `Want` it stands for, and its size where that is needed."""

    image: EncodedImage | Tensor
    want: Want
    size: Size


class Fetch(Dataset[Fetched]):
    """Batches of a set by their `Want`s. In training a bad image gives its place to the next good one."""

    def __init__(
        self,
        images: ImageSet,
        target: Target,
        preprocess: Preprocess,
        seed: int,
        augment: Augment | None,
        kept: Kept | None = None,
    ) -> None:
        """`augment` is None in evaluation. `kept` holds the images where they are in memory: only these are used."""
        self.set, self.target = images, target
        self.preprocess = preprocess
        self.seed = seed
        self.augment = augment
        self.scale = augment.scale if augment is not None and augment.crop == "resized" else None
        self.kept = kept

    def __getitem__(self, index: int) -> Fetched:
        return self.__getitems__([Want(index, 0, index)])

    def __getitems__(self, wants: list[Want]) -> Fetched:
        bad: dict[int, str] = {}
        opened = [found for want in wants if (found := self._open(want, bad)) is not None]
        boxes = self._boxes(opened)
        made = [self._make(found, box, bad) for found, box in zip(opened, boxes, strict=True)]
        good = [each for each in made if each is not None]
        empty = torch.empty(0, self.preprocess.channels, *self.preprocess.size, dtype=torch.uint8)
        used = [want for want, _, _, _ in good]
        return Fetched(
            torch.stack([image for _, image, _, _ in good]) if good else empty,
            torch.tensor([want.sample for want in used], dtype=torch.int64),
            torch.tensor([want.draw for want in used], dtype=torch.int64),
            [value for _, _, value, _ in good],
            joined([affine for _, _, _, affine in good if affine is not None]),
            bad,
        )

    def _open(self, want: Want, bad: dict[int, str]) -> Opened | None:
        """An image, or the next good one in training. None for a bad one in evaluation, or where all are bad."""
        for _ in range(len(self.set)):
            if want.sample in bad:  # this batch has met it already
                want = self._next(want)
                continue
            try:
                image = self.kept.images[want.sample] if self.kept is not None else self.set.open(want.sample)
                needed = self.scale is not None or self.target.spatial
                return Opened(image, want, size_of(image, self.preprocess) if needed else (0, 0))
            except BadImage as error:
                bad[want.sample] = str(error)
                if self.augment is None:
                    return None
                want = self._next(want)
        return None

    def _make(
        self, opened: Opened, box: Box | None, bad: dict[int, str]
    ) -> tuple[Want, Tensor, Any, Affine | None] | None:
        for _ in range(len(self.set)):
            try:
                return opened.want, self._pixels(opened.image, box), *self._value(opened.want, opened.size)
            except BadImage as error:
                bad[opened.want.sample] = str(error)
            if self.augment is None:
                return None
            found = self._open(self._next(opened.want), bad)
            if found is None:
                break
            opened, (box,) = found, self._boxes([found])
        return None

    def _next(self, want: Want) -> Want:
        sample = (want.sample + 1) % len(self.set)
        return Want(sample, want.epoch, sample)

    def _boxes(self, opened: list[Opened]) -> list[Box] | list[None]:
        if self.scale is None or not opened:
            return [None] * len(opened)
        draws = torch.tensor([each.want.draw for each in opened])
        numbers = uniform(self.seed, opened[0].want.epoch, draws, CROP_DRAWS, CROP)
        heights, widths = torch.tensor([each.size for each in opened]).unbind(1)
        boxes = crop_boxes(numbers, heights, widths, self.scale, self.preprocess.size).tolist()
        return [(top, left, height, width) for top, left, height, width in boxes]

    def _pixels(self, image: EncodedImage | Tensor, box: Box | None) -> Tensor:
        p = self.preprocess
        if box is None:
            return p.prepare(image)
        if isinstance(image, EncodedImage):
            return image.crop(box, p.size, p.channels, p.interpolation)
        top, left, height, width = box
        return resize(image[:, top : top + height, left : left + width], p.size, p.interpolation)

    def _value(self, want: Want, size: Size) -> tuple[Any, Affine | None]:
        """What the target has for an image of that size, and the affine of the image where the target is spatial."""
        value = self.kept.values[want.sample] if self.kept is not None else self.target.read(want.sample)
        if not self.target.spatial:
            return value, None
        source = self.kept.sources[want.sample] if self.kept is not None else size
        affine = affine_of([want], [source], [size], self.preprocess, self.seed, self.augment)
        return self.target.warp(value, affine), affine


def affine_of(
    wants: list[Want], sources: list[Size], kept: list[Size], preprocess: Preprocess, seed: int, augment: Augment | None
) -> Affine:
    """From the originals of some images of an epoch, of the sizes `sources`, to the model's input.

    `kept` are the sizes at which they are kept in memory, or those of the originals. `augment` is None in evaluation.
    """
    from vitrail.data.augment import training_affine

    sizes = torch.tensor(sources)
    if augment is None:
        return preprocess.affine(sizes)
    draws = torch.tensor([want.draw for want in wants])
    return training_affine(augment, preprocess, seed, wants[0].epoch, draws, sizes, torch.tensor(kept))


def joined(affines: list[Affine]) -> Affine | None:
    """The affines of a batch as one; None where there is none."""
    if not affines:
        return None
    from vitrail.data.affine import Affine

    return Affine.join(affines)
