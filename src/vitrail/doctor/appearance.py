"""How images are stored and what they look like: sizes, channels, bits, rotation, and odd statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vitrail.doctor.finding import Finding, counted
from vitrail.doctor.survey import COLOUR, GREY, Survey

TINY, HUGE = 1 / 4, 4.0
"""sides of an odd image, as fractions of the set's median"""
LONG = 5.0
"""an odd ratio of the sides, unless the set's median is near it"""
FEW = 0.2
"""largest fraction of images that are odd in a set: above that they are a kind of their own"""
MOST_PIXELS = 50e6
FLAT = 2
"""levels between the darkest and the lightest value of a constant image"""
FAR = 6.0
"""distance of an odd brightness or contrast from the median, in robust standard deviations"""
LEAST = 8.0
"""smallest robust standard deviation, in levels"""
SHIFT = 1.0
"""difference of the mean brightness of two splits, in standard deviations of the images' own"""
ENOUGH = 20
"""images of a split whose mean is compared"""


def appearance(found: Survey) -> Iterator[Finding]:
    """Everything that the survey's numbers tell, image by image."""
    good = found.good()
    if len(good):
        rows = found.measured[good]
        yield from _sizes(found, good, rows)
        yield from _storage(found, good, rows)
        yield from _statistics(found, good, rows)


def _sizes(found: Survey, good: np.ndarray, rows: np.ndarray) -> Iterator[Finding]:
    side = np.sqrt(rows["height"].astype(float) * rows["width"])
    middle = np.median(side)
    size = f"the median size is {np.median(rows['width']):.0f}x{np.median(rows['height']):.0f} pixels"
    tiny = (side <= TINY * middle) | (np.minimum(rows["height"], rows["width"]) < 4)
    if _few(tiny):
        yield Finding(
            "tiny-images",
            f"{counted(int(tiny.sum()), 'image is', 'images are')} much smaller than the others: {size}",
            "replace them by the originals if they are thumbnails or icons, or remove them",
            "certain",
            _sized(found, good, rows, tiny),
        )
    huge = (side >= HUGE * middle) | (side * side > MOST_PIXELS)
    if huge.any() and (_few(huge) or side.max() ** 2 > MOST_PIXELS):
        yield Finding(
            "huge-images",
            f"{counted(int(huge.sum()), 'image is', 'images are')} much larger than the others: {size}",
            "scale them down, since decoding them takes most of the time (`vitrail data shard --resize 256`); check "
            "that objects have the size that they have in the other images",
            "certain",
            _sized(found, good, rows, huge),
        )
    ratio = np.log(rows["width"] / rows["height"].astype(float))
    long = np.abs(ratio - np.median(ratio)) > np.log(LONG)
    if _few(long):
        yield Finding(
            "odd-shapes",
            f"{counted(int(long.sum()), 'image is', 'images are')} much longer or narrower than the others",
            "look at them: a centre crop shows a small region of them (--resize letterbox shows the whole image)",
            "likely",
            _sized(found, good, rows, long),
        )


def _sized(found: Survey, good: np.ndarray, rows: np.ndarray, odd: np.ndarray) -> list[tuple[str, ...]]:
    places = np.flatnonzero(odd)
    return [(f"{found.names[good[k]]} ({rows['width'][k]}x{rows['height'][k]})",) for k in places]


def _few(odd: np.ndarray) -> bool:
    """Whether some images are odd, but few of the set."""
    return 0 < odd.sum() <= max(1, FEW * len(odd))


def _storage(found: Survey, good: np.ndarray, rows: np.ndarray) -> Iterator[Finding]:
    depths, counts = np.unique(rows["bits"], return_counts=True)
    if len(depths) > 1:
        most = depths[counts.argmax()]
        odd = rows["bits"] != most
        yield Finding(
            "mixed-depth",
            f"{counted(int(odd.sum()), 'image has', 'images have')} {'/'.join(map(str, depths[depths != most]))} bits "
            f"per value among images of {most}",
            "save all images with one depth: the same brightness may be another number in these",
            "certain",
            found.named(good[odd]),
        )
    stored_grey, colour = rows["stored"] == GREY, (rows["stored"] == COLOUR) & ~rows["grey"]
    grey = (stored_grey | rows["grey"]) & (rows["spread"] > FLAT)
    if grey.any() and colour.any() and (_few(grey) or _few(colour)):
        odd, name, other = (grey, "grey", "colour") if grey.sum() <= colour.sum() else (colour, "in colour", "grey")
        by_file = bool((rows["stored"][odd] == (GREY if name == "grey" else COLOUR)).all())
        yield Finding(
            "mixed-channels",
            f"{counted(int(odd.sum()), 'image is', 'images are')} {name} among {other} images",
            "check where they come from; if grey tells a class, convert all images to grey",
            "certain" if by_file else "likely",
            found.named(good[odd]),
        )
    if rows["turned"].any():
        turned = good[rows["turned"]]
        yield Finding(
            "exif-rotation",
            f"EXIF rotates {counted(len(turned), 'image')}: vitrail turns {'it' if len(turned) == 1 else 'them'} "
            "upright, but other programs may not",
            "rotate the pixels and remove the tag, above all if boxes or masks were drawn with another program",
            "certain",
            found.named(turned),
        )


def _statistics(found: Survey, good: np.ndarray, rows: np.ndarray) -> Iterator[Finding]:
    flat = rows["spread"] <= FLAT
    if flat.any():
        yield Finding(
            "constant-images",
            f"{counted(int(flat.sum()), 'image has', 'images have')} one colour and nothing else",
            "remove them: most are failed exports, covered lenses or missing tiles",
            "certain",
            found.named(good[flat]),
        )
    odd = np.zeros(len(rows), dtype=bool)
    for name in ("mean", "std"):
        values = rows[name].astype(float)
        middle = np.median(values[~flat]) if not flat.all() else 0.0
        scale = max(LEAST, 1.4826 * float(np.median(np.abs(values - middle))))
        odd |= np.abs(values - middle) > FAR * scale
    odd &= ~flat
    if _few(odd):
        yield Finding(
            "odd-statistics",
            f"the brightness or contrast of {counted(int(odd.sum()), 'image is', 'images is')} far from that of the "
            "others",
            "look at them: they may be inverted, over- or underexposed, or from another source",
            "possible",
            found.named(good[odd & ~flat]),
        )
    yield from _shifted(found, good, rows)


def _shifted(found: Survey, good: np.ndarray, rows: np.ndarray) -> Iterator[Finding]:
    splits = found.split[good]
    means = {k: rows["mean"][splits == k] for k in range(len(found.splits)) if (splits == k).sum() >= ENOUGH}
    if 0 not in means:
        return
    for k in [k for k in means if k]:
        own, other = means[0], means[k]
        scale = max(LEAST, float(np.sqrt((own.var() + other.var()) / 2)))
        if abs(own.mean() - other.mean()) > SHIFT * scale:
            yield Finding(
                "splits-differ",
                f"the images of {found.splits[k]} have a mean brightness of {other.mean():.0f}, those of "
                f"{found.splits[0]} {own.mean():.0f} (of 255)",
                "check that both were made by the same camera and the same steps: otherwise a score on one says little "
                "about images like those of the other",
                "likely",
                [(found.splits[0],), (found.splits[k],)],
            )
