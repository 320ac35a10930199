"""Convert pixel values of any type to uint8, by one rule for files, arrays, PIL images and tensors.

| type | read as |
| --- | --- |
| uint8 | unchanged |
| bool | black and white |
| uint16 | its upper 8 bits, whatever range an image uses: `Doubts` reports sets that come out dark |
| float | 0 to 1 if the highest value is at most 1, else 0 to 255; NaN is black, infinity white or black |
| other whole numbers | 0 to 255 |
| complex, text, objects | refused |

Other values (negative, floats between 1 and 2 or above 255, whole numbers above 255) have no known range and are
refused: guessing from each image's own minimum and maximum would give two images of one set different scales.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.data import jpeg

try:
    import_module("pillow_heif").register_heif_opener()  # on import, so that it also happens in worker processes
    HEIC_IS_READ = True
except ImportError:
    HEIC_IS_READ = False

GREY_WEIGHTS = (299, 587, 114)
"""weights of red, green and blue in thousandths (ITU-R 601), as in Pillow and JPEG"""
NUMPY = b"\x93NUMPY"
"""the first bytes of a `.npy` file"""
OVERSHOOT = 0.01
"""how far floats of 0 to 1 may leave that range, as they do after resizing; they are clipped"""
DARK = 1 << 14
"""16-bit images with all values below this keep at most 64 of the 256 levels"""
GIVE = "give uint8, uint16 that uses 0 to 65535, or floats of 0 to 1"


class Source(NamedTuple):
    """How an image was stored: the type and highest finite value of its numbers, its pages, and dropped bands."""

    type: str = "uint8"
    highest: float = 255
    pages: int = 1
    masked: str = ""
    """file and bands, if the last band was used as transparency"""


def source_of(samples: np.ndarray) -> Source:
    """The source of samples of any shape; the highest value is 0 if none is finite."""
    if samples.dtype.kind not in "uif" or samples.dtype == np.uint8:
        return Source()
    finite = np.isfinite(samples) if samples.dtype.kind == "f" else True
    return Source(samples.dtype.name, float(samples.max(initial=0, where=finite)))


def scaled(samples: np.ndarray) -> np.ndarray:
    """Samples of any shape as uint8, by the table above. Raises ValueError for values of no known range."""
    kind = samples.dtype.kind
    if samples.dtype == np.uint8:
        return samples
    if kind == "b":
        return samples.astype(np.uint8) * np.uint8(255)
    if samples.dtype == np.uint16:
        return (samples >> 8).astype(np.uint8)
    if kind == "f":
        return _scaled_floats(samples)
    if kind not in "iu":
        raise ValueError(f"values of type {samples.dtype} are not pixels: {GIVE}")
    low, high = int(samples.min(initial=0)), int(samples.max(initial=0))
    if low < 0 or high > 255:
        raise ValueError(f"{samples.dtype} values from {low} to {high} have no known range: {GIVE}")
    return samples.astype(np.uint8)


def _scaled_floats(samples: np.ndarray) -> np.ndarray:
    finite = np.isfinite(samples)
    low, high = (float(f(initial=0, where=finite)) for f in (samples.min, samples.max))
    most, room = (1, OVERSHOOT) if high <= 1 + OVERSHOOT else (255, 0.5)
    if low < -room or high > most + room or (most == 255 and high < 2):
        raise ValueError(f"{samples.dtype} values from {low:.6g} to {high:.6g} have no known range: {GIVE}")
    wide = samples.astype(np.float64 if samples.dtype == np.float64 else np.float32)
    return np.clip(np.nan_to_num(wide, posinf=most, neginf=0) * (255 // most) + 0.5, 0, 255).astype(np.uint8)


class Doubts:
    """Whether images of one set seem to be read in another way than they were stored."""

    def __init__(self, images: Iterable[Source] = ()) -> None:
        self.count = self.masks = 0
        self.pages = 1
        self.masked = ""
        """the first image whose last band is a mask"""
        self.deep = 0.0
        """the highest value of 16-bit images"""
        self.floats: tuple[float, float] | None = None
        """the lowest and the highest of the highest values of images of floats"""
        for image in images:
            self.add(image)

    def add(self, image: Source) -> None:
        self.count += 1
        self.pages = max(self.pages, image.pages)
        if image.masked:
            self.masks += 1
            self.masked = self.masked or image.masked
        if image.type == "uint16":
            self.deep = max(self.deep, image.highest)
        if image.type.startswith("float") and image.highest:
            least, most = self.floats or (image.highest, image.highest)
            self.floats = (min(least, image.highest), max(most, image.highest))

    def text(self) -> str | None:
        """A warning, or None."""
        return "; ".join(self._all()) or None

    def _all(self) -> Iterator[str]:
        if 0 < self.deep < DARK:
            yield (
                f"the 16-bit images use values up to {self.deep:,.0f} of 65,535 and come out dark, with "
                f"{self.deep // 256 + 1:.0f} of 256 levels: rescale them to use the whole range"
            )
        if self.floats is not None and self.floats[0] <= 1 + OVERSHOOT < self.floats[1]:
            yield (
                "some images of floats are read as 0 to 1, since none of their values is higher, and others as 0 to "
                "255: save all with one range"
            )
        if self.pages > 1:
            yield (
                f"some images have {self.pages} pages: a model of {self.pages} channels reads each page as a channel, "
                "any other model only the first page"
            )
        if self.masks:
            more = f" and {self.masks - 1:,} more of {self.count:,} images" if self.masks > 1 else ""
            yield (
                f"the last band of {self.masked}{more} is used as transparency, unless the model has a channel for "
                "each band: to keep it as a channel, save the files with that band declared as unspecified "
                "(ExtraSamples 0, or `-co ALPHA=NO` of GDAL)"
            )


def to_bytes(image: Tensor) -> Tensor:
    """A tensor of any shape as uint8, by the table above. Raises ValueError for values of no known range."""
    if image.dtype == torch.uint8:
        return image
    image = image.detach().cpu()
    if image.is_floating_point():
        image = image.double() if image.dtype == torch.float64 else image.float()
    return torch.from_numpy(scaled(image.numpy()))


def with_channels(image: Tensor, channels: int) -> Tensor:
    """uint8 [..., C, H, W] with 1 channel repeated to 3, or 3 converted to grey. Else raises ValueError."""
    have = image.shape[-3]
    if have == channels:
        return image
    if have == 1 and channels == 3:
        return image.expand(*image.shape[:-3], 3, *image.shape[-2:])
    if have == 3 and channels == 1:
        red, green, blue = (
            image.int() * weight for image, weight in zip(image.split(1, -3), GREY_WEIGHTS, strict=True)
        )
        return ((red + green + blue + 500) // 1000).to(torch.uint8)
    fewer = "leave some out of the file, or " if have > channels else ""
    raise ValueError(f"it has {have} channels, not {channels}: {fewer}use a model of {have}")


def on_white(image: Tensor, premultiplied: bool = False) -> Tensor:
    """Composite uint8 [C + 1, H, W], whose last channel is alpha, on white: [C, H, W].

    `premultiplied` colours are already multiplied by alpha, so only white is added.
    """
    if premultiplied:
        return (image[:-1].short() + (255 - image[-1:].short())).clamp_(max=255).to(torch.uint8)
    mode = "RGBA" if len(image) == 4 else "LA"
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in image.numpy()]
    flat = torch.from_numpy(np.array(_flat(Image.merge(mode, bands))))
    return flat.permute(2, 0, 1)[: len(image) - 1]


def why_no_mask(alpha: np.ndarray, bands: int) -> str | None:
    """Why the last of some bands, declared as transparency, cannot be that; None if it can.

    It can if it is not 0 everywhere and most values above 0 are the highest possible. By default GDAL declares any
    fourth band of bytes as transparency, even near infrared.
    """
    highest = np.iinfo(alpha.dtype).max if alpha.dtype.kind == "u" else 1
    shown = alpha[alpha > 0]
    if shown.size and (shown >= highest).mean() > 0.5:
        return None
    what = "holds many values, as near infrared does" if shown.size else "is 0 everywhere, which would hide the image"
    return (
        f"the last of its {bands} bands is declared as transparency and {what}: use a model of {bands} channels, or "
        "save the image without that band"
    )


def _flat(image: Image.Image) -> Image.Image:
    """Composite an image with transparency on white, as RGBA."""
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def deep(image: Image.Image) -> np.ndarray | None:
    """The values of an image with more than 8 bits, [H, W]; None for any other."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    values = np.array(image)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    # Older Pillows read PNG and PNM of 16 bits as 32.
    return values.astype(np.uint16) if image.mode == "I" and image.format in ("PNG", "PPM") else values


def _refuse_misread(image: Image.Image, channels: int) -> None:
    """Raise ValueError for a loaded TIFF if PIL dropped bands or used one as transparency by mistake."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return
    bands = tags.get(277, 1)
    if bands > len(image.getbands()) or image.mode == "RGBX":  # of an unspecified band, in older Pillows
        raise ValueError(f"PIL read it as {image.mode}, but the file has {bands} bands: pass it before it is loaded")
    if channels == bands and image.mode == "RGBA" and tuple(tags.get(338, ())) == (1,):
        raise ValueError("PIL has divided its colours by its transparency: pass the image before it is loaded")
    if channels == bands or image.mode not in ("LA", "La", "RGBA"):
        return
    if (reason := why_no_mask(np.array(image.getchannel(len(image.getbands()) - 1)), bands)) is not None:
        raise ValueError(reason)


def from_pil(image: Image.Image, channels: int) -> Tensor:
    """An opened image, upright by EXIF, as uint8 [channels, H, W]. Raises ValueError if it does not fit.

    Transparency is composited on white, except for channel counts other than 1 and 3, which are the stored bands.
    """
    image.load()  # rotates a TIFF, and reads an EXIF block at the end of a PNG
    _refuse_misread(image, channels)
    return jpeg.turn(with_channels(_bands(image, channels), channels), jpeg.orientation_of(image.getexif))


def _bands(image: Image.Image, channels: int) -> Tensor:
    if (values := deep(image)) is not None:
        return torch.from_numpy(scaled(values))[None]
    if channels not in (1, 3) and image.mode in ("LA", "RGBA"):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if image.has_transparency_data:
        image = _flat(image)
    if image.mode in ("1", "L"):
        return torch.from_numpy(np.array(image.convert("L")))[None]
    # Converting would copy even RGB, and images may be large.
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def read_array(data: bytes) -> np.ndarray:
    """The array in a `.npy` file, with two or three axes, in the machine's byte order. Raises ValueError."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        if "Object arrays" in str(error):
            raise ValueError("an array of Python objects is not read, since it may run code: save numbers") from None
        raise
    return checked_array(array)


def checked_array(array: np.ndarray) -> np.ndarray:
    """An array of one image, in the machine's byte order. Raises ValueError for other shapes."""
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(
            f"an array of shape {list(array.shape)} is not an image: give one image per array, as [H, W], [H, W, C] or "
            "[C, H, W]"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def channel_axis(shape: tuple[int, ...], channels: int | None = None) -> int | None:
    """Which axis of an array is the channels: the first or the last; None if there are two axes.

    The one of length `channels` if there is one, or else of length 1 or 3, or else the shorter.
    """
    if len(shape) == 2:
        return None
    ends = ((2, shape[2]), (0, shape[0]))
    for counts in ((channels,), (1, 3)):
        for axis, length in ends:
            if length in counts:
                return axis
    return min(ends, key=lambda end: end[1])[0]


def from_array(array: np.ndarray, channels: int) -> Tensor:
    """[H, W], [H, W, C] or [C, H, W] as uint8 [channels, H, W]. Raises ValueError if it does not fit."""
    # A copy if it cannot be written, as np.asarray of a PIL image: PyTorch warns of memory that it must not change.
    image = torch.from_numpy(np.require(scaled(array), requirements=["C", "W"]))
    axis = channel_axis(array.shape, channels)
    image = image[None] if axis is None else image.permute(2, 0, 1) if axis == 2 else image
    return with_channels(image, channels)
