"""Fonts for the letters of a text: matplotlib's own, then those of this machine."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib import font_manager

from vitrail.errors import warn_once

OWN_FONT = "DejaVu Sans"
"""bundled with matplotlib"""


class FontFile(NamedTuple):
    """A font and its file."""

    name: str
    path: str


def fonts_for(text: str) -> list[FontFile]:
    """Matplotlib's own font, then fonts with the letters that it lacks.

    Letters without an installed font are boxes; warns once.
    """

    def lacking(letters: set[str], file: str) -> set[str]:
        there = font_manager.get_font(file).get_charmap()
        return {letter for letter in letters if ord(letter) not in there}

    fonts = [FontFile(OWN_FONT, font_manager.findfont(OWN_FONT))]
    missing = lacking({letter for letter in text if letter.isprintable()}, fonts[0].path)
    others = sorted(font_manager.fontManager.ttflist, key=lambda font: ("Sans" not in font.name, font.name))
    for font in others if missing else []:
        if "Last Resort" not in font.name and (left := lacking(missing, font.fname)) != missing:
            fonts, missing = [*fonts, FontFile(font.name, font.fname)], left
    if missing:
        warn_once(f"no installed font has {', '.join(sorted(missing))[:60]}: such letters are boxes in the figures")
    return fonts
