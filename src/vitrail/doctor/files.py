"""Files: unreadable images, endings that are not those of the content, and what is hidden or left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vitrail.data.sources import BEGINNINGS, ENDINGS, HEIF, is_litter
from vitrail.doctor.finding import Finding, a_few, counted
from vitrail.doctor.survey import Survey

OWN_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "NPY": (".npy",),
    "AVIF": (".avif",),
    "HEIC": tuple(HEIF),
}
"""the usual endings of a format"""
KNOWN = ENDINGS | HEIF
START = 16
"""bytes that tell a format"""


def broken(found: Survey) -> Iterator[Finding]:
    """Images that cannot be read."""
    if found.bad:
        reasons = [(reason,) for _, reason in sorted(found.bad.items())]
        what = counted(len(reasons), "image cannot", "images cannot")
        yield Finding(
            "broken-files",
            f"{what} be read, of {len(found):,}",
            "copy them again from where they came from, or remove them; training leaves out at most 1 % (--max-bad)",
            "certain",
            reasons,
        )


def wrong_endings(found: Survey) -> Iterator[Finding]:
    """Images whose content is of another format than their name says."""
    wrong = []
    for i in found.good():
        ending, kind = Path(found.names[i]).suffix.lower(), str(found.measured["format"][i])
        if ending in KNOWN and kind in OWN_ENDINGS and ending not in OWN_ENDINGS[kind]:
            wrong.append((f"{found.names[i]} ({kind})",))
    if wrong:
        yield Finding(
            "wrong-endings",
            f"the content of {counted(len(wrong), 'image')} is of another format than the ending says",
            "rename them: vitrail reads the content, but other programs trust the ending",
            "certain",
            wrong,
        )


def left_out(path: Path) -> Iterator[Finding]:
    """What a folder holds that is hidden, or that has no ending of an image but the content of one."""
    hidden: list[tuple[str, ...]] = []
    disguised: list[tuple[str, ...]] = []
    for where, folders, files in os.walk(path):
        here = Path(where)
        hidden += [(_below(path, here / name) + "/",) for name in sorted(folders) if is_litter(name)]
        folders[:] = sorted(name for name in folders if not is_litter(name))
        for name in sorted(files):
            if is_litter(name):
                hidden.append((_below(path, here / name),))
            elif Path(name).suffix and Path(name).suffix.lower() not in KNOWN and _is_image_inside(here / name):
                disguised.append((_below(path, here / name),))
    if hidden:
        images = [name for (name,) in hidden if Path(name).suffix.lower() in KNOWN]
        hint = f", among them images: {a_few(images)}" if images else ""
        yield Finding(
            "hidden-files",
            f"{counted(len(hidden), 'hidden file or folder is', 'hidden files or folders are')} left out{hint}",
            "remove them, or rename those that are images of the set, so that no name begins with a dot",
            "certain",
            hidden,
        )
    if disguised:
        yield Finding(
            "wrong-endings",
            f"{counted(len(disguised), 'file has', 'files have')} the content of an image but another ending, and so "
            f"{'is' if len(disguised) == 1 else 'are'} left out",
            "give them the ending of their format, such as .jpg",
            "certain",
            disguised,
        )


def _is_image_inside(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return BEGINNINGS.match(opened.read(START)) is not None
    except OSError:
        return False


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
