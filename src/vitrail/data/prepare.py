"""Turn one image into the input of a model: for `Task.prepare`, and for the loader's workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vitrail.data.affine import Affine
from vitrail.data.augment import Augment, Augmenter, moving_operations, random_cuts, stream_keys, training_affine
from vitrail.data.decode import Box, EncodedImage, resize
from vitrail.data.preprocess import AnyImage, Preprocess
from vitrail.data.random import seed_for

T = TypeVar("T")
Draw = tuple[int, int, int]
"""(seed, epoch, sample): all random draws of an image depend on these alone"""
VIEW = 7
"""stream of the seeds of further views; must differ from the streams of `vitrail.data.augment`"""


class View(NamedTuple):
    """Views per sample: how many, and their size (height, width)."""

    number: int
    size: tuple[int, int]


class Sample(NamedTuple):
    """An image as a model's input, before `Preprocess.normalise`."""

    images: Tensor
    """uint8 [F, C, h, w]: one frame, or several that are tiles or flips of the image"""
    affine: Affine | None
    """from the original to each frame; None if an augmentation policy moves pixels in a way that no affine describes"""

    def with_flips(self) -> Sample:
        """All frames, then all of them flipped left to right. Not for augmented images without an affine."""
        assert self.affine is not None
        return Sample(torch.cat([self.images, self.images.flip(-1)]), self.affine.with_flips())


Prepare = Callable[[EncodedImage | Tensor, Augment | None, Draw | None], Sample]
"""a task's own way from an image to a sample; `Augment` and `Draw` are None in evaluation"""


def prepare(
    image: AnyImage, preprocess: Preprocess, augment: Augment | None = None, draw: Draw | None = None
) -> Sample:
    """Prepare an image as for evaluation and prediction, or with a `draw` as for training in that epoch.

    The pixels are those that `Loader` gives for the same draw, except for mixup and cutmix, which need a second image.
    """
    opened = preprocess.open(image)
    size = size_of(opened, preprocess)
    if draw is None:
        return Sample(preprocess.prepare(opened)[None], preprocess.affine(torch.tensor([size])))
    assert augment is not None, "a draw is for training, which augments"
    seed, epoch, sample = draw
    samples, sizes = torch.tensor([sample]), torch.tensor([size])
    box, place = cuts_of(augment, preprocess, seed, epoch, samples, sizes)[0] if augment.cuts else (None, None)
    pixels = pixels_of(opened, box, preprocess, place)[None]
    augmenter = Augmenter(cropped(augment), preprocess.size, fill=preprocess.fill)
    images = augmenter(pixels, samples, stream_keys(seed, epoch))
    moves = moving_operations(augment)
    return Sample(images, None if moves else training_affine(augment, preprocess, seed, epoch, samples, sizes))


def view_seeds(views: tuple[View, ...], preprocess: Preprocess, seed: int) -> list[tuple[int, Preprocess]]:
    """For each view of a sample, the seed of its draws and its preprocessing; the first view has the run's seed."""
    each = [replace(preprocess, size=view.size) for view in views for _ in range(view.number)]
    return [(seed_for(seed, VIEW, i) if i else seed, own) for i, own in enumerate(each)]


def batched(items: Iterable[T], frames: Callable[[T], Tensor], pixels: int) -> Iterator[list[T]]:
    """Neighbours whose frames [F, C, h, w] have one size, in batches of at most so many pixels, or of one item."""
    batch: list[T] = []
    size, total = None, 0
    for item in items:
        count, _, height, width = frames(item).shape
        if batch and (size != (height, width) or total + count * height * width > pixels):
            yield batch
            batch, total = [], 0
        batch.append(item)
        size, total = (height, width), total + count * height * width
    if batch:
        yield batch


def cropped(augment: Augment) -> Augment:
    """The rest of an augmentation whose random crop was applied when the image was read."""
    return replace(augment, crop="none") if augment.cuts else augment


def cuts_of(
    augment: Augment, preprocess: Preprocess, seed: int, epoch: int, draws: Tensor, sizes: Tensor
) -> list[tuple[Box, Box]]:
    """The random box of each image and its place in the input: see `random_cuts`."""
    boxes, places = random_cuts(augment, preprocess, seed, epoch, draws, sizes)
    return [(tuple(box), tuple(place)) for box, place in zip(boxes.tolist(), places.tolist(), strict=True)]


def pixels_of(
    image: EncodedImage | Tensor, box: Box | None, preprocess: Preprocess, place: Box | None = None
) -> Tensor:
    """uint8 [C, h, w] at the size of `preprocess`: a box of the image, or if it is None the crop of evaluation.

    `place` is the box's place in the input, which is padded with the colour `fill`; None for the whole input.
    """
    if box is None:
        return preprocess.prepare(image)
    top, left, height, width = box
    first, start, *size = place or (0, 0, *preprocess.size)
    if isinstance(image, EncodedImage):
        found = image.crop(box, (size[0], size[1]), preprocess.channels, preprocess.interpolation)
    else:
        found = image[:, top : top + height, left : left + width]
        found = resize(found, (size[0], size[1]), preprocess.interpolation)
    return preprocess.padded(found, first, start)


def size_of(opened: EncodedImage | Tensor, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width of an opened image."""
    if isinstance(opened, Tensor):
        return opened.shape[-2], opened.shape[-1]
    return opened.measure(preprocess.channels)
