"""Index masks, as a target: the class of every pixel, in one file or tensor per image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.data import jpeg
from vitrail.data.affine import Affine
from vitrail.data.decode import MAX_PIXELS, BadImage
from vitrail.data.targets import Target
from vitrail.errors import UserError

LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")
LOSSY = ("JPEG", "WEBP")
"""formats that are opened only to explain the error"""
TIFF_BITS = 258
"""the tag of a TIFF's bits per sample"""
INDEXED = ("1", "L", "P", "I;16", "I;16B", "I")
"""Pillow's modes with one number per pixel; the colours of a palette (P) are ignored"""


class Mask(NamedTuple):
    """The mask of one image as read."""

    name: str
    indices: Tensor
    """uint8 or int32 [H, W]: class numbers, or void"""


class Masks(Target):
    """Index masks, as files (their paths or bytes) or integer tensors [H, W], each of the size of its upright image.

    In a batch: `mask` int64 [B, h, w], by nearest neighbour. It is `void`, which losses and scores ignore, where the
    mask is void, outside the image, and in the reflection that a shift adds.
    """

    fields = ("mask",)
    spatial = True
    noun = "masks"

    def __init__(
        self, items: Sequence[Path | bytes | Tensor] | Tensor, names: Sequence[str], classes: list[str], void: int = 255
    ) -> None:
        if len(items) != len(names):
            raise ValueError(f"{len(items)} masks have {len(names)} names")
        if 0 <= void < len(classes):
            raise UserError(f"void is {void}, the number of the class {classes[void]}: choose another number")
        self.items, self.names, self.classes, self.void = items, names, classes, void
        self._kind = torch.uint8 if len(classes) <= 256 and 0 <= void < 256 else torch.int32

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, places: Tensor) -> Self:
        chosen = places.tolist()
        return type(self)([self.items[i] for i in chosen], [self.names[i] for i in chosen], self.classes, self.void)

    def joined(self, other: Self) -> Self:
        items = [*self.items, *other.items]
        return type(self)(items, [*self.names, *other.names], self.classes, self.void)

    def marks(self) -> bytes:
        """The masks' names, or the masks themselves if they are tensors. Files are not read."""
        rows = [
            item.cpu().numpy().tobytes() if isinstance(item, Tensor) else name.encode(errors="surrogateescape")
            for item, name in zip(self.items, self.names, strict=True)
        ]
        return b"\0".join([str(self.void).encode(), *rows])

    def read(self, i: int) -> Mask:
        """Raises BadImage, which names the mask, for a file that is no mask and for numbers of no class."""
        item, name = self.items[i], self.names[i]
        indices = item.to("cpu", torch.int32) if isinstance(item, Tensor) else read_mask(item, name)
        known = indices[indices != self.void]
        if len(known) and not 0 <= int(known.min()) <= int(known.max()) < len(self.classes):
            wrong = int(known.min()) if int(known.min()) < 0 else int(known.max())
            raise BadImage(
                f"{name}: a pixel has the number {wrong}, but there are {len(self.classes)} classes, from 0, and void "
                f"is {self.void}"
            )
        return Mask(name, indices.to(self._kind))

    def warp(self, value: Mask, affine: Affine) -> Tensor:
        """The mask in each frame of its image, [F, h, w]. Raises BadImage if it does not have the image's size."""
        try:
            return affine.masks(value.indices, self.void)
        except ValueError as error:
            raise BadImage(f"{value.name}: {error} (upright): they must be of one size") from None

    def collate(self, values: list[Tensor], samples: Tensor, training: bool) -> dict[str, Any]:
        return {"mask": torch.cat(values).to(samples.device, non_blocking=True).long()}

    def mix(self, fields: dict[str, Any], partner: Tensor, share: Tensor) -> dict[str, Any]:
        raise UserError("masks cannot follow mixup or cutmix, which join two images: set --mixup 0 and --cutmix 0")

    @classmethod
    def rescale(cls, fields: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        mask = fields["mask"]
        rows, columns = (
            ((2 * torch.arange(new, device=mask.device) + 1) * old).div(2 * new, rounding_mode="floor")
            for new, old in zip(size, mask.shape[-2:], strict=True)
        )
        return {**fields, "mask": mask[:, rows[:, None], columns]}


def read_mask(data: Path | bytes, name: str) -> Tensor:
    """The numbers in an image file with one channel or a palette, upright, int32 [H, W]. Raises BadImage."""
    try:
        file = io.BytesIO(data.read_bytes() if isinstance(data, Path) else data)
        with Image.open(file, formats=LOSSLESS + LOSSY) as image:
            if reason := _no_mask(image):
                raise BadImage(f"{name}: {reason}")
            orientation = jpeg.orientation_of(image.getexif)
            # Pillow scales grey of two and four bits to 0 to 255.
            step = {2: 85, 4: 17}.get(_bits(image, file.getvalue()), 1) if image.mode == "L" else 1
            numbers = torch.from_numpy(np.array(image).astype(np.int32) // step)
    except OSError as error:
        reason = error.strerror or "it is no image in a lossless format such as PNG, or it is cut off"
        raise BadImage(f"{name}: {reason}") from None
    except BadImage:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImage(f"{name}: the mask is damaged ({' '.join(str(error).split())})") from None
    return jpeg.turn(numbers, orientation)


def _no_mask(image: Image.Image) -> str | None:
    """Why an opened image cannot be a mask, or None."""
    if image.format not in LOSSLESS:
        return f"a mask must be in a lossless format such as PNG; {image.format} changes its numbers"
    if image.mode not in INDEXED:
        return f"a mask must have one whole number per pixel, in one channel or a palette; this is {image.mode}"
    if image.width * image.height > MAX_PIXELS:
        return f"it declares {image.width}x{image.height} pixels, above the limit of {MAX_PIXELS:,}"
    return None


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per pixel of a grey image as stored."""
    if image.format == "PNG":
        return data[24]
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(TIFF_BITS, (8,))[0])
