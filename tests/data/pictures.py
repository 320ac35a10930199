"""Small pictures for the tests of this room."""

from __future__ import annotations

import io
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
