"""Figures of answers that tasks share: an image with a line of text below it."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE, MARGIN = 18, 10
SMALLEST = 320
"""pixels of the width of a figure at least, so that the text can be read below a small image"""


def with_text(image: Image.Image, text: str) -> Image.Image:
    """The image in RGB with `text` on white below it; a small image is enlarged."""
    image = image.convert("RGB")
    if image.width < SMALLEST:
        scale = SMALLEST / image.width
        image = image.resize((SMALLEST, max(1, round(image.height * scale))), Image.Resampling.NEAREST)
    font = ImageFont.load_default(FONT_SIZE)
    letters = max(1, int((image.width - 2 * MARGIN) / font.getlength("n")))
    lines = "\n".join(textwrap.wrap(text, letters)) or " "
    bounds = ImageDraw.Draw(image).multiline_textbbox((MARGIN, MARGIN), lines, font=font)
    figure = Image.new("RGB", (image.width, image.height + int(bounds[3]) + MARGIN), "white")
    figure.paste(image)
    ImageDraw.Draw(figure).multiline_text((MARGIN, image.height + MARGIN), lines, fill="black", font=font)
    return figure
