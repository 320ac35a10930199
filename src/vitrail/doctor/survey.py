"""One pass over all images of a set: each is decoded once, and little is kept of it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitrail.data import jpeg
from vitrail.data.decode import BadImage, EncodedImage
from vitrail.data.pixels import with_channels
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Labels
from vitrail.data.threads import in_order
from vitrail.process import cores

SIDE = 32
"""pixels of the side of the small grey image that is kept of each image"""
COMPARED = 100_000
"""images of which it is kept: above that, evenly spaced ones"""
AT_ONCE = 512
"""images that are read at once by threads"""
MAGIC = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"II+\0": "TIFF", b"MM\0+": "TIFF", b"\x93NUM": "NPY",
}  # fmt: skip
"""the first bytes of formats"""
GREY, COLOUR = "grey", "colour"
MAKE, MODEL = 271, 272
"""tags of EXIF"""


MEASUREMENT = np.dtype(
    [
        ("good", bool),  # False for an image that cannot be read, whose other fields are zeros
        ("format", "U4"),
        ("height", np.int32),
        ("width", np.int32),
        ("bits", np.uint8),  # per value as stored
        ("stored", "U6"),  # grey or colour, by the file's header; empty if it does not tell
        ("grey", bool),  # red, green and blue are equal everywhere
        ("turned", bool),  # EXIF asks for a rotation or a flip
        ("camera", "U40"),
        ("tables", np.int64),  # a hash of the quantisation table of a JPEG: which program wrote it, at which quality
        ("mean", np.float32),
        ("std", np.float32),
        ("spread", np.uint8),  # largest value less smallest, of the channel where that is most
        ("pixels", np.int64),  # a hash of the decoded pixels
    ]
)
"""what is kept of each image"""


class Measurement(NamedTuple):
    """What is kept of one image."""

    row: tuple[object, ...]
    """the fields of MEASUREMENT"""
    small: Tensor
    """grey, uint8 [SIDE, SIDE]"""
    colours: Tensor
    """uint8 [3, 4, 4]"""


@dataclass
class Survey:
    """What one pass over a set found: one entry per image, in the order of train, val and test."""

    names: list[str]
    """the keys; where splits share keys, with the split before"""
    split: np.ndarray
    """number of the split in `splits`"""
    splits: list[str]
    sets: list[ImageSet]
    labels: np.ndarray
    classes: list[str]
    """of images; [] for other targets, also if those have classes"""
    bad: dict[int, str] = field(default_factory=dict)
    """the error of each image that cannot be read"""
    measured: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=MEASUREMENT))
    compared: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """numbers of the images with a small image"""
    small: Tensor = field(default_factory=lambda: torch.zeros(0))
    colours: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __len__(self) -> int:
        return len(self.names)

    def open(self, i: int) -> EncodedImage | Tensor:
        chosen, at = self.place(i)
        return chosen.open(at)

    def place(self, i: int) -> tuple[ImageSet, int]:
        """The set of an image, and its number in it."""
        start = 0
        for chosen in self.sets:
            if i < start + len(chosen):
                return chosen, i - start
            start += len(chosen)
        raise IndexError(i)

    def good(self) -> np.ndarray:
        """The numbers of the images that can be read, int64 [M]."""
        return np.flatnonzero(self.measured["good"])

    def named(self, numbers: np.ndarray | list[int]) -> list[tuple[str, ...]]:
        """The names of images, for a finding."""
        return [(self.names[int(i)],) for i in numbers]


def survey(splits: Splits) -> Survey:
    """Read every image of the splits once."""
    named = {"train": splits.train, "val": splits.val, "test": splits.test}
    there = {name: chosen for name, chosen in named.items() if chosen is not None and len(chosen)}
    keys = [key for chosen in there.values() for key in chosen.keys]
    apart = len(set(keys)) == len(keys)
    names = [key if apart else f"{name}: {key}" for name, chosen in there.items() for key in chosen.keys]
    number = np.repeat(np.arange(len(there)), [len(chosen) for chosen in there.values()])
    labels = np.concatenate([chosen.labels.numpy() for chosen in there.values()]) if there else np.zeros(0, np.int64)
    classes = splits.train.classes if isinstance(splits.train.target, Labels) else []
    found = Survey(names, number, [*there], [*there.values()], labels, classes)
    found.measured = np.zeros(len(names), dtype=MEASUREMENT)
    count = min(len(names), COMPARED)
    chosen = np.linspace(0, max(0, len(names) - 1), count).round().astype(np.int64)
    row = {int(i): at for at, i in enumerate(chosen)}
    small = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    colours = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
    for i, one in _measurements(found):
        if isinstance(one, str):
            found.bad[i] = one
            continue
        found.measured[i] = one.row
        if (at := row.get(i)) is not None:
            small[at], colours[at] = one.small, one.colours
    kept = np.flatnonzero(found.measured["good"][chosen])
    found.compared, found.small, found.colours = chosen[kept], small[kept], colours[kept]
    return found


def _measurements(found: Survey) -> Iterator[tuple[int, Measurement | str]]:
    """What is kept of each image, or the error of one that cannot be read."""

    def read(i: int) -> Measurement | str:
        try:
            return measure(*found.place(i))
        except BadImage as error:
            return str(error)

    yield from enumerate(in_order(read, range(len(found)), cores(), AT_ONCE))


def measure(images: ImageSet, i: int) -> Measurement:
    """Decode an image and measure it. Raises BadImage."""
    opened = images.open(i)
    channels = images.channels
    if isinstance(opened, Tensor):
        image, data, stored = images.image(i), b"", (GREY if len(opened) == 1 else COLOUR)
    else:
        image, data, stored = opened.pixels(channels if channels not in (1, 3) else 3), opened.data, _stored(opened)
    rgb = with_channels(image, 3) if len(image) in (1, 3) else image[:1].expand(3, -1, -1)
    values = image.float()
    std, mean = torch.std_mean(values, correction=0)
    grey = bool((rgb[0] == rgb[1]).all() and (rgb[1] == rgb[2]).all())
    exif = _exif(data)
    header = opened.header if isinstance(opened, EncodedImage) else None
    orientation = header.orientation if header is not None else jpeg.orientation_of(lambda: exif)
    kind = "uint8" if isinstance(opened, Tensor) else opened.source.type
    camera = " ".join(str(exif[tag]).strip("\0 ") for tag in (MAKE, MODEL) if tag in exif)
    bits = int("".join(filter(str.isdecimal, kind)) or 8)
    spread = int((values.amax((1, 2)) - values.amin((1, 2))).max())
    row = (True, format_of(data), *image.shape[1:], bits, stored, grey, orientation > 1, camera, _tables(data))
    row += (mean.item(), std.item(), spread, _hash(image))
    return Measurement(row, _resized(with_channels(rgb, 1), SIDE)[0], _resized(rgb, 4))


def format_of(data: bytes) -> str:
    """The format that the first bytes tell; empty if they are of none that is known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC"
    return next((name for start, name in MAGIC.items() if data.startswith(start)), "")


def _stored(image: EncodedImage) -> str:
    """Whether a file stores grey or colours, if its header tells."""
    if image.header is not None:
        return GREY if image.header.components == 1 else COLOUR
    if image.data[:4] == b"\x89PNG" and len(image.data) > 25:
        return {0: GREY, 4: GREY, 2: COLOUR, 6: COLOUR}.get(image.data[25], "")
    return ""


def _exif(data: bytes) -> Image.Exif:
    """The EXIF block of a file; empty if there is none, or if it is damaged."""
    if b"Exif" in data[: 1 << 16] or b"eXIf" in data or data[:4] in (b"II*\0", b"MM\0*") or b"EXIF" in data[-1 << 16 :]:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.getexif()
        except Exception:  # a broken EXIF block says nothing about the pixels
            pass
    return Image.Exif()


def _tables(data: bytes) -> int:
    """A hash of the first quantisation table of a JPEG; 0 for other files."""
    at = data.find(b"\xff\xdb", 0, 1 << 16) if data[:3] == b"\xff\xd8\xff" else -1
    return 0 if at < 0 else _number(data[at + 5 : at + 69])


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def _hash(image: Tensor) -> int:
    shape = ",".join(map(str, image.shape)).encode()
    return _number(shape + np.ascontiguousarray(image.numpy()).tobytes())


def _resized(image: Tensor, side: int) -> Tensor:
    size = (side, side)
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
