"""An uploaded image, as a model's input: what it declares is checked before anything of it is decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from PIL import Image, UnidentifiedImageError

from vitrail.data import jpeg, pixels, tiff
from vitrail.data.decode import BadImage, EncodedImage, open_with_pillow
from vitrail.serve.errors import ApiError

T = TypeVar("T")

MAX_FRAMES = 100
"""frames of an animation, or pages: the first one is answered, and a file of more is refused"""
LARGE = 8_000_000
"""pixels from which on an image is decoded alone, so that many of them together do not fill the memory"""


class Declared(NamedTuple):
    """What an image file says of itself."""

    pixels: int
    frames: int


class Opened(NamedTuple):
    """An image that may be decoded."""

    image: EncodedImage
    large: bool


def open_image(data: bytes, name: str, max_pixels: int) -> Opened:
    """An uploaded image that is within the limits. `name` is for errors. Raises ApiError."""
    if not data:
        raise ApiError(422, "empty_image", f"{name} is empty", "send the content of an image file")
    found = declared(data, name)
    if found.pixels > max_pixels:
        raise ApiError(
            413,
            "too_many_pixels",
            f"{name} has {found.pixels:,} pixels, more than {max_pixels:,}, the limit of this server",
            "send a smaller image",
        )
    if found.frames > MAX_FRAMES:
        raise ApiError(
            422, "too_many_frames", f"{name} has more than {MAX_FRAMES} frames", "send one frame of it as an image"
        )
    try:
        return Opened(EncodedImage(data, name), found.pixels > LARGE)
    except BadImage as error:
        raise damaged(error) from None


def decoded(opened: Opened, then: Callable[[EncodedImage], T]) -> T:
    """What a function makes of an image that it decodes. Raises ApiError for a damaged image."""
    try:
        return then(opened.image)
    except BadImage as error:
        raise damaged(error) from None


def damaged(error: BadImage) -> ApiError:
    """422 for an image that cannot be decoded, with the reason."""
    return ApiError(422, "bad_image", str(error), "mend the image file, or send another image")


def declared(data: bytes, name: str) -> Declared:
    """The size and the number of frames by the header alone. Raises ApiError for what is not an image."""
    if (header := jpeg.read_header(data)) is not None:
        return Declared(header.width * header.height, 1)
    if data.startswith(pixels.NUMPY):
        return Declared(len(data), 1)  # not compressed
    if data[:4] in tiff.MAGIC:
        try:
            pages = tiff.pages(data)
        except Exception:  # which decoding will say
            return Declared(0, 1)
        return Declared(pages[0].width * pages[0].height, len(pages))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_with_pillow(data) as image:
                if image.format == "GIF":
                    return Declared(image.width * image.height, gif_frames(data))
                return Declared(image.width * image.height, int(getattr(image, "n_frames", 1)))
    except UnidentifiedImageError:
        hint = "send the content of an image file, such as a JPEG or a PNG; URLs are not fetched"
        raise ApiError(415, "not_an_image", f"{name} is not an image", hint) from None
    except Image.DecompressionBombError:
        raise ApiError(413, "too_many_pixels", f"{name} has too many pixels", "send a smaller image") from None
    except Exception:  # readers of headers raise nearly anything; decoding will say what is wrong
        return Declared(0, 1)


def gif_frames(data: bytes) -> int:
    """The frames of a GIF, at most one more than are allowed. Pillow would decompress each to count them."""
    frames, place = 0, 13 + _table(data[10])
    while place < len(data) and frames <= MAX_FRAMES:
        kind = data[place]
        if kind == 0x2C and place + 10 <= len(data):
            frames += 1
            place += 11 + _table(data[place + 9])
        elif kind == 0x21:
            place += 2
        else:
            break
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    return max(1, frames)


def _table(flags: int) -> int:
    """Bytes of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
