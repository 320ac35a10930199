"""Peak memory of `vitrail predict` for many large images, and for one: python bench/memory.py [--tiny]

The images have 24 megapixels, half JPEG and half PNG. Each command runs in its own process. The single image is once a
JPEG, which is decoded only as far as the model's size needs, and once a PNG, which is decoded completely.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Parser, Row, record
from PIL import Image

SIZE = (6000, 4000)
LIMIT = 200
"""MB that many images may need above one"""


def parser() -> Parser:
    parser = Parser(__doc__, images=4)
    parser.add_argument("--images", type=int, default=64)
    return parser


def main() -> int:
    options = parser().parse_args()
    count, size = options.images, (300, 200) if options.tiny else SIZE
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), count, size)
        # A second hard link works like a second file, but takes no disk space.
        alone = {path.suffix[1:].upper(): peak([path]) for path in paths[:2]}
        rows: Row = {
            "images": count,
            "pixels": f"{size[0]}x{size[1]}",
            **{f"one {kind}, MB": round(most) for kind, most in alone.items()},
            "all, MB": round(peak(paths)),
        }
    rows["all above one, MB"] = rows["all, MB"] - round(max(alone.values()))
    print(rows)
    record("memory", rows, options.results)
    return 1 if rows["all above one, MB"] > LIMIT else 0


def write_images(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """A JPEG and a PNG of smooth noise, alternately, each under several names."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    image.save(folder / "0.jpg", quality=90)
    image.save(folder / "1.png", compress_level=1)
    first = [folder / "0.jpg", folder / "1.png"]
    paths = [folder / f"{i}{first[i % 2].suffix}" for i in range(count)]
    for i, path in enumerate(paths[2:]):
        os.link(first[i % 2], path)
    return paths


def peak(paths: list[Path]) -> float:
    """Peak resident memory of `vitrail predict` for these images, in MB."""
    command = [sys.executable, "-m", "vitrail", "predict", *map(str, paths), "--device", "cpu"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        process, status, usage = os.wait4(running.pid, os.WNOHANG)
        if process:
            break
        time.sleep(0.1)
    if status:
        sys.exit(f"vitrail predict ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    sys.exit(main())
