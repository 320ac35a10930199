"""Figures of predictions, shared by tasks: an image with text or bars below it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from vitrail.fonts import fonts_for

WIDTH = 360
"""minimum width of a figure in pixels, so that text below a small image is readable"""
INK, PALE = "#1f2430", "#5b6270"
BAR, OTHER_BAR, TRACK = "#2563a8", "#9db8d9", "#eef0f4"
MAX_LINES = 12
"""maximum number of lines of a text"""
MAX_LETTERS = 2_000
"""maximum number of letters of a text"""


def with_text(image: Image.Image, text: str) -> Image.Image:
    """The image in RGB with `text` below it."""
    page = Page(image, text := text[:MAX_LETTERS])
    lines = page.wrapped(text, page.inner)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], page.shortened(f"{lines[MAX_LINES - 1]} {lines[MAX_LINES]}", page.inner)]
    figure, draw = page.with_room(len(lines) * page.line)
    for number, line in enumerate(lines):
        page.write(draw, page.margin, page.below + number * page.line, line)
    return figure


def with_bars(image: Image.Image, bars: Sequence[tuple[str, float]]) -> Image.Image:
    """The image in RGB with one bar per name below it, for values from 0 to 1; the first is highlighted."""
    page = Page(image, "".join(name for name, _ in bars))
    height = round(1.25 * page.line)
    figure, draw = page.with_room(max(1, len(bars)) * height)
    number_width = page.length("100.0 %")
    widest = max((page.length(name) for name, _ in bars), default=0)
    name_width = min(widest, round(0.5 * page.inner))
    start = page.margin + name_width + page.margin
    end = page.width - page.margin - number_width - page.margin
    for place, (name, share) in enumerate(bars):
        top = page.below + place * height
        page.write(draw, page.margin, top, page.shortened(name, name_width), INK if place == 0 else PALE)
        thick = max(4, round(0.5 * page.size))
        box_top = top + (page.line - thick) // 2
        draw.rectangle((start, box_top, end, box_top + thick), fill=TRACK)
        filled = round((end - start) * min(max(share, 0.0), 1.0))
        if filled:
            draw.rectangle((start, box_top, start + filled, box_top + thick), fill=BAR if place == 0 else OTHER_BAR)
        number = f"{share:.1%}".replace("%", " %")
        left = page.width - page.margin - page.length(number)
        page.write(draw, left, top, number, INK if place == 0 else PALE)
    return figure


class Page:
    """An image on white with space below it. All sizes are in pixels."""

    def __init__(self, image: Image.Image, text: str) -> None:
        """`text` has all letters that will be written, except digits."""
        image = image.convert("RGB")
        self.files = [font.path for font in fonts_for(text)]
        times = max(1, min(WIDTH // image.width, 2 * WIDTH // image.height))
        if times > 1:  # repeat each pixel without interpolation
            image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        self.image = image
        self.width = max(WIDTH, image.width)
        self.size = min(44, max(16, self.width // 28))
        """font size"""
        self.line = round(1.4 * self.size)
        self.margin = round(0.9 * self.size)
        self.inner = self.width - 2 * self.margin
        self.below = image.height + self.margin
        """top edge of the text"""

    def with_room(self, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """The figure, with the image centred above `height` pixels of space, and an object that draws on it."""
        figure = Image.new("RGB", (self.width, self.below + height + self.margin), "white")
        figure.paste(self.image, ((self.width - self.image.width) // 2, 0))
        return figure, ImageDraw.Draw(figure)

    def length(self, text: str) -> int:
        return round(sum(font.getlength(run) for run, font in self._runs(text)))

    def write(self, draw: ImageDraw.ImageDraw, left: float, top: float, text: str, ink: str = INK) -> None:
        """Draw one line, with one baseline for all fonts."""
        for run, font in self._runs(text):
            draw.text((left, top + self.size), run, fill=ink, font=font, anchor="ls")
            left += font.getlength(run)

    def wrapped(self, text: str, width: int) -> list[str]:
        """The text in lines of at most `width` pixels; longer words are broken."""
        lines: list[str] = []
        line = ""
        for word in text.split():
            if self.length(joined := f"{line} {word}".strip()) <= width:
                line = joined
                continue
            lines += [line] if line else []
            while self.length(word) > width:
                fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or self.length(word[:n]) <= width)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        return [*lines, line]

    def shortened(self, text: str, width: int) -> str:
        """The text, shortened with an ellipsis if it is longer than `width` pixels."""
        if self.length(text) <= width:
            return text
        fits = next((n for n in range(len(text) - 1, 0, -1) if self.length(text[:n] + "…") <= width), 0)
        return text[:fits].rstrip() + "…"

    def _runs(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text split into runs of one font, each with its font."""
        files = self.files
        if len(files) == 1:
            return [(text, _font(files[0], self.size))]
        runs: list[tuple[str, str]] = []
        for letter in text:
            file = next((file for file in files if ord(letter) in _letters(file)), files[0])
            if runs and (runs[-1][1] == file or letter.isspace()):
                runs[-1] = (runs[-1][0] + letter, runs[-1][1])
            else:
                runs.append((letter, file))
        return [(run, _font(file, self.size)) for run, file in runs]


@lru_cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache
def _letters(path: str) -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(path).get_charmap())
