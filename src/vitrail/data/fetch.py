"""The work of a loader's worker: open images, crop or resize them, read targets, and report bad images.

The rest is done on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.data.affine import Affine
from vitrail.data.augment import Augment, training_affine
from vitrail.data.decode import BadImage, Box, EncodedImage
from vitrail.data.memory import Kept
from vitrail.data.prepare import Prepare, cuts_of, pixels_of, size_of
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Target

Size = tuple[int, int]


class Want(NamedTuple):
    """A request for an image of a batch: its number in the set, the epoch, and the number that seeds its draws."""

    sample: int
    epoch: int
    draw: int


@dataclass
class Fetched:
    """A batch before augmentation."""

    views: list[Tensor]
    """uint8 [B, C, h, w] of each image that a sample becomes: one for most tasks"""
    samples: Tensor
    """int64 [B]"""
    draws: Tensor
    """int64 [B]"""
    values: list[Any]
    """the target of each sample, warped to the input"""
    truths: list[Any]
    """the same before warping, if the target is spatial: for evaluation at the original size"""
    affine: Affine | None
    """of the images, if the target is spatial"""
    bad: dict[int, str]
    """error messages of bad images, by number in the set"""


class Opened(NamedTuple):
    """An image before its pixels are read, its `Want`, and its size if that is needed."""

    image: EncodedImage | Tensor
    want: Want
    size: Size


class Fetch(Dataset[Fetched]):
    """Batches of a set, given their `Want`s. In training a bad image is replaced by the next good one."""

    def __init__(
        self,
        images: ImageSet,
        target: Target,
        views: Sequence[tuple[int, Preprocess]],
        augment: Augment | None,
        kept: Kept | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        """`views` come from `view_seeds`; the target is warped to the first. `augment` is None in evaluation.

        `kept` contains the images if they are in memory: then only these are used. `prepare` is a task's own way to
        take an image: with one frame in training, with any number in evaluation.
        """
        self.prepare = prepare
        self.set, self.target = images, target
        self.views = views
        self.seed, self.preprocess = views[0]
        self.augment = augment
        self.kept = kept

    def __getitem__(self, index: int) -> Fetched:
        return self.__getitems__([Want(index, 0, index)])

    def __getitems__(self, wants: list[Want]) -> Fetched:
        bad: dict[int, str] = {}
        if (streamed := self.set.streamed) is not None and self.kept is None:
            streamed.fetch(want.sample for want in wants)
        opened = [found for want in wants if (found := self._open(want, bad)) is not None]
        cuts = self._cuts(opened)
        samples = [self._make(image, cut, bad) for image, cut in zip(opened, cuts, strict=True)]
        good = [sample for sample in samples if sample is not None]
        used = [want for want, _, _, _, _ in good]
        return Fetched(
            [self._joined([views[k] for _, views, _, _, _ in good], own) for k, (_, own) in enumerate(self.views)],
            torch.tensor([want.sample for want in used], dtype=torch.int64),
            torch.tensor([want.draw for want in used], dtype=torch.int64),
            [value for _, _, value, _, _ in good],
            [truth for _, _, _, truth, _ in good],
            joined_affine([affine for _, _, _, _, affine in good if affine is not None]),
            bad,
        )

    def _joined(self, images: list[Tensor], preprocess: Preprocess) -> Tensor:
        if not images:
            return torch.empty(0, preprocess.channels, *preprocess.size, dtype=torch.uint8)
        return torch.stack(images) if self.prepare is None else torch.cat(images)  # several frames of each

    def _open(self, want: Want, bad: dict[int, str]) -> Opened | None:
        """The image, or in training the next good one. None if it is bad in evaluation, or if all are bad."""
        for _ in range(len(self.set)):
            if want.sample in bad:  # this batch has tried it already
                want = self._next(want)
                continue
            try:
                image = self.kept.images[want.sample] if self.kept is not None else self.set.open(want.sample)
                needed = self.target.spatial or (self.augment is not None and self.augment.cuts)
                return Opened(image, want, size_of(image, self.preprocess) if needed else (0, 0))
            except BadImage as error:
                bad[want.sample] = str(error)
                if self.augment is None:
                    return None
                want = self._next(want)
        return None

    def _make(
        self, opened: Opened, cuts: list[tuple[Box, Box]] | None, bad: dict[int, str]
    ) -> tuple[Want, list[Tensor], Any, Any, Affine | None] | None:
        """The views of a sample, its target (warped, and as read if spatial), and the first view's affine."""
        for _ in range(len(self.set)):
            try:
                if self.prepare is not None:
                    return self._prepared(self.prepare, opened)
                each: Sequence[tuple[Box | None, Box | None]] = cuts or [(None, None)] * len(self.views)
                views = [
                    pixels_of(opened.image, box, own, place)
                    for (box, place), (_, own) in zip(each, self.views, strict=True)
                ]
                return opened.want, views, *self._value(opened.want, opened.size)
            except BadImage as error:
                bad[opened.want.sample] = str(error)
            if self.augment is None:
                return None
            found = self._open(self._next(opened.want), bad)
            if found is None:
                break
            opened, (cuts,) = found, self._cuts([found])
        return None

    def _prepared(self, prepare: Prepare, opened: Opened) -> tuple[Want, list[Tensor], Any, Any, Affine | None]:
        """The same by a task's own preparation, which gives one image in training and one or several in evaluation."""
        want = opened.want
        draw = None if self.augment is None else (self.seed, want.epoch, want.draw)
        frames, affine = prepare(opened.image, self.augment, draw)
        if draw is not None and len(frames) != 1:
            raise ValueError(f"a task prepares one image per sample in training, got {len(frames)}")
        value = self.target.read(want.sample)
        if not self.target.spatial:
            return want, [frames], value, None, affine
        assert affine is not None, "masks and boxes follow the affine of their image"
        warped = self.target.warp(value, first_frame(affine))
        return want, [frames], warped, value, affine

    def _next(self, want: Want) -> Want:
        sample = (want.sample + 1) % len(self.set)
        return Want(sample, want.epoch, sample)

    def _cuts(self, opened: list[Opened]) -> list[list[tuple[Box, Box]]] | list[None]:
        """The random boxes of some images and their places, one per view; None for the fixed crop of evaluation."""
        if self.augment is None or not self.augment.cuts or not opened:
            return [None] * len(opened)
        draws, sizes = torch.tensor([each.want.draw for each in opened]), torch.tensor([each.size for each in opened])
        epoch = opened[0].want.epoch
        views = [cuts_of(self.augment, own, seed, epoch, draws, sizes) for seed, own in self.views]
        return [list(cuts) for cuts in zip(*views, strict=True)]

    def _value(self, want: Want, size: Size) -> tuple[Any, Any, Affine | None]:
        """The target of an image of that size; if it is spatial, also before warping, and the affine."""
        value = self.kept.values[want.sample] if self.kept is not None else self.target.read(want.sample)
        if not self.target.spatial:
            return value, None, None
        source = self.kept.sources[want.sample] if self.kept is not None else size
        affine = affine_of([want], [source], [size], self.preprocess, self.seed, self.augment)
        return self.target.warp(value, affine), value, affine


def affine_of(
    wants: list[Want], sources: list[Size], kept: list[Size], preprocess: Preprocess, seed: int, augment: Augment | None
) -> Affine:
    """The map to the model's input of some images of an epoch, whose originals have the sizes `sources`.

    `kept` are their sizes in memory, or those of the originals. `augment` is None in evaluation.
    """
    sizes = torch.tensor(sources)
    if augment is None:
        return preprocess.affine(sizes)
    draws = torch.tensor([want.draw for want in wants])
    return training_affine(augment, preprocess, seed, wants[0].epoch, draws, sizes, torch.tensor(kept))


def first_frame(affine: Affine) -> Affine:
    """The first frame of an affine: warping to it checks that a target fits its image."""
    return Affine(affine.matrix[:1], affine.sources[:1], affine.size, affine.image_of[:1], affine.window[:1])


def joined(fetched: Sequence[Fetched]) -> Fetched:
    """Batches whose images have one size, as one."""
    return Fetched(
        [torch.cat(images) for images in zip(*(one.views for one in fetched), strict=True)],
        torch.cat([one.samples for one in fetched]),
        torch.cat([one.draws for one in fetched]),
        [value for one in fetched for value in one.values],
        [truth for one in fetched for truth in one.truths],
        joined_affine([one.affine for one in fetched if one.affine is not None]),
        {},
    )


def joined_affine(affines: list[Affine]) -> Affine | None:
    """The affines of a batch as one; None if there are none."""
    return Affine.join(affines) if affines else None
