"""Any picture that Pillow opens, and arrays, to uint8 [C, H, W] without a loss that surprises."""

from __future__ import annotations

import io
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, TiffImagePlugin
from torch import Tensor

GREY_WEIGHTS = (299, 587, 114)
"""thousandths of red, green and blue (ITU-R 601), as Pillow's and JPEG's grey"""
TIFF = (b"II*\0", b"MM\0*")
"""how a TIFF begins"""


def from_pil(image: Image.Image, channels: int) -> Tensor:
    """An opened picture, turned by its EXIF number, as uint8 [channels, H, W]. Raises ValueError where that can't be.

    16 bits keep their upper 8; transparent pixels lie on white; other channel counts than 1 and 3 are the bands as
    they are, or the pages of a file that has one for each channel.
    """
    pages = getattr(image, "n_frames", 1)
    if channels not in (1, 3) and pages == channels:
        return torch.cat([from_pil(page, 1) for page in ImageSequence.Iterator(image)])
    image = ImageOps.exif_transpose(image)
    if channels not in (1, 3):
        return with_channels(torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1), channels)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return with_channels(torch.from_numpy(_deep_grey(np.array(image), image.mode))[None], channels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("1", "L", "LA"):
        return with_channels(torch.from_numpy(np.array(image.convert("L")))[None], channels)
    return with_channels(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), channels)


def _deep_grey(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Grey of 16 or 32 bits, or floats of 0 to 1 or 0 to 255, to 8 bits; the largest number tells which.

    Pixels that are no number become black, as those without data often are, and infinite ones white or black.
    """
    if mode == "F":
        scale = 255 if pixels.max(initial=0, where=np.isfinite(pixels)) <= 1 else 1
        return np.clip(np.nan_to_num(pixels, posinf=255, neginf=0) * scale + 0.5, 0, 255).astype(np.uint8)
    # Pillow reads some 16-bit files as 32-bit numbers.
    bits = 8 if mode != "I" or pixels.max(initial=0) < 1 << 16 else 23
    return (np.maximum(pixels.astype(np.int64), 0) >> bits).astype(np.uint8)


def with_channels(image: Tensor, channels: int) -> Tensor:
    """uint8 [..., C, H, W] with 1 channel repeated to 3, or 3 mixed to grey. Raises ValueError for other changes."""
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
    raise ValueError(f"it has {have} channels, not {channels}")


def to_bytes(image: Tensor) -> Tensor:
    """Pixels as uint8: floats are of 0 to 1, 16 bits keep their upper 8, booleans are black and white."""
    if image.dtype == torch.uint8:
        return image
    if image.is_floating_point():
        return (image * 255).round().clamp(0, 255).to(torch.uint8)
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if image.dtype in (torch.uint16, torch.int16):
        return ((image.int() & 0xFFFF) >> 8).to(torch.uint8)
    raise ValueError(f"pixels of type {image.dtype} have no known range: give uint8, uint16, or floats of 0 to 1")


def from_array(data: bytes, channels: int) -> Tensor:
    """A `.npy` file of [H, W], [H, W, C] or [C, H, W]; of the last two, the one whose C is `channels`."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"an array of shape {array.shape} is no picture")
    image = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    if image.ndim == 2:
        image = image[None]
    elif image.shape[-1] == channels or image.shape[0] not in (1, 3, channels):
        image = image.permute(2, 0, 1)
    return with_channels(to_bytes(image), channels)


def from_bands(data: bytes) -> Tensor:
    """A TIFF of any number of bands of 8 or 16 bits, plain or deflated, which Pillow does not open.

    Raises ValueError or KeyError for anything else.
    """
    file = io.BytesIO(data)
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
    width, height, bands = tags[256], tags[257], tags.get(277, 1)
    depths, planar, compression = tags[258], tags.get(284, 1) == 2, tags.get(259, 1)
    if set(depths) not in ({8}, {16}) or compression not in (1, 8, 32946) or tags.get(317, 1) != 1:
        raise ValueError("a TIFF of this kind is not read: save it with 8 or 16 bits a band, plain or deflated")
    strips = [data[start : start + size] for start, size in zip(tags[273], tags[279], strict=True)]
    if compression != 1:
        # No strip holds more than the whole picture, whatever it unpacks to.
        strips = [zlib.decompressobj().decompress(strip, width * height * bands * 2) for strip in strips]
    kind = np.dtype("u1" if depths[0] == 8 else ("<u2" if data[:2] == b"II" else ">u2"))
    pixels = np.frombuffer(b"".join(strips), kind)
    pixels = pixels.reshape((bands, height, width) if planar else (height, width, bands))
    if kind.itemsize == 2:
        pixels = (pixels >> 8).astype(np.uint8)
    image = torch.from_numpy(pixels.copy())
    return image if planar else image.permute(2, 0, 1)
