"""Images inside tar files, read at their offset: any image at once, without those before it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEPT_OPEN = 256
"""A set of more tar files opens them for each image, since a process may have about 1,000 open files."""


class Tar:
    """A tar file that is read at any offset, by threads and worker processes at the same time."""

    def __init__(self, path: Path, keep_open: bool) -> None:
        self.path, self.keep_open = path, keep_open and hasattr(os, "pread")  # Windows has no pread
        self.handle = os.open(path, os.O_RDONLY) if self.keep_open else None

    def __del__(self) -> None:
        if (handle := getattr(self, "handle", None)) is not None:
            os.close(handle)

    def __reduce__(self) -> tuple[type[Tar], tuple[Path, bool]]:
        return Tar, (self.path, self.keep_open)  # worker processes that are not forked open it again

    def read(self, offset: int, size: int) -> bytes:
        if self.handle is not None:
            return os.pread(self.handle, size, offset)  # has no position that processes would share
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class Member(NamedTuple):
    """An image file inside a tar file."""

    tar: Tar
    offset: int
    """of its first byte"""
    size: int
    """in bytes"""
    hash: int | None
    """that of the image from which it was made (see `vitrail.data.content`), if it is known"""

    def read_bytes(self, most: int | None = None) -> bytes:
        """The file, or its first `most` bytes. Raises OSError."""
        return self.tar.read(self.offset, self.size if most is None else min(most, self.size))


class Members(Sequence[Member]):
    """The images of a split: for each the number of its tar file, offset, size, and hash if known; int64 [N]."""

    def __init__(
        self, tars: list[Path], which: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, hashes: np.ndarray | None
    ) -> None:
        self.tars = [Tar(path, len(tars) <= KEPT_OPEN) for path in tars]
        # Arrays, not lists: forked workers would copy each page of a list whose entries they look at.
        self.which, self.offsets, self.sizes, self.hashes = which, offsets, sizes, hashes

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, i: int) -> Member:  # type: ignore[override]
        known = None if self.hashes is None else int(self.hashes[i])
        return Member(self.tars[self.which[i]], int(self.offsets[i]), int(self.sizes[i]), known)
