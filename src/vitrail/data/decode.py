"""Bytes to pixels, and pixels to what a model takes. Pictures are uint8 [C, H, W] until they are normalised."""

from __future__ import annotations

import io
import logging
import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vitrail.data import jpeg, pixels
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

MAX_PIXELS = 178_956_970
"""A picture declared larger is refused before it is decoded: a small file can declare a size that fills the memory.
It is the size that Pillow refuses, half a gigabyte in RGB."""

MAX_CHANNELS = 4096
"""of a picture; hyperspectral ones have some hundred"""

Box = tuple[int, int, int, int]
"""top, left, height, width in pixels of the upright picture"""
Resize = Literal["crop", "squash"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]


class BadPicture(UserError):
    """Bytes that are no picture, or not all of one. The line names the file."""


@dataclass(frozen=True)
class Preprocess:
    """What stands between a picture and the model; it is kept inside the checkpoint."""

    size: tuple[int, int] = (224, 224)
    """(height, width) in pixels that the model gets"""
    resize: Resize = "crop"
    """crop: resize until `size` / `crop_fraction` is covered; squash: resize to just that; then cut the centre out"""
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = ()
    """a channel each, for pixels of 0 to 1; empty for 0.5"""
    std: tuple[float, ...] = ()
    channels: int = 3

    def __post_init__(self) -> None:
        # A config is a file from outside, so nothing is made by its numbers before they are known to be some.
        if not isinstance(self.channels, int) or not 0 < self.channels <= MAX_CHANNELS:
            raise ValueError(f"channels must be a number from 1 to {MAX_CHANNELS}, got {self.channels!r}")
        for name, empty in (("size", ()), ("mean", (0.5,) * self.channels), ("std", (0.5,) * self.channels)):
            # JSON has lists for tuples.
            object.__setattr__(self, name, tuple(getattr(self, name)) or empty)
        for value in (self.crop_fraction, *self.size, *self.mean, *self.std):
            if not isinstance(value, int | float) or not -1e6 < value < 1e6:
                raise ValueError(f"{value!r} is no number that fits")
        if self.resize not in get_args(Resize) or self.interpolation not in get_args(Interpolation):
            raise ValueError(f"no resize {self.resize!r} with interpolation {self.interpolation!r}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} need {self.channels} numbers, one a channel")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be above 0 and at most 1, got {self.crop_fraction}")
        if len(self.size) != 2 or min(self.size) < 1 or not all(isinstance(pixels, int) for pixels in self.size):
            raise ValueError(f"size must be a height and a width in pixels, got {self.size}")

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """A picture of any size (PIL; or uint8, uint16 or 0-to-1 float [C, H, W]) to a normalised [C, H, W]."""
        return self.normalise(self.fit(image))

    def fit(self, image: Image.Image | Tensor) -> Tensor:
        """A picture, or with tensors a batch, at `size`: uint8 [..., C, h, w], not yet normalised."""
        try:
            if isinstance(image, Tensor):
                if image.ndim < 3:
                    raise ValueError(f"expected [C, H, W], got {list(image.shape)}")
                image = pixels.with_channels(pixels.to_bytes(image), self.channels)
            else:
                image = pixels.from_pil(image, self.channels)
        except ValueError as error:
            raise UserError(f"the picture does not fit the model: {error}") from None
        self.check(image)
        height, width = self.resized(image.shape[-2], image.shape[-1])
        image = resize(image, (height, width), self.interpolation)
        top, left = round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)
        return image[..., top : top + self.size[0], left : left + self.size[1]]

    def check(self, image: Tensor) -> None:
        """Raise BadPicture for [..., C, H, W] so long and thin that it would fill the memory on its way to `size`."""
        height, width = self.resized(image.shape[-2], image.shape[-1])
        if height * width > MAX_PIXELS:
            raise BadPicture(
                f"the picture is {image.shape[-1]}x{image.shape[-2]}: too long and thin, since its shorter side "
                f"brought to {min(height, width)} makes more than {MAX_PIXELS:,} pixels"
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """What a picture of `height` x `width` is resized to before its centre is cut out."""
        # 384 / (384 / 438) is a little less than 438.
        h, w = (math.floor(round(pixels / self.crop_fraction, 6)) for pixels in self.size)
        if self.resize == "squash":
            return h, w
        # torchvision and timm round the longer side down.
        return (h, max(w, int(h * width / height))) if h * width >= w * height else (int(w * height / width), w)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [..., C, H, W] on any device to float32."""
        mean, std = (
            # Made on the processor: a tensor made on a GPU from numbers waits for all that the GPU has yet to do.
            (torch.tensor(values)[:, None, None] * 255).to(images.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        # In place: a fresh tensor for each step takes twice the time.
        return images.to(torch.float32, copy=True).sub_(mean).div_(std)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `as_dict`. A config is a file from outside, so a wrong field is a UserError."""
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise UserError(f"preprocessing {values} is not understood ({error}); its fields are {known}") from None


def resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """uint8 [..., C, H, W] at another size; every source pixel counts where it shrinks (antialias)."""
    if image.shape[-2:] == size:
        return image
    batch = image.reshape(-1, *image.shape[-3:])
    if interpolation == "nearest":
        batch = F.interpolate(batch, size=size, mode="nearest-exact")
    elif image.device.type == "cpu":
        batch = F.interpolate(batch, size=size, mode=interpolation, antialias=True)
    else:
        # Only the CPU has this resize for uint8.
        exact = F.interpolate(batch.float(), size=size, mode=interpolation, antialias=True)
        batch = exact.round_().clamp_(0, 255).to(torch.uint8)
    return batch.reshape(*image.shape[:-2], *size)


class Picture:
    """A picture whose header is read and whose pixels are not, so that a crop can be chosen by its size."""

    def __init__(self, data: bytes | Path, name: str | None = None) -> None:
        self.name = name or (str(data) if isinstance(data, Path) else "picture")
        if isinstance(data, Path):
            try:
                data = data.read_bytes()
            except OSError as error:
                raise self._bad(error.strerror or str(error)) from None
        if not data:
            raise self._bad("the file is empty")
        self.data = data
        self.header = jpeg.read_header(data)
        self.image: Image.Image | Tensor | None = None
        self.size: tuple[int, int] | None = None
        """(height, width), upright; None where only decoding tells"""
        if self.header is not None:
            upright = (self.header.height, self.header.width)
            self.size = upright[::-1] if self.header.orientation >= 5 else upright
            if jpeg.is_cut(data, self.header):
                raise self._bad("the file is cut off")
            self._check_size(self.size)

    def pixels(self, channels: int = 3, at_least: tuple[int, int] | None = None) -> Tensor:
        """uint8 [channels, H, W]; of a JPEG any scale of 1, 1/2, 1/4, 1/8 that is not smaller than `at_least`."""
        if self.header is not None and self.header.components in (1, 3) and channels in (1, 3):
            stored = (self.header.height, self.header.width)
            if at_least is not None and self.header.orientation >= 5:
                at_least = at_least[::-1]
            scale = jpeg.scale_for(*stored, at_least) if at_least else 1
            try:
                image = jpeg.decode_scaled(self.data, self.header, channels == 1, scale)
                return jpeg.turn(image, self.header.orientation)
            except ValueError:
                pass  # Pillow reads some kinds that this decoder does not, and names what is wrong with the rest
        return self._other(channels)

    def crop(self, box: Box, size: tuple[int, int], channels: int = 3, how: Interpolation = "bicubic") -> Tensor:
        """The box at `size`, uint8 [channels, h, w], from a JPEG decoded no further than that needs."""
        if self.header is not None and self.header.components in (1, 3) and channels in (1, 3):
            try:
                return self._crop_jpeg(self.header, self.measure(), box, size, channels, how)
            except ValueError:
                pass
        top, left, height, width = box
        return resize(self._other(channels)[:, top : top + height, left : left + width], size, how)

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
        """(height, width), decoding where there is no other way."""
        if self.size is None:
            self.size = tuple(self._other(channels).shape[-2:])  # type: ignore[assignment]
        assert self.size is not None
        return self.size

    def _other(self, channels: int) -> Tensor:
        """All pixels of anything that is no plain JPEG."""
        if isinstance(self.image, Tensor) and self.image.shape[0] == channels:
            return self.image
        try:
            self.image = self._decode(channels)
        except UserError:
            raise
        except Exception as error:  # decoders of broken bytes raise nearly anything
            raise self._bad(_reason(error)) from None
        return self.image

    def _decode(self, channels: int) -> Tensor:
        if self.data[:6] == b"\x93NUMPY":
            return pixels.from_array(self.data, channels)
        try:
            with warnings.catch_warnings():
                # Pillow warns at half of the limit that is checked below.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(self.data))
        except UnidentifiedImageError:
            if self.data[:4] in pixels.TIFF:
                return pixels.with_channels(pixels.from_bands(self.data), channels)
            raise
        except Image.DecompressionBombError:
            raise self._bad(f"it declares more than {MAX_PIXELS:,} pixels, the limit") from None
        with image:
            self._check_size((image.height, image.width))
            return pixels.from_pil(image, channels)

    def _check_size(self, size: tuple[int, int]) -> None:
        if size[0] * size[1] > MAX_PIXELS:
            raise self._bad(f"it declares {size[1]}x{size[0]} pixels, above the limit of {MAX_PIXELS:,}")

    def _bad(self, reason: str) -> BadPicture:
        return BadPicture(f"{self.name}: {' '.join(reason.split())}")


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, UnidentifiedImageError):
        return "the bytes are no picture"
    if isinstance(error, EOFError | IndexError) or "truncated" in text or "eof" in text or "cut" in text:
        return "the file is cut off"
    return str(error) or type(error).__name__


def decode(
    data: bytes | Path, channels: int = 3, at_least: tuple[int, int] | None = None, name: str | None = None
) -> Tensor:
    """A picture file to uint8 [channels, H, W], upright, by its content and not its name.

    With `at_least` (height, width) a JPEG may come at 1/2, 1/4 or 1/8 of its size, not smaller than that.
    Raises BadPicture, which names the file (or `name`) and the reason.
    """
    return Picture(data, name).pixels(channels, at_least)
