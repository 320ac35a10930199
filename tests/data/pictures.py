"""Small pictures for the tests of this room."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

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
    """The picture as a file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def folder_of(root: Path, counts: dict[str, int], size: tuple[int, int] = (20, 24)) -> Path:
    """A folder with a folder a class, each with some different JPEGs."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            seed += 1
            (root / name / f"{i}.jpg").write_bytes(encoded(smooth(*size, seed=seed), "JPEG", quality=90))
    return root


def tiff(bands: np.ndarray, planar: bool, deep: bool, packed: bool) -> bytes:
    """A TIFF of any number of bands in one strip a plane; Pillow writes at most four."""
    count, height, width = bands.shape
    pixels = bands.astype("<u2") << 8 if deep else bands
    planes = [plane.tobytes() for plane in pixels] if planar else [pixels.transpose(1, 2, 0).tobytes()]
    planes = [zlib.compress(plane) if packed else plane for plane in planes]
    entries = {256: [width], 257: [height], 258: [16 if deep else 8] * count, 259: [8 if packed else 1], 262: [1]}
    starts = np.cumsum([8] + [len(plane) for plane in planes])
    entries |= {273: starts[:-1].tolist(), 277: [count], 279: [len(plane) for plane in planes], 284: [1 + planar]}
    body, place = b"".join(planes), int(starts[-1])
    extra, rows = b"", b""
    after = place + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        packed_values = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            rows += struct.pack("<HHII", tag, 4, len(values), after + len(extra))
            extra += packed_values
        else:
            rows += struct.pack("<HHI", tag, 4, 1) + packed_values
    return b"II*\0" + struct.pack("<I", place) + body + struct.pack("<H", len(entries)) + rows + bytes(4) + extra
