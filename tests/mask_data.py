"""Small sets of images with masks for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from images import encoded, smooth

SIZE = (12, 16)


def numbers(seed: int, classes: int = 3) -> np.ndarray:
    """Blocks of all classes."""
    blocks = np.random.default_rng(seed).permutation(np.arange(12) % classes).reshape(3, 4)
    return np.kron(blocks, np.ones((4, 4))).astype(np.uint8)


def made(root: Path, *files: str) -> Path:
    """Images (.jpg) and masks (.png) by their paths; the number in a stem seeds its mask."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = number_of(file)
        path.write_bytes(encoded(numbers(seed)) if path.suffix == ".png" else encoded(smooth(*SIZE, seed=seed), "JPEG"))
    return root


def number_of(file: str) -> int:
    """The number in the stem of a file. Cityscapes has an 8 in the name of every image."""
    return int("".join(filter(str.isdigit, Path(file).stem.replace("8bit", ""))))


def numbers_of(file: str) -> np.ndarray:
    return numbers(number_of(file))


def several(pattern: str, count: int = 4) -> list[str]:
    return [pattern.format(i) for i in range(count)]


def put(root: Path, mask: np.ndarray | bytes, name: str = "masks/1.png") -> None:
    (root / name).write_bytes(mask if isinstance(mask, bytes) else encoded(mask))


def flat(root: Path, count: int = 4) -> Path:
    return made(root, *several("images/{}.jpg", count), *several("masks/{}.png", count))
