"""Small images for tests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image


def smooth(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """A photo-like uint8 [H, W, 3]: waves of a few frequencies, different in each channel."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [
        sum(np.sin(2 * np.pi * (f * (x * np.cos(a) + y * np.sin(a)) + p)) / f for f, a, p in draw.uniform(1, 6, (4, 3)))
        for _ in range(3)
    ]
    return np.clip(np.stack(waves, -1) * 60 + 128, 0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """The image as a file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def folder_of(root: Path, counts: dict[str, int], size: tuple[int, int] = (20, 24)) -> Path:
    """One folder per class, each with some different JPEGs."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            seed += 1
            (root / name / f"{i}.jpg").write_bytes(encoded(smooth(*size, seed=seed), "JPEG", quality=90))
    return root


def tiff(
    samples: np.ndarray,
    photometric: int = 1,
    extra: tuple[int, ...] = (),
    *,
    planar: bool = False,
    packed: bool = False,
    predictor: int = 1,
    tile: tuple[int, int] | None = None,
    order: Literal["<", ">"] = "<",
    big: bool = False,
    more: dict[int, list[int] | bytes] | None = None,
) -> bytes:
    """A TIFF of samples [H, W, C] of any type, in strips of 7 rows or tiles (height, width), plain or deflated."""
    height, width, count = samples.shape
    samples = samples.astype(samples.dtype.newbyteorder(order))
    planes = [samples[..., i : i + 1] for i in range(count)] if planar else [samples]
    rows, columns = tile or (7, width)
    blocks = []
    for plane in planes:
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                block = plane[top : top + rows, left : left + columns]
                if tile:
                    gaps = ((0, rows - block.shape[0]), (0, columns - block.shape[1]), (0, 0))
                    block = np.pad(block, gaps)
                data = _predicted(block, predictor).tobytes()
                blocks.append(zlib.compress(data) if packed else data)
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[samples.dtype.kind]
    entries: dict[int, list[int] | bytes] = {256: [width], 257: [height], 258: [8 * samples.itemsize] * count}
    entries |= {259: [8 if packed else 1], 262: [photometric], 277: [count], 284: [1 + planar], 339: [kind] * count}
    entries |= {322: [columns], 323: [rows]} if tile else {278: [rows]}
    starts, sizes = (324, 325) if tile else (273, 279)
    head = 16 if big else 8
    entries[starts] = (head + np.cumsum([0, *map(len, blocks)])[:-1]).tolist()
    entries[sizes] = [len(block) for block in blocks]
    entries |= {338: list(extra)} if extra else {}
    entries |= {317: [predictor]} if predictor != 1 else {}
    entries |= more or {}
    body = b"".join(blocks)
    body += bytes(len(body) % 2)
    return _directory(entries, body, order, big)


def _predicted(block: np.ndarray, predictor: int) -> np.ndarray:
    """Each number as its difference from the one to its left, by predictor 2, or 3 for floats."""
    if predictor == 2:
        whole = block.view(block.dtype.str.replace("i", "u"))
        return np.diff(whole, axis=1, prepend=np.zeros_like(whole[:, :1])).astype(whole.dtype)
    if predictor == 3:
        highest_first = block.astype(block.dtype.newbyteorder(">"))
        planes = highest_first.view(np.uint8).reshape(len(block), -1, block.itemsize).transpose(0, 2, 1)
        flat = planes.reshape(len(block), -1, block.shape[2])
        return np.diff(flat, axis=1, prepend=np.zeros_like(flat[:, :1]))
    return block


def _directory(entries: dict[int, list[int] | bytes], body: bytes, order: str, big: bool) -> bytes:
    head, row, whole, room = (16, "HHQ", "Q", 8) if big else (8, "HHI", "I", 4)
    place = head + len(body)
    after = place + (8 if big else 2) + (20 if big else 12) * len(entries) + room
    rows, beyond = b"", b""
    for tag, values in sorted(entries.items()):
        data = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}I", *values)
        rows += struct.pack(order + row, tag, 2 if isinstance(values, bytes) else 4, len(values))
        if len(data) > room:
            rows += struct.pack(order + whole, after + len(beyond))
            beyond += data + bytes(len(data) % 2)
        else:
            rows += data.ljust(room, b"\0")
    count = struct.pack(order + ("Q" if big else "H"), len(entries))
    mark = b"II" if order == "<" else b"MM"
    start = struct.pack(f"{order}HHHQ", 43, 8, 0, place) if big else struct.pack(f"{order}HI", 42, place)
    return mark + start + body + count + rows + bytes(room) + beyond
