"""What a worker does: open images, crop or fit them to one size, and say which were bad. The rest is the device's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.data.augment import CROP, CROP_DRAWS, Augment, crop_boxes
from vitrail.data.decode import BadImage, Box, EncodedImage, Preprocess, resize
from vitrail.data.random import uniform
from vitrail.data.sets import ImageSet

KEPT = 2
"""An image kept in memory for random crops has up to this many times the crop's size."""


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
    bad: dict[int, str]
    """what was wrong, by number in the set"""


class Fetch(Dataset[Fetched]):
    """Batches of a set by their `Want`s. In training a bad image gives its place to the next good one."""

    def __init__(
        self,
        part: ImageSet,
        preprocess: Preprocess,
        seed: int,
        augment: Augment | None,
        train: bool,
        kept: dict[int, Tensor] | None = None,
    ) -> None:
        self.part = part
        self.preprocess = preprocess
        self.seed = seed
        self.scale = augment.scale if train and augment is not None and augment.crop == "resized" else None
        self.train = train
        self.kept = kept
        """images decoded beforehand, by number in the set: only these are used"""

    def __getitem__(self, index: int) -> Fetched:
        return self.__getitems__([Want(index, 0, index)])

    def __getitems__(self, wants: list[Want]) -> Fetched:
        bad: dict[int, str] = {}
        opened: list[tuple[EncodedImage | Tensor, Want, tuple[int, int]]] = []
        for want in wants:
            found = self._open(want, bad)
            if found is not None:
                opened.append(found)
        boxes = self._boxes([want for _, want, _ in opened], [size for _, _, size in opened])
        images, used = [], []
        for (image, want, _), box in zip(opened, boxes, strict=True):
            made = self._make(image, want, box, bad)
            if made is not None:
                images.append(made[0])
                used.append(made[1])
        empty = torch.empty(0, self.preprocess.channels, *self.preprocess.size, dtype=torch.uint8)
        return Fetched(
            torch.stack(images) if images else empty,
            torch.tensor([want.sample for want in used], dtype=torch.int64),
            torch.tensor([want.draw for want in used], dtype=torch.int64),
            bad,
        )

    def _open(self, want: Want, bad: dict[int, str]) -> tuple[EncodedImage | Tensor, Want, tuple[int, int]] | None:
        """An image, the `Want` it stands for, and its size. None for a bad one in evaluation, or where all are bad."""
        for _ in range(len(self.part)):
            if want.sample in bad:  # this batch has met it already
                want = self._next(want)
                continue
            try:
                image = self.kept[want.sample] if self.kept is not None else self.part.open(want.sample)
                if self.scale is None:
                    return image, want, (0, 0)
                if isinstance(image, Tensor):
                    return image, want, (image.shape[-2], image.shape[-1])
                return image, want, image.measure(self.preprocess.channels)
            except BadImage as error:
                bad[want.sample] = str(error)
                if not self.train:
                    return None
                want = self._next(want)
        return None

    def _make(
        self, image: EncodedImage | Tensor, want: Want, box: Box | None, bad: dict[int, str]
    ) -> tuple[Tensor, Want] | None:
        for _ in range(len(self.part)):
            try:
                return self._pixels(image, box), want
            except BadImage as error:
                bad[want.sample] = str(error)
            if not self.train:
                return None
            found = self._open(self._next(want), bad)
            if found is None:
                break
            image, want, size = found
            box = self._boxes([want], [size])[0]
        return None

    def _next(self, want: Want) -> Want:
        sample = (want.sample + 1) % len(self.part)
        return Want(sample, want.epoch, sample)

    def _boxes(self, wants: list[Want], sizes: list[tuple[int, int]]) -> list[Box] | list[None]:
        if self.scale is None or not wants:
            return [None] * len(wants)
        draws = uniform(self.seed, wants[0].epoch, torch.tensor([want.draw for want in wants]), CROP_DRAWS, CROP)
        heights, widths = torch.tensor(sizes).unbind(1)
        boxes = crop_boxes(draws, heights, widths, self.scale, self.preprocess.size).tolist()
        return [(top, left, height, width) for top, left, height, width in boxes]

    def _pixels(self, image: EncodedImage | Tensor, box: Box | None) -> Tensor:
        p = self.preprocess
        if box is None:
            return p.prepare(image)
        if isinstance(image, EncodedImage):
            return image.crop(box, p.size, p.channels, p.interpolation)
        top, left, height, width = box
        return resize(image[:, top : top + height, left : left + width], p.size, p.interpolation)


def shrink(image: Tensor, preprocess: Preprocess) -> Tensor:
    """What is kept of uint8 [C, H, W] for random crops: its shorter side at most KEPT times the crop's longer."""
    most = KEPT * max(preprocess.size)
    height, width = image.shape[-2:]
    if min(height, width) <= most:
        return image.contiguous()
    ratio = most / min(height, width)
    return resize(image, (round(height * ratio), round(width * ratio)), preprocess.interpolation).contiguous()
