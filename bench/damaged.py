"""Train on 2,000 images of which one in twenty is damaged: does it end, and name each of them once?

    python bench/damaged.py [--count 2000] [--tiny]

The damaged files are empty, cut off, text, random bytes, images that declare more pixels than the limit, and links to
nothing, as many of each. `vitrail train folder --max-bad 0.1` reads them in memory, and streamed by two workers over
four epochs. With the default, `--max-bad 0.01`, the command must refuse them.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Parser, Row, record, tiny_images

SHARE = 20
"""one image in so many is damaged"""
WORDS = [
    *("--max-steps", "80", "--batch-size", "100", "--image-size", "16", "--stem", "4", "--width", "16", "--depth", "1"),
    *("--heads", "2", "--device", "cpu", "--no-balanced"),  # which would draw with replacement, and miss some
]
MODES = {"in memory": ["--memory", "True"], "streamed": ["--memory", "False", "--workers", "2"]}


def parser() -> Parser:
    parser = Parser(__doc__, count=240)
    parser.add_argument("--count", type=int, default=2000, help="images")
    return parser


def main() -> int:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tiny_images(folder / "data", ("cat", "dog"), args.count // 2)
        damaged = damage(sorted((folder / "data").rglob("*.jpg"))[::SHARE])
        rows: Row = {"images": args.count, "damaged": dict(Counter(damaged.values()))}
        command = [sys.executable, "-m", "vitrail", "train", "folder", "--data", str(folder / "data"), *WORDS]
        for name, mode in MODES.items():
            out = str(folder / name)
            refused = subprocess.run([*command, *mode, "--out", out], capture_output=True, text=True)
            ended = subprocess.run([*command, *mode, "--out", out, "--max-bad", "0.1"], capture_output=True, text=True)
            said = Counter(line.split(": ")[2] for line in ended.stderr.splitlines() if ": left out: " in line)
            rows[name] = {
                "exit code with --max-bad 0.1": ended.returncode,
                "exit code without": refused.returncode,
                "named once": sum(said[file] == 1 for file in damaged),
                "never named": sum(said[file] == 0 for file in damaged),
                "named more than once": sum(count > 1 for count in said.values()),
                "others named": len(said.keys() - damaged.keys()),
                "tracebacks": (ended.stderr + refused.stderr).count("Traceback"),
            }
    print(json.dumps(rows))
    record("damaged", rows, args.results)
    good = {"exit code with --max-bad 0.1": 0, "exit code without": 2, "named once": len(damaged)}
    expected = {**dict.fromkeys(rows["streamed"], 0), **good}
    return 0 if all(rows[name] == expected for name in MODES) else 1


def damage(files: list[Path]) -> dict[str, str]:
    """Damage files, in turn in each way; the way by the file's name below the data."""
    ways: dict[str, Callable[[Path], object]] = {
        "empty": lambda file: file.write_bytes(b""),
        "cut off": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "text": lambda file: file.write_text("<html>not found</html>\n"),
        "random bytes": lambda file: file.write_bytes(np.random.default_rng(0).bytes(2000)),
        "too large": lambda file: file.write_bytes(huge()),
        "link to nothing": nothing,
    }
    done = {}
    for i, file in enumerate(files):
        way = list(ways)[i % len(ways)]
        ways[way](file)
        done[f"{file.parent.name}/{file.name}"] = way
    return done


def huge() -> bytes:
    """A PNG of a few bytes that declares 60,000 by 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("nothing.jpg")


if __name__ == "__main__":
    sys.exit(main())
