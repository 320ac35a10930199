"""A hash of an image's content, by which `split_val` chooses its side."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from torch import Tensor

from vitrail.data.members import Member
from vitrail.data.pixels import NUMPY
from vitrail.data.tiff import MAGIC

Item = bytes | Path | Member | Tensor
"""an image as a set holds it: an encoded file in memory, on disk or in a tar file, or uint8 [C, H, W]"""
BITS = 48
"""of a hash"""
RAW = (b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", *MAGIC, NUMPY)
"""first bytes of formats that may be uncompressed: BMP, PNM, TIFF and arrays"""


def content_hash(item: Item) -> int:
    """A hash of the length and the first 16 KiB, so that splitting does not read a whole set.

    That distinguishes compressed images. Others may all begin with the same white rows, so they are read whole. An
    image in a shard has the hash of the image from which it was made, so that both are on the same side.
    """
    start = 1 << 14
    try:
        if isinstance(item, Path):
            with item.open("rb") as file:
                data, length = file.read(start), os.fstat(file.fileno()).st_size
                data += file.read() if data.startswith(RAW) else b""
        elif isinstance(item, Member):
            if item.hash is not None:
                return item.hash
            data, length = item.read_bytes(start), item.size
            data = item.read_bytes() if data.startswith(RAW) else data
        else:
            data = item if isinstance(item, bytes) else item.contiguous().numpy().tobytes()
            data, length = data if isinstance(item, Tensor) or data.startswith(RAW) else data[:start], len(data)
    except OSError:
        data, length = b"", 0  # the error is reported when the file is decoded
    digest = hashlib.blake2b(length.to_bytes(8, "little") + data, digest_size=BITS // 8).digest()
    return int.from_bytes(digest, "little")
