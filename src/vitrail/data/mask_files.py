"""Read the numbers or colours of mask files, and map them to classes by look-up tables."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrail.data import jpeg
from vitrail.data.class_lists import Colour
from vitrail.data.decode import MAX_PIXELS, BadImage

LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")
LOSSY = ("JPEG", "WEBP")
"""formats that are opened only to explain the error"""
TIFF_BITS = 258
"""the tag of a TIFF's bits per sample"""
INDEXED = ("1", "L", "P", "I;16", "I;16B", "I")
"""Pillow's modes with one number per pixel"""
VOID, UNKNOWN = -1, -2
"""results of a look-up that are no class"""
Array = NDArray[Any]


class Raw(NamedTuple):
    """A mask file as stored, upright."""

    values: Array
    """the number of each pixel, [H, W], or its colour, uint8 [H, W, 3]"""
    palette: Array | None = None
    """uint8 [n, 3], if the numbers are places in it"""


class Drawing(ABC):
    """A mask that is drawn from annotations when it is read."""

    @abstractmethod
    def draw(self) -> Array:
        """Class numbers or VOID, [H, W]. Raises BadImage."""


Item = Path | bytes | Tensor | Drawing | None
"""a mask: a file, its bytes, numbers [H, W], annotations, or None where an image has no mask"""


@dataclass(frozen=True)
class Coding:
    """Which class, or VOID, each number and each colour of a set's masks means."""

    numbers: Mapping[int, int]
    colours: Mapping[Colour, int] = field(default_factory=dict)
    """{} if the class list has no colours"""

    @classmethod
    def plain(cls, classes: int, void: int) -> Coding:
        """The numbers of the classes mean themselves."""
        return cls({**{i: i for i in range(classes)}, void: VOID})

    def classes_of(self, raw: Raw, name: str) -> Array:
        """Class numbers or VOID, [H, W]. Raises BadImage for numbers and colours of no class."""
        if raw.values.ndim == 3:
            found = look_up(packed(raw.values), self._by_code)
        else:
            found = _by_table(raw.values, self._numbers_of(raw, name))
        if (wrong := found == UNKNOWN).any():
            row, column = divmod(int(wrong.argmax()), wrong.shape[1])
            value = raw.values[row, column]
            remedy = ": add it there, with the name void if it means no class" * value.ndim
            raise BadImage(f"{name}: {self._reason(value)}, at row {row}, column {column}{remedy}")
        return found

    @cached_property
    def _by_code(self) -> Mapping[int, int]:
        return {r | g << 8 | b << 16: number for (r, g, b), number in self.colours.items()}

    def _numbers_of(self, raw: Raw, name: str) -> Mapping[int, int]:
        """The classes of the numbers of a file, which may stand for colours of the class list.

        Raises BadImage if only some of its colours are listed, and their classes are not those of their numbers.
        """
        if not self.colours:
            return self.numbers
        if raw.palette is None:  # grey levels, if the list has nothing else
            grey = all(r == g == b for r, g, b in self.colours)
            return (
                {**self.numbers, **{r: number for (r, _, _), number in self.colours.items()}} if grey else self.numbers
            )
        seen = np.zeros(256, dtype=bool)
        seen[raw.values] = True
        # A tool that saves colours as a palette numbers them as it likes; a ramp of greys is no palette of classes.
        shown = {int(i): (int(r), int(g), int(b)) for i, (r, g, b) in enumerate(raw.palette) if seen[i]}
        ramp = all(colour == (i, i, i) for i, colour in shown.items())
        listed = {i: self.colours[colour] for i, colour in shown.items() if colour in self.colours}
        void = {i: VOID for i in np.flatnonzero(seen).tolist() if i not in listed and self.numbers.get(i) == VOID}
        if ramp or not listed:
            return self.numbers
        if len(listed) + len(void) == seen.sum():
            return {**listed, **void}
        if any(self.numbers.get(i) != number for i, number in listed.items()):
            raise BadImage(
                f"{name}: its palette has some colours of the class list, for other numbers, and not the rest"
            )
        return self.numbers

    def _reason(self, value: Array) -> str:
        if value.ndim:
            r, g, b = value.tolist()
            return f"the colour {r} {g} {b} is of no class in the list"
        count, void = len({*self.numbers.values()} - {VOID}), [n for n, c in self.numbers.items() if c == VOID]
        deep = " (a 16-bit mask)" if int(value) > 255 else ""
        return (
            f"a pixel has the number {int(value)}{deep}, but there are {count} classes, from "
            f"{min(n for n, c in self.numbers.items() if c != VOID)}, and void is {', '.join(map(str, void))}"
        )


def _by_table(values: Array, numbers: Mapping[int, int]) -> Array:
    """The class of each number, through a table."""
    inside = {n: c for n, c in numbers.items() if 0 <= n < 1 << 16}
    size = max(256, max(inside, default=0) + 1)
    table = np.full(size + 1, UNKNOWN, dtype=_kind(numbers))
    table[[*inside]] = [*inside.values()]
    # The last entry is for numbers beyond the table, which bytes cannot be.
    found: Array = table[values if values.dtype == np.uint8 else np.clip(values, -1, size)]
    for n in numbers.keys() - inside.keys():
        found[values == n] = numbers[n]
    return found


def _kind(numbers: Mapping[int, int]) -> type[np.int16] | type[np.int32]:
    return np.int16 if max(numbers.values()) < 1 << 15 else np.int32


def packed(colours: Array) -> Array:
    """Colours, uint8 [H, W, 3], as one number each, R + 256 G + 65536 B, [H, W]."""
    padded = np.zeros((*colours.shape[:2], 4), dtype=np.uint8)
    padded[..., :3] = colours
    codes: Array = padded.view("<u4")[..., 0]
    return codes


def look_up(codes: Array, known: Mapping[int, int]) -> Array:
    """The number of each code, [H, W]; UNKNOWN for other codes.

    Neighbours are mostly equal, so one entry per run of equal codes is searched.
    """
    flat = codes.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    heads = flat[starts]
    keys = np.array(sorted(known), dtype=flat.dtype)
    numbers = np.array([known[key] for key in keys.tolist()], dtype=_kind(known))
    at = np.searchsorted(keys, heads).clip(max=len(keys) - 1)
    found = np.where(keys[at] == heads, numbers[at], numbers.dtype.type(UNKNOWN))
    return np.repeat(found, np.diff(np.append(starts, flat.size))).reshape(codes.shape)


def read_mask(data: Path | bytes, name: str, coloured: bool = False) -> Raw:
    """The numbers in an image file with one channel or a palette, or its colours if `coloured`. Raises BadImage."""
    try:
        file = io.BytesIO(data.read_bytes() if isinstance(data, Path) else data)
        with Image.open(file, formats=LOSSLESS + LOSSY) as image:
            if reason := _no_mask(image, coloured):
                raise BadImage(f"{name}: {reason}")
            orientation = jpeg.orientation_of(image.getexif)
            if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
                raise BadImage(f"{name}: pixels of the mask are transparent: save it without an alpha channel")
            palette = image.getpalette("RGB") if image.mode == "P" else None
            # Pillow scales grey of two and four bits to 0 to 255.
            step = {2: 85, 4: 17}.get(_bits(image, file.getvalue()), 1) if image.mode == "L" else 1
            values = np.array(image)[..., :3] if image.mode == "RGBA" else np.array(image)
    except OSError as error:
        reason = error.strerror or "it is no image in a lossless format such as PNG, or it is cut off"
        raise BadImage(f"{name}: {reason}") from None
    except BadImage:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImage(f"{name}: the mask is damaged ({' '.join(str(error).split())})") from None
    if values.dtype == bool:
        values = values.astype(np.uint8)
    values = values // step if step > 1 else values
    if orientation > 1:
        turned = torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1)
        values = jpeg.turn(turned, orientation).permute(1, 2, 0).numpy()
        values = values if values.shape[2] == 3 else values[..., 0]
    return Raw(values, None if palette is None else np.array(palette, dtype=np.uint8).reshape(-1, 3))


def _no_mask(image: Image.Image, coloured: bool) -> str | None:
    """Why an opened image cannot be a mask, or None."""
    if image.format not in LOSSLESS:
        return f"a mask must be in a lossless format such as PNG; {image.format} changes its numbers"
    if image.mode not in INDEXED and not (coloured and image.mode in ("RGB", "RGBA")):
        return (
            f"a mask must have one whole number per pixel, in one channel or a palette; this is {image.mode}"
            + ": put a class list with colours beside the masks, label_colors.txt with a line `name r g b` per class"
            * (image.mode in ("RGB", "RGBA"))
        )
    if image.width * image.height > MAX_PIXELS:
        return f"it declares {image.width}x{image.height} pixels, above the limit of {MAX_PIXELS:,}"
    return None


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per pixel of a grey image as stored."""
    if image.format == "PNG":
        return data[24]
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(TIFF_BITS, (8,))[0])
