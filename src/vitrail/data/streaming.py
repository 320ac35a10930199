"""Images of Parquet files on the Hub, read while training: blocks of rows by byte ranges, in a bounded cache on disk.

A row of Parquet cannot be read without its row group. So a block, some neighbouring row groups of a file, is read at
once, and an epoch's order uses each block's images within a window of a known size (`Streamed.mixed`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from vitrail.data.random import seed_for, uniform
from vitrail.errors import RunError, first_line, warn_once
from vitrail.files import atomic_file

BLOCK = 8 << 20
"""bytes up to which neighbouring row groups of a file are one block"""
WINDOW = 512 << 20
"""bytes of the blocks whose images an epoch's order mixes; no row group may be larger"""
CACHE = 8 << 30
"""bytes of all blocks on disk; the least recently used is removed"""
AT_ONCE = 64 << 20
"""bytes of blocks that a process downloads at the same time, if it is more than one block"""
PIECE = 8 << 20
"""bytes per request at most"""
WAITS = (1, 2, 4, 8, 16, 32)
"""seconds before a request that failed is repeated"""
FEW = 16
"""blocks from which a sample is taken, if they hold enough images"""
HELD_BY_ROW = 8 << 30
"""bytes of a set up to which single rows are held back for validation, since the cache keeps all of it"""
LOCKS = 64
"""files by which processes agree on who downloads a block"""


# ---- byte ranges


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the Hub at a commit."""

    path: str
    """in the data set"""
    url: str
    size: int


class Busy(Exception):
    """A request failed, and may succeed later."""


_direct: dict[str, str] = {}
"""where the Hub's answers for a URL come from: it limits the requests for its own URLs, not for those"""


def read_range(file: HubFile, start: int, stop: int) -> bytes:
    """Bytes of a file. A request that fails is repeated; RunError if that is in vain, or if the Hub refuses."""
    for wait in (*WAITS, None):
        try:
            return _request(file, start, stop)
        except Busy as error:
            if wait is None:
                raise RunError(
                    f"{file.path} could not be read from the Hub in {len(WAITS) + 1} attempts ({error})"
                ) from None
            warn_once(f"the Hub does not answer ({error}): requests are repeated for {sum(WAITS):,} seconds")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _request(file: HubFile, start: int, stop: int) -> bytes:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

    direct = _direct.get(file.url)
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    if direct is None:  # which contains its own permission: the token is for the Hub alone
        headers |= build_hf_headers()
    try:
        answer = get_session().get(direct or file.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        code, content = answer.status_code, answer.content
    except Exception as error:  # the network libraries raise many types
        raise Busy(first_line(error)[:120]) from None
    if code == 206 and len(content) == stop - start:
        if urlsplit(place := str(answer.url)).netloc != urlsplit(file.url).netloc:
            _direct[file.url] = place
        return content
    if direct is not None:
        _direct.pop(file.url, None)
        if 400 <= code < 500:  # its permission has ended
            return _request(file, start, stop)
        raise Busy(f"its storage answers with {code}")
    if code in (401, 403, 404):
        raise RunError(
            f"the Hub refuses {file.path} ({code}): check that the set still exists and that you may read it"
        )
    raise Busy(f"{len(content):,} bytes instead of {stop - start:,}" if code == 206 else f"it answers with {code}")


class Remote(io.RawIOBase):
    """A file of the Hub that is read at any offset. Raises RunError as `read_range` does."""

    def __init__(self, file: HubFile) -> None:
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.file.size}[whence]
        self.place = base + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.file.size - self.place))
        for start in range(0, count, PIECE):
            stop = min(start + PIECE, count)
            buffer[start:stop] = read_range(self.file, self.place + start, self.place + stop)
        self.place += count
        return count


# ---- blocks on disk


def name_of(*what: object) -> str:
    """The name of an entry of the cache."""
    return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Blocks of encoded images, shared by all processes of a machine. A block appears whole or not at all.

    A file is int64 [rows + 1], where each image begins and the last one ends, then the images.
    """

    folder: Path
    size: int = field(default_factory=lambda: CACHE)

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str, row: int, rows: int) -> bytes | None:
        """An image of a block of so many rows; None if the block is not there."""
        path = self.folder / name
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(8 * row)
                start, stop = np.frombuffer(file.read(16), np.int64).tolist()
                file.seek(8 * (rows + 1) + start)
                data = file.read(stop - start)
            os.utime(path)  # the least recently used block is removed first
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, images: Sequence[bytes]) -> None:
        """Add a block, and remove others before if there is no room. Raises RunError if the disk refuses."""
        ends = np.cumsum([0, *map(len, images)], dtype=np.int64)
        try:
            with self._locked("size"):
                self._make_room(ends.nbytes + int(ends[-1]))
                with atomic_file(self.folder / name) as file:
                    file.write(ends.tobytes())
                    file.writelines(images)
        except OSError as error:
            where = error.filename or self.folder
            raise RunError(f"cannot write {where}: {error.strerror}: free space on that disk") from None

    def _make_room(self, bytes: int) -> None:
        found = [(entry.stat(), entry.path) for entry in os.scandir(self.folder) if entry.is_file()]
        total = bytes + sum(state.st_size for state, _ in found)
        for state, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
            if total <= self.size:
                break
            with contextlib.suppress(OSError):  # Windows keeps a file that is being read
                os.unlink(path)
                total -= state.st_size

    def alone(self, name: str) -> contextlib.AbstractContextManager[object]:
        """A block of code that only one process of the machine executes for this name."""
        return self._locked(str(int(name, 16) % LOCKS))

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # not in __all__

        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.folder / "locks" / name):
            yield


class Block(NamedTuple):
    """Some neighbouring row groups of a file."""

    file: int
    groups: tuple[int, ...]
    first: int
    """its first row, counted in the file"""
    rows: int
    bytes: int
    """of its column of images, compressed"""


@dataclass(frozen=True, eq=False)
class Streamed(Sequence[bytes]):
    """Encoded images in blocks of Parquet files on the Hub."""

    files: list[tuple[HubFile, Any]]
    """with the metadata of Parquet"""
    column: str
    """of the images' bytes"""
    blocks: list[Block]
    block: Tensor
    """int64 [N]: the block of each image"""
    row: Tensor
    """int64 [N]: the row of each image, counted in its file"""
    cache: Cache

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: int) -> bytes:  # type: ignore[override]
        number = int(self.block[i])
        block = self.blocks[number]
        while (image := self.cache.read(self._name(block), int(self.row[i]) - block.first, block.rows)) is None:
            self._download(number)
        return image

    def at(self, places: Tensor) -> Streamed:
        """The images at `places`, int64 [M], in that order."""
        return Streamed(self.files, self.column, self.blocks, self.block[places], self.row[places], self.cache)

    def fetch(self, places: Iterable[int]) -> None:
        """Download the missing blocks of some images, several at once."""
        needed = self.block[torch.tensor([*places], dtype=torch.int64)].unique().tolist()
        missing = [number for number in needed if self._name(self.blocks[number]) not in self.cache]
        if missing:
            largest = max(self.blocks[number].bytes for number in missing)
            with ThreadPoolExecutor(max(1, min(len(missing), AT_ONCE // max(1, largest)))) as pool:
                for _ in pool.map(self._download, missing):
                    pass

    def mixed(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """How to sort images that are in random order (`places`, int64 [M]) so that few blocks are needed at a time.

        The blocks begin in random order. Each image moves from its block's place by a random distance of up to WINDOW
        bytes of blocks. If all blocks fit in one window, the order stays. int64 [M], indices into `places`.
        """
        used, block = self.block[places].unique(return_inverse=True)
        total = sum(self.blocks[number].bytes for number in used.tolist())
        if total <= WINDOW:
            return torch.arange(len(places))
        window = max(2, WINDOW * len(used) // total)
        begins = torch.randperm(len(used), generator=generator)[block]
        moved = begins + window * torch.rand(len(places), generator=generator, dtype=torch.float64)
        return moved.argsort(stable=True)

    def sample(self, count: int) -> Tensor:
        """At most `count` images, int64 [M], evenly spaced in a few blocks that are evenly spaced."""
        used = self.block.unique()
        few = min(len(used), max(FEW, -(-count * len(used) // len(self))))
        near = torch.isin(self.block, used[torch.linspace(0, len(used) - 1, few).round().long()]).nonzero()[:, 0]
        return near[torch.linspace(0, len(near) - 1, min(count, len(near))).round().long()]

    def sides(self) -> tuple[Tensor, Tensor, str]:
        """Numbers in [0, 1), float64 [N] each, by which images are held back, without reading them; and how, in words.

        The first are of the images, by a hash of file and row. The second decide. They are the same up to HELD_BY_ROW
        bytes, else those of blocks: single rows are in all blocks, so each evaluation would download the whole set.
        """
        blocks = torch.tensor([[block.file, block.first] for block in self.blocks])[self.block]
        own = self._places(blocks[:, 0], self.row)
        if sum(block.bytes for block in self.blocks) <= HELD_BY_ROW:
            return own, own, "by a hash of file and row number"
        return own, self._places(*blocks.T), "whole blocks of rows, by a hash of file and row number"

    def _places(self, file: Tensor, row: Tensor) -> Tensor:
        places = torch.zeros(len(row), dtype=torch.float64)
        for number in file.unique().tolist():
            own = file == number
            places[own] = uniform(seed_for(*self.files[number][0].path.encode()), row[own], 1)[:, 0].double()
        return places

    def _name(self, block: Block) -> str:
        return name_of(self.files[block.file][0].url, self.column, block.groups)

    def _download(self, number: int) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        block = self.blocks[number]
        file, metadata = self.files[block.file]
        name = self._name(block)
        with self.cache.alone(name):
            if name in self.cache:  # another process had the lock
                return
            try:
                table = pq.ParquetFile(Remote(file), metadata=metadata).read_row_groups(
                    block.groups, columns=[self.column], use_threads=False
                )
            except pa.ArrowException as error:
                raise RunError(f"{file.path} on the Hub is damaged: {first_line(error)[:160]}") from None
            images = table.column(0)
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            self.cache.write(name, [image or b"" for image in images.to_pylist()])
