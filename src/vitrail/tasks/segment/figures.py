"""Figures of segmentations: the classes as colours over the image, with a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from vitrail.tasks.figures import Page

STRENGTH = 0.55
"""weight of the colours; the image has the rest"""


def colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that are easy to tell apart: hues by the golden angle, in three brightnesses."""
    found = []
    for i in range(count):
        value, saturation = ((0.95, 0.85), (0.7, 0.6), (0.85, 0.4))[i % 3]
        red, green, blue = colorsys.hsv_to_rgb(i * 0.61803398875 % 1, saturation, value)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def overlay(image: Image.Image, mask: Tensor, classes: int) -> Image.Image:
    """The image in RGB under the colours of a mask [H, W] of class numbers; other numbers leave it unchanged."""
    small = Image.fromarray(mask.numpy().astype(np.int32)).resize(image.size, Image.Resampling.NEAREST)
    numbers = np.asarray(small)
    known = (numbers >= 0) & (numbers < classes)
    table = np.array([*colours(classes), (0, 0, 0)], dtype=np.float32)
    paint = table[np.where(known, numbers, classes)]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    mixed = np.where(known[..., None], pixels * (1 - STRENGTH) + paint * STRENGTH, pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def with_legend(image: Image.Image, entries: Sequence[tuple[int, str]], classes: int) -> Image.Image:
    """The image with a coloured square and a text for each class number, as many per row as fit."""
    page = Page(image, "".join(text for _, text in entries))
    table, square, gap = colours(classes), page.size, page.size // 2
    places: list[tuple[int, int]] = []
    left, row = page.margin, 0
    for _, text in entries:
        width = square + gap + page.length(text) + 2 * gap
        if left > page.margin and left + width > page.width - page.margin:
            left, row = page.margin, row + 1
        places.append((left, row))
        left += width
    line = round(1.25 * page.line)
    figure, draw = page.with_room((row + 1) * line if entries else 0)
    for (number, text), (left, row) in zip(entries, places, strict=True):
        _entry(page, draw, table[number], text, left, page.below + row * line, square, gap)
    return figure


def _entry(
    page: Page,
    draw: ImageDraw.ImageDraw,
    colour: tuple[int, int, int],
    text: str,
    left: int,
    top: int,
    square: int,
    gap: int,
) -> None:
    draw.rectangle((left, top, left + square, top + square), fill=colour, outline="#1f2430")
    page.write(draw, left + square + gap, top, page.shortened(text, page.inner - square - gap))
