"""Preprocessing: from an image of any size to the model's input. Images are uint8 [C, H, W] until normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.data import pixels
from vitrail.data.affine import Affine
from vitrail.data.decode import MAX_PIXELS, BadImage, EncodedImage, Interpolation, opened_by_pil, resize
from vitrail.data.members import Member
from vitrail.errors import UserError, require_choices

MAX_CHANNELS = 4096
"""of an image; hyperspectral images have a few hundred"""
MARGIN = 2
"""A JPEG is decoded at no less than this many times the size that it is resized to: then scores equal those of full
decoding."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""of the red, green and blue values of ImageNet's photos, from 0 to 1"""

AnyImage = str | Path | bytes | Member | EncodedImage | Image.Image | np.ndarray | Tensor
"""what `Preprocess.prepare` accepts"""
Resize = Literal["crop", "squash", "letterbox"]


def as_list(images: AnyImage | Sequence[AnyImage]) -> Sequence[AnyImage]:
    """The images of a sequence or of a batch of them, [N, H, W, C] or [N, C, H, W]; a single one as a list of one."""
    arrays = isinstance(images, np.ndarray | Tensor)
    one = images.ndim < 4 if arrays else isinstance(images, AnyImage)  # type: ignore[union-attr]
    return [images] if one else images  # type: ignore[list-item,return-value]


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation for so many channels; for other counts than 3 its colours repeat."""
    mean, std = (tuple(numbers[i % 3] for i in range(channels)) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input; stored in the checkpoint."""

    size: tuple[int, int] = (224, 224)
    """(height, width) of the input in pixels"""
    resize: Resize = "crop"
    """crop: resize to cover `size` / `crop_fraction`; squash: resize to exactly that; then crop the centre; letterbox:
    resize to fit in `size`, in the middle of bars in the colour `fill`"""
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = ()
    """per channel, for pixel values of 0 to 1; empty for 0.5"""
    std: tuple[float, ...] = ()
    channels: int = 3

    def __post_init__(self) -> None:
        # A config is a file from outside, so its numbers are checked before anything is allocated by them.
        if not isinstance(self.channels, int) or not 0 < self.channels <= MAX_CHANNELS:
            raise ValueError(f"channels must be a number from 1 to {MAX_CHANNELS}, got {self.channels!r}")
        for name, empty in (("size", ()), ("mean", (0.5,) * self.channels), ("std", (0.5,) * self.channels)):
            # JSON has lists for tuples.
            object.__setattr__(self, name, tuple(getattr(self, name)) or empty)
        for value in (self.crop_fraction, *self.size, *self.mean, *self.std):
            if not isinstance(value, int | float) or not -1e6 < value < 1e6:
                raise ValueError(f"{value!r} is not a number from -1e6 to 1e6")
        require_choices(self)
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} need {self.channels} numbers, one per channel")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be above 0 and at most 1, got {self.crop_fraction}")
        if self.resize == "letterbox" and self.crop_fraction != 1:
            raise ValueError(f"a letterbox shows the whole image, so crop_fraction must be 1, got {self.crop_fraction}")
        if len(self.size) != 2 or min(self.size) < 1 or not all(isinstance(pixels, int) for pixels in self.size):
            raise ValueError(f"size must be a height and a width in pixels, got {self.size}")

    def __call__(self, image: AnyImage) -> Tensor:
        """Anything that `prepare` accepts to a normalised [C, H, W]."""
        return self.normalise(self.prepare(image))

    def prepare(self, image: AnyImage) -> Tensor:
        """An image at `size`, uint8 [C, h, w], not yet normalised. Every path to a model's pixels calls this.

        The image is a file (a path, bytes or an `EncodedImage`), a PIL image, an array [H, W, C] or [H, W] as a `.npy`
        file may hold it, or a tensor [C, H, W] (or a batch [..., C, H, W]). Values are as in `vitrail.data.pixels`. If
        PIL has opened an image but not loaded it, its file is read. If it is loaded, its pixels are used: for a JPEG
        they differ slightly from those of the file, which is decoded only as far as `size` needs. Raises BadImage,
        which names the file, and UserError.
        """
        opened = self.open(image)
        if isinstance(opened, EncodedImage):
            found, size = self.decode(opened), opened.measure(self.channels)
        else:
            found, size = opened, (opened.shape[-2], opened.shape[-1])
            if reason := self.too_thin(*size):
                raise BadImage(f"the image is {reason}")
        height, width = self.resized(*size)
        found = resize(found, (height, width), self.interpolation)
        if self.resize == "letterbox":
            return self.padded(found, *self._corner(height, width))
        top, left = self._corner(height, width)
        return found[..., top : top + self.size[0], left : left + self.size[1]]

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the centre crop in a resized image, or of a letterbox's image in the input."""
        sign = -1 if self.resize == "letterbox" else 1
        return round(sign * (height - self.size[0]) / 2), round(sign * (width - self.size[1]) / 2)

    @property
    def fill(self) -> Tensor:
        """The colour of padding, uint8 [C, 1, 1]: the mean, so that normalising gives 0, to the nearest of 256."""
        return (torch.tensor(self.mean)[:, None, None] * 255).round().clamp(0, 255).to(torch.uint8)

    def padded(self, image: Tensor, top: int, left: int) -> Tensor:
        """uint8 [..., C, h, w] at its place in an input of `size`; the rest has the colour `fill`."""
        if image.shape[-2:] == self.size:
            return image
        whole = self.fill.to(image.device, non_blocking=True).expand(*image.shape[:-2], *self.size).clone()
        whole[..., top : top + image.shape[-2], left : left + image.shape[-1]] = image
        return whole

    def decode(self, image: EncodedImage) -> Tensor:
        """Decode a file to uint8 [C, H, W], with enough pixels for `size`. Raises BadImage."""
        size = image.measure(self.channels)
        if reason := self.too_thin(*size):
            raise BadImage(f"{image.name}: the image is {reason}")
        height, width = self.resized(*size)
        return image.pixels(self.channels, (MARGIN * height, MARGIN * width))

    def open(self, image: AnyImage) -> EncodedImage | Tensor:
        """Any image that `prepare` accepts, as a file with only its header read or as uint8 [..., C, H, W]."""
        if isinstance(image, bytes | str | Path | Member):
            return EncodedImage(image)
        if isinstance(image, EncodedImage):
            return image
        if isinstance(image, Image.Image) and (opened := opened_by_pil(image)) is not None:
            return opened
        try:
            if isinstance(image, Tensor):
                if image.ndim < 3:
                    raise ValueError(f"expected [C, H, W], got {list(image.shape)}")
                return pixels.with_channels(pixels.to_bytes(image), self.channels)
            if isinstance(image, Image.Image):
                return pixels.from_pil(image, self.channels)
            if isinstance(image, np.ndarray):
                return pixels.from_array(pixels.checked_array(image), self.channels)
            raise ValueError(f"expected a file, a PIL image, an array or a tensor, got {type(image).__name__}")
        except ValueError as error:
            raise UserError(f"the image does not fit the model: {error}") from None

    def too_thin(self, height: int, width: int) -> str | None:
        """The reason to refuse an image so long and thin that resizing it would fill the memory; None if it is fine."""
        resized = self.resized(height, width)
        if resized[0] * resized[1] <= MAX_PIXELS:
            return None
        return (
            f"{width}x{height}: too long and thin: resizing its shorter side to {min(resized)} gives more than "
            f"{MAX_PIXELS:,} pixels"
        )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image of `height` x `width` is resized to before the centre crop, or the padding."""
        if self.resize == "letterbox":
            h, w = self.size
            across = h * width >= w * height  # the width decides
            return (max(1, round(w * height / width)), w) if across else (h, max(1, round(h * width / height)))
        # 384 / (384 / 438) is a little less than 438.
        h, w = (math.floor(round(pixels / self.crop_fraction, 6)) for pixels in self.size)
        if self.resize == "squash":
            return h, w
        # torchvision and timm round the longer side down.
        return (h, max(w, int(h * width / height))) if h * width >= w * height else (int(w * height / width), w)

    def affine(self, sources: Tensor) -> Affine:
        """The map from images of these heights and widths, int64 [F, 2], to what `prepare` returns for them.

        It is exact except for a JPEG decoded at 1/2 to 1/8 of its size, whose sides are rounded up to whole pixels of
        that scale: then it may be off by up to half a pixel of the input, at the far edges.
        """
        sizes, which = sources.cpu().unique(dim=0, return_inverse=True)
        resized = torch.tensor([self.resized(height, width) for height, width in sizes.tolist()]).view(-1, 2)
        corners = torch.tensor([self._corner(height, width) for height, width in resized.tolist()]).view(-1, 2)
        if self.resize == "letterbox":
            boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
            return Affine.crop(boxes[which], sources, self.size, torch.cat([corners, resized], dim=1)[which])
        boxes = torch.cat([corners, torch.tensor(self.size).expand(len(sizes), -1)], dim=1)
        return Affine.crop((boxes * (sizes / resized.double()).repeat(1, 2))[which], sources, self.size)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [..., C, H, W] on any device to float32."""
        mean, std = (
            # Created on the CPU: creating a tensor from numbers on a GPU waits for all its pending work.
            (torch.tensor(values)[:, None, None] * 255).to(images.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        # In place: a new tensor for each step takes twice the time.
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
            raise UserError(f"preprocessing {values} is invalid ({error}); its fields are {known}") from None
