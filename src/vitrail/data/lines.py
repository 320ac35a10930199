"""The lines of a text file, in any common encoding."""

from __future__ import annotations

import codecs
import logging
from pathlib import Path

from vitrail.errors import UserError

log = logging.getLogger("vitrail")

BEGINNINGS = {
    (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE): "utf-32",  # checked first: one of them begins with one of UTF-16's
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE): "utf-16",
}


def read_lines(path: Path) -> list[str]:
    """The lines of a text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Any other line is read as Latin-1, with one warning per file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for marks, encoding in BEGINNINGS.items():
        if data.startswith(marks):
            return _lines(data.decode(encoding, "replace"))
    if b"\0" in data[:4096]:
        raise UserError(f"{path} is not text: save it as text in UTF-8")
    try:
        return _lines(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        lines = [_decode(line) for line in data.removeprefix(codecs.BOM_UTF8).split(b"\n")]
    odd = [number for number, (_, good) in enumerate(lines, 1) if not good]
    log.warning(
        f"{path}, line {odd[0]}" + (f" and {len(odd) - 1:,} others" if len(odd) > 1 else "") + ": not UTF-8, "
        "read as Latin-1 (Windows-1252)"
    )
    return _lines("\n".join(line for line, _ in lines))


def _lines(text: str) -> list[str]:
    # Not str.splitlines, which also splits at characters that a caption may contain.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _decode(line: bytes) -> tuple[str, bool]:
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding), encoding == "utf-8"
        except UnicodeDecodeError:
            continue
    return line.decode("latin-1"), False
