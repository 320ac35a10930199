"""Captions and masks: texts that repeat, masks that cannot be read or do not fit their image, and absent classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from vitrail.data.decode import BadImage
from vitrail.data.masks import Masks
from vitrail.data.targets import Texts
from vitrail.doctor.finding import Finding, counted
from vitrail.doctor.survey import Survey

COMMON = 0.5
"""a caption of more than this fraction of the images says nothing about any of them"""
STANDS_OUT, LEAST = 10, 5
"""how many times more often than the median caption, and how often at least, a caption is repeated that stands out"""
MASKS_READ = 2_000
"""masks that are read: evenly spaced ones of a larger set"""


def texts(found: Survey) -> Iterator[Finding]:
    """Captions that repeat within an image or over many images."""
    captions = [own for chosen in found.sets if isinstance(chosen.target, Texts) for own in chosen.target.captions]
    if not captions:
        return
    simple = [[" ".join(text.lower().split()).rstrip(" .") for text in own] for own in captions]
    if twice := [i for i, own in enumerate(simple) if len(set(own)) < len(own)]:
        yield Finding(
            "repeated-captions",
            f"{counted(len(twice), 'image has', 'images have')} the same caption more than once",
            "remove the repetitions: they count as several people's answers, in training and in scores",
            "certain",
            found.named(twice),
        )
    number = Counter(text for own in simple for text in set(own))
    images, usual = len(simple), float(np.median(list(number.values())))
    often = [
        (text, count)
        for text, count in number.most_common(20)
        if count >= LEAST and (count > COMMON * images or count >= max(STANDS_OUT * usual, 0.02 * images))
    ]
    if often:
        yield Finding(
            "repeated-captions",
            f"{counted(len(often), 'caption is', 'captions are')} the same for many of the {images:,} images",
            "check that the captions belong to their images: a model learns to say these whatever it sees",
            "certain",
            [(f"{text!r:.80} ({count:,} images)",) for text, count in often],
        )


def masks(found: Survey) -> Iterator[Finding]:
    """Masks of another size than their image, masks that cannot be read, and classes that no mask of train has."""
    numbers = [i for i in found.good() if isinstance(found.place(int(i))[0].target, Masks)]
    if not numbers:
        return
    chosen = np.array(numbers)[np.linspace(0, len(numbers) - 1, min(len(numbers), MASKS_READ)).round().astype(int)]
    bad: list[tuple[str, ...]] = []
    other: list[tuple[str, ...]] = []
    classes = found.place(int(chosen[0]))[0].classes
    pixels = np.zeros(len(classes), dtype=np.int64)
    for i in chosen:
        images, at = found.place(int(i))
        try:
            indices = images.target.read(at).indices
        except BadImage as error:
            bad.append((str(error),))
            continue
        size = (int(found.measured["height"][i]), int(found.measured["width"][i]))
        if tuple(indices.shape) != size:
            other.append((f"{found.names[i]} ({size[1]}x{size[0]}, its mask {indices.shape[1]}x{indices.shape[0]})",))
        if found.split[i] == 0:
            valid = indices[(indices >= 0) & (indices < len(pixels))].long()
            pixels += valid.flatten().bincount(minlength=len(pixels)).numpy()
    if bad:
        yield Finding(
            "broken-masks",
            f"{counted(len(bad), 'mask cannot', 'masks cannot')} be read, of {len(chosen):,}",
            "add masks that are missing, save the others again as PNG with the class number of each pixel, or remove "
            "these images",
            "certain",
            bad,
        )
    if other:
        yield Finding(
            "mask-sizes",
            f"{counted(len(other), 'mask has', 'masks have')} another size than the image, of {len(chosen):,}",
            "export them at the size of the image; if they were resized, use nearest neighbour, never interpolation",
            "certain",
            other,
        )
    if len(chosen) == len(numbers) and (empty := np.flatnonzero(pixels == 0)).size:
        yield Finding(
            "empty-classes",
            f"{counted(len(empty), 'class has', 'classes have')} no pixel in the masks of {found.splits[0]}",
            "add images that show it, or remove it from the class list",
            "certain",
            [(classes[k],) for k in empty],
        )
