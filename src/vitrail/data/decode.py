"""Decode image files to uint8 [C, H, W], upright: by their content, and a JPEG no further than its use needs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from vitrail.data import jpeg, pixels, tiff
from vitrail.data.members import Member
from vitrail.errors import UserError

MAX_PIXELS = 178_956_970
"""A larger image is refused before it is decoded: a small file can declare a size that fills the memory.
Pillow has the same limit, half a gigabyte in RGB."""

PNG = b"\x89PNG\r\n\x1a\n"
FORMATS = frozenset(["AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"])
"""formats that are read. Some others of Pillow start programs (EPS), hold a file of any size or format (IPTC, ICO), or
decode in Python, slowly."""

Box = tuple[int, int, int, int]
"""top, left, height, width in pixels of the upright image"""
Interpolation = Literal["nearest", "bilinear", "bicubic"]


def open_with_pillow(data: bytes) -> Image.Image:
    """A file that Pillow has opened and not decoded, if it is of one of the `FORMATS`. Raises what Pillow does."""
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in Image.ID if name in FORMATS])


class BadImage(UserError):
    """An image file that cannot be read, or that is incomplete. The message names the file."""


def resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """uint8 [..., C, H, W] at another size, antialiased when it shrinks."""
    if image.shape[-2:] == size:
        return image
    batch = image.reshape(-1, *image.shape[-3:])
    if interpolation == "nearest":
        batch = F.interpolate(batch, size=size, mode="nearest-exact")
    elif image.device.type == "cpu":
        batch = F.interpolate(batch, size=size, mode=interpolation, antialias=True)
    else:
        # PyTorch can resize uint8 on the CPU only.
        exact = F.interpolate(batch.float(), size=size, mode=interpolation, antialias=True)
        batch = exact.round_().clamp_(0, 255).to(torch.uint8)
    return batch.reshape(*image.shape[:-2], *size)


class EncodedImage:
    """An image file with only its header read, so that a crop can be chosen by its size before decoding."""

    def __init__(self, data: bytes | str | Path | Member, name: str | None = None) -> None:
        data = Path(data) if isinstance(data, str) else data
        self.name = name or (str(data) if isinstance(data, Path) else "image")
        if not isinstance(data, bytes):
            try:
                data = data.read_bytes()
            except OSError as error:
                raise self._bad(error.strerror or str(error)) from None
        if not data:
            raise self._bad("the file is empty")
        self.data = data
        self.header = jpeg.read_header(data)
        self.image: Tensor | None = None
        self.size: tuple[int, int] | None = None
        """(height, width), upright; None if it is known only after decoding"""
        self.source = pixels.Source()
        """type and range of its values, once decoded"""
        if self.header is not None:
            upright = (self.header.height, self.header.width)
            self.size = upright[::-1] if self.header.orientation >= 5 else upright
            if jpeg.is_cut(data, self.header):
                raise self._bad("the file is cut off")
            self._check_size(self.size)

    def pixels(self, channels: int = 3, at_least: tuple[int, int] | None = None) -> Tensor:
        """uint8 [channels, H, W]; a JPEG at 1, 1/2, 1/4 or 1/8 of its size, but not smaller than `at_least`."""
        if self.header is not None and self.header.components in (1, 3) and channels in (1, 3):
            stored = (self.header.height, self.header.width)
            if at_least is not None and self.header.orientation >= 5:
                at_least = at_least[::-1]
            scale = jpeg.scale_for(*stored, at_least) if at_least else 1
            try:
                image = jpeg.decode_scaled(self.data, self.header, channels == 1, scale)
                return jpeg.turn(image, self.header.orientation)
            except ValueError:
                pass  # Pillow reads some JPEGs that this decoder does not, and says what is wrong with the others
        return self._decoded(channels)

    def readable_as(self) -> tuple[int, ...]:
        """The channel counts that the file can be read as without loss, its own first. Raises BadImage.

        Grey can also be read as colour; bands of which the last is a mask can be read as colour on white.
        """
        if self.header is not None:
            return (1, 3) if self.header.components == 1 else (3,)
        try:
            own, other = self._stored()
        except UserError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise self._bad(_reason(error)) from None
        return (1, 3, *other) if own == 1 else (own, *other)

    def _stored(self) -> tuple[int, tuple[int, ...]]:
        """The channels of any format but JPEG, and the number of bands if one of them is a mask."""
        if self.data.startswith(pixels.NUMPY):
            array = pixels.read_array(self.data)
            self.source = pixels.source_of(array)
            axis = pixels.channel_axis(array.shape)
            return 1 if axis is None else array.shape[axis], ()
        if self.data[:4] in tiff.MAGIC and not (pages := tiff.pages(self.data))[0].plain:
            page, samples = pages[0], self._samples(pages[0])
            self.source = self.source._replace(pages=sum(not page.reduced for page in pages))
            if not page.declares_alpha or pixels.why_no_mask(samples[..., -1], page.bands) is not None:
                return page.bands, ()
            return self._colours(), (page.bands,)
        return self._colours(), ()

    def _colours(self) -> int:
        image = self.pixels(3)
        return 1 if bool((image == image[:1]).all()) else 3

    def crop(self, box: Box, size: tuple[int, int], channels: int = 3, how: Interpolation = "bicubic") -> Tensor:
        """The box at `size`, uint8 [channels, h, w]; a JPEG is decoded only as far as needed."""
        if self.header is not None and self.header.components in (1, 3) and channels in (1, 3):
            try:
                return self._crop_jpeg(self.header, self.measure(), box, size, channels, how)
            except ValueError:
                pass
        top, left, height, width = box
        return resize(self._decoded(channels)[:, top : top + height, left : left + width], size, how)

    def _crop_jpeg(
        self,
        header: jpeg.Header,
        upright: tuple[int, int],
        box: Box,
        size: tuple[int, int],
        channels: int,
        how: Interpolation,
    ) -> Tensor:
        scale = jpeg.scale_for(box[2], box[3], size)
        top, left, height, width = jpeg.unturn_box(box, *upright, header.orientation)
        image = jpeg.decode_scaled(self.data, header, channels == 1, scale, rows=top + height)
        top, left = min(round(top / scale), image.shape[1] - 1), min(round(left / scale), image.shape[2] - 1)
        height, width = max(1, round(height / scale)), max(1, round(width / scale))
        image = image[:, top : top + height, left : left + width]
        return resize(jpeg.turn(image, header.orientation), size, how)

    def measure(self, channels: int = 3) -> tuple[int, int]:
        """(height, width); decodes the image if there is no other way."""
        if self.size is None:
            self.size = tuple(self._decoded(channels).shape[-2:])  # type: ignore[assignment]
        assert self.size is not None
        return self.size

    def _decoded(self, channels: int) -> Tensor:
        """All pixels, by any decoder but the one for plain JPEGs."""
        if self.image is not None and self.image.shape[0] == channels:
            return self.image
        try:
            self.image = self._decode(channels)
        except UserError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise self._bad(_reason(error)) from None
        return self.image

    def _decode(self, channels: int) -> Tensor:
        if self.data.startswith(pixels.NUMPY):
            array = pixels.read_array(self.data)
            self.source = pixels.source_of(array)
            return pixels.from_array(array, channels)
        if self.data[:4] in tiff.MAGIC:
            pages = tiff.pages(self.data)
            if pages[0].sparse:
                raise ValueError("some of its strips or tiles are left out (it is sparse): save it with all of them")
            whole = [page for page in pages if not page.reduced]
            if channels not in (1, 3) and len(whole) == channels and all(page.bands == 1 for page in whole):
                return torch.cat([self._bands(page, 1) for page in whole])
            image = self._open(channels) if pages[0].plain else self._bands(pages[0], channels)
            self.source = self.source._replace(pages=len(whole))
            return image
        return self._open(channels)

    def _open(self, channels: int) -> Tensor:
        """Decodes with Pillow."""
        try:
            with warnings.catch_warnings():
                # Pillow warns at half of the limit that is checked below.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = open_with_pillow(self.data)
        except Image.DecompressionBombError:
            raise self._bad(f"it declares more than {MAX_PIXELS:,} pixels, the limit") from None
        with image:
            self._check_size((image.height, image.width))
            if (values := pixels.deep(image)) is not None:
                self.source = pixels.source_of(values)
            found = pixels.from_pil(image, channels)
            if self.data.startswith(PNG) and self.data[24] == 16 and values is None:
                # Pillow reads only the upper 8 bits of 16-bit colour.
                self.source = pixels.Source("uint16", int(found.max()) << 8 | 255)
            return found

    def _bands(self, page: tiff.Page, channels: int) -> Tensor:
        """Decodes a page of a TIFF by its own tags."""
        samples = self._samples(page)
        image = jpeg.turn(torch.from_numpy(pixels.scaled(samples)).permute(2, 0, 1), page.orientation)
        if page.bands != channels and page.declares_alpha:
            if (reason := pixels.why_no_mask(samples[..., -1], page.bands)) is not None:
                raise ValueError(reason)
            self.source = self.source._replace(masked=f"{self.name} ({page.bands} bands)")
            image = pixels.on_white(image, page.premultiplied)
        return pixels.with_channels(image, channels)

    def _samples(self, page: tiff.Page) -> np.ndarray:
        self._check_size((page.height, page.width))
        samples = tiff.read(self.data, page)
        self.source = pixels.source_of(samples)
        return samples

    def _check_size(self, size: tuple[int, int]) -> None:
        if size[0] * size[1] > MAX_PIXELS:
            raise self._bad(f"it declares {size[1]}x{size[0]} pixels, above the limit of {MAX_PIXELS:,}")

    def _bad(self, reason: str) -> BadImage:
        return BadImage(f"{self.name}: {' '.join(reason.split())}")


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, UnidentifiedImageError):
        return "the bytes are no image"
    if isinstance(error, EOFError | IndexError) or "truncated" in text or "eof" in text or "cut" in text:
        return "the file is cut off"
    if isinstance(error, ValueError):  # most come from vitrail, and say what to do
        return str(error)
    return f"the file is damaged ({str(error) or type(error).__name__})"


def opened_by_pil(image: Image.Image) -> EncodedImage | None:
    """The file of an image that PIL has opened but not loaded, at its first page; None for others.

    Loading would keep all pixels in the caller's object, and PIL drops bands of some TIFFs.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None or image.tell() != 0:
        return None
    try:
        place = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(place)
    except (OSError, ValueError):  # closed, or not seekable
        return None
    opened = EncodedImage(data, str(getattr(image, "filename", "")) or None)
    drafted = opened.header is not None and sorted(opened.size or ()) != sorted(image.size)
    return None if drafted or (image.mode == "L" and opened.header and opened.header.components == 3) else opened


def decode(
    data: bytes | str | Path, channels: int = 3, at_least: tuple[int, int] | None = None, name: str | None = None
) -> Tensor:
    """Decode an image file to uint8 [channels, H, W], upright. Its content decides the format, not its name.

    For values of types other than uint8 see `vitrail.data.pixels`; TIFFs and arrays may have any number of channels.
    With `at_least` (height, width) a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but not smaller than that.
    Raises BadImage, which names the file (or `name`) and the reason.
    """
    return EncodedImage(data, name).pixels(channels, at_least)
