"""Decode a JPEG only as far as a crop needs: at 1/8, 1/4 or 1/2 of the size, and no rows below the crop.

The decoder is libjpeg-turbo through `simplejpeg`. An inverse cosine transform of fewer coefficients gives a smaller
image for less work, each pixel the mean of a square of 2, 4 or 8 pixels. To skip the rows below the crop, a smaller
height is written into a copy of the header: the decoder stops there and skips to the end of the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

ORIENTATION = 0x0112
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive Huffman
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers that no length follows


@dataclass(frozen=True)
class Header:
    """The header of a JPEG."""

    height: int
    width: int
    components: int
    sequential: bool
    """baseline with all components in one scan: rows come in order, so that decoding can stop early"""
    row: int
    """height of a row of blocks in pixels"""
    frame: int
    """offset of the two bytes of the height in the file"""
    scan: int
    """offset of the first scan in the file"""
    orientation: int


def read_header(data: bytes) -> Header | None:
    """Read the markers up to the first scan. None for anything unusual, which is left to Pillow."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame: tuple[int, ...] | None = None
    row, at, orientation = 8, 2, 1
    try:
        while True:
            marker = data[at + 1]
            if data[at] != 0xFF:
                return None
            if marker == 0xFF or marker in _ALONE:
                at += 1 if marker == 0xFF else 2
                continue
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            if marker in _FRAMES:
                depth, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
                row = 8 * max(data[at + 11 + 3 * i] & 15 for i in range(components))
                if depth != 8 or not height or not width:
                    return None
                frame = (marker, height, width, components, at + 5)
            elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _orientation(data[at + 4 : at + 2 + length])
            elif marker == 0xDA:
                break
            elif marker == 0xD9:
                return None
            at += 2 + length
    except (IndexError, struct.error, ValueError):
        return None
    if frame is None:
        return None
    marker, height, width, components, position = frame
    sequential = marker != 0xC2 and data[at + 4] == components
    return Header(height, width, components, sequential, row, position, at, orientation)


def _orientation(segment: bytes) -> int:
    def load() -> Image.Exif:
        exif = Image.Exif()
        exif.load(segment)
        return exif

    return orientation_of(load)


def orientation_of(load: Callable[[], Image.Exif]) -> int:
    """EXIF's orientation, 1 to 8, from the block that `load` returns; 1 if there is none."""
    try:
        value = load().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def is_cut(data: bytes, header: Header) -> bool:
    """Whether the end marker is missing. Its two bytes cannot occur inside a scan."""
    return data.rfind(b"\xff\xd9", header.scan) < 0


def scale_for(height: int, width: int, at_least: tuple[int, int]) -> int:
    """The largest of 1, 2, 4 and 8 by which `height` x `width` can be divided and not be smaller than `at_least`."""
    ratio = min(height / at_least[0], width / at_least[1])
    return next((scale for scale in (8, 4, 2) if scale <= ratio), 1)


def decode_scaled(data: bytes, header: Header, grey: bool, scale: int = 1, rows: int | None = None) -> Tensor:
    """Decode at least the first `rows` rows, at 1/`scale` of the size, to uint8 [1 or 3, h, w] (a strided view).

    Raises ValueError for what libjpeg-turbo cannot read.
    """
    height = header.height
    if rows is not None and header.sequential:
        # One more row of blocks, since the smooth upsampling of colours reads the next one.
        height = min(height, (math.ceil(rows / header.row) + 1) * header.row)
        if height < header.height:
            copy = bytearray(data)
            copy[header.frame : header.frame + 2] = height.to_bytes(2, "big")
            data = bytes(copy)
    pixels: np.ndarray = simplejpeg.decode_jpeg(
        data,
        "GRAY" if grey else "RGB",
        min_height=math.ceil(height / scale),
        min_width=math.ceil(header.width / scale),
        strict=False,  # Pillow too accepts what libjpeg repairs with a warning; `is_cut` finds truncated files
    )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def turn(image: Tensor, orientation: int) -> Tensor:
    """Rotate and flip [..., H, W] to upright, by EXIF's orientation 1 to 8."""
    if orientation >= 5:
        image = image.transpose(-2, -1)
    if orientation in (2, 3, 6, 7):
        image = image.flip(-1)
    if orientation in (3, 4, 7, 8):
        image = image.flip(-2)
    return image


def unturn_box(box: tuple[int, int, int, int], height: int, width: int, orientation: int) -> tuple[int, int, int, int]:
    """Map a box (top, left, height, width) of an upright image of `height` x `width` to the stored image."""
    top, left, h, w = box
    if orientation in (3, 4, 7, 8):
        top = height - top - h
    if orientation in (2, 3, 6, 7):
        left = width - left - w
    return (left, top, w, h) if orientation >= 5 else (top, left, h, w)
