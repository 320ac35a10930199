"""Run `vitrail predict` and `vitrail train` on damaged image files: one row per file, and only vitrail's own messages.

    python bench/fuzz.py [--count 10000] [--seed 0] [--tiny]

Files of ten formats are damaged in one of six ways (bits flipped, cut off, bytes inserted, bytes removed, bytes of the
header changed, large numbers written over it), as a function of the seed and the file's number. `predict` gets them in
calls of a thousand, alternately with and without `--json`: each file must have its row, the exit code must be 0 or 2,
and each line on standard error must begin with `vitrail` or contain the path of a file. `train --max-bad 1` gets all
files in memory, and the first thousand streamed by workers.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Parser, record
from PIL import Image

CALL = 1000
LIMIT = 600
"""seconds after which a call counts as hung"""
SMALL = ["--image-size", "32", "32", "--stem", "4", "--width", "16", "--depth", "1", "--heads", "2", "--device", "cpu"]


def parser() -> Parser:
    parser = Parser(__doc__, count=100)
    parser.add_argument("--count", type=int, default=10_000, help="files")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> int:
    options = parser().parse_args()
    count = options.count
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), count, options.seed)
    record("fuzz", {"files": count, "seed": options.seed, **rows}, options.results)
    print(json.dumps(rows, indent=2))
    return 1 if rows["faults"] else 0


def measure(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Counts of the files by outcome, and faults in words."""
    files = write_files(folder / "data", count, seed)
    faults: list[str] = []
    answered: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    began = time.monotonic()
    for call, start in enumerate(range(0, count, CALL)):
        some = files[start : start + CALL]
        code, out, err = run(["predict", *map(str, some), *(["--json"] if call % 2 == 0 else []), "--device", "cpu"])
        faults += foreign(code, err, {0, 2})
        lines = out.splitlines()
        if len(lines) != len(some):
            faults.append(f"predict gave {len(lines)} rows for {len(some)} files (exit code {code}): {err[-300:]}")
        for file, line in zip(some, lines, strict=False):
            row = json.loads(line) if call % 2 == 0 else {"image": line.split(": ")[0]}
            if row["image"] != str(file):
                faults.append(f"the row of {file.name} is for {row['image']}")
            bad = "error" in row if call % 2 == 0 else line.endswith(": no answer")
            (refused if bad else answered)[file.suffix[1:]] += 1
    predicted = time.monotonic() - began
    train = ["train", "folder", "--data", str(folder / "data"), "--epochs", "1", "--max-bad", "1", *SMALL]
    code, _, kept = run([*train, "--memory", "True", "--workers", "0", "--out", str(folder / "kept")])
    faults += foreign(code, kept, {0})
    for file in files[CALL:]:
        file.unlink()
    code, _, streamed = run([*train, "--memory", "False", "--workers", "2", "--out", str(folder / "streamed")])
    faults += foreign(code, streamed, {0})
    return {
        "answered": dict(sorted(answered.items())),
        "refused": dict(sorted(refused.items())),
        "left out of training, in memory": kept.count("left out: "),
        "left out of training, streamed": streamed.count("left out: "),
        "faults": faults,
        "seconds of predict": round(predicted, 1),
        "most memory of a command, MB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3),
    }


def run(words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vitrail", *words], capture_output=True, text=True, errors="replace", timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return -1, "", f"{words[0]} took more than {LIMIT} seconds"
    return done.returncode, done.stdout, done.stderr


def foreign(code: int, err: str, codes: set[int]) -> list[str]:
    """Faults of a command: a wrong exit code, or messages that are not vitrail's."""
    lines = [line for line in err.splitlines() if not line.startswith("vitrail") and "/data/" not in line]
    faults = [f"a line on standard error: {line[:200]}" for line in lines[:5]]
    return faults if code in codes else [f"exit code {code}: {err[-300:]}", *faults]


def write_files(root: Path, count: int, seed: int) -> list[Path]:
    """Write damaged files to two class folders."""
    whole = [(kind, data) for kind, datas in originals().items() for data in datas]
    by_kind: dict[str, list[bytes]] = {}
    for kind, data in whole:
        by_kind.setdefault(kind, []).append(data)
    kinds = list(by_kind)
    files = []
    for i in range(count):
        draw = np.random.default_rng((seed, i))
        kind = kinds[i % len(kinds)]
        data = by_kind[kind][int(draw.integers(len(by_kind[kind])))]
        damage = DAMAGES[int(draw.integers(len(DAMAGES)))]
        path = root / ("a" if i // len(kinds) % 2 else "b") / f"{i:05}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(data, draw))
        files.append(path)
    return files


def originals() -> dict[str, list[bytes]]:
    """Small files of ten formats, several per format, by their extension."""
    y, x = np.mgrid[0:40, 0:56]
    rgb = np.stack([128 + 100 * np.sin(x / (5 + i)) * np.cos(y / (7 - i)) for i in range(3)], -1).astype(np.uint8)
    image = Image.fromarray(rgb)
    grey, palette, clear = image.convert("L"), image.quantize(32), image.convert("RGBA")
    clear.putalpha(Image.fromarray((x * 4).astype(np.uint8)))
    deep = Image.fromarray((rgb[..., 0].astype(np.uint16) << 8) + rgb[..., 1])
    floats = Image.fromarray(rgb[..., 0].astype(np.float32) / 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    bands = np.concatenate([rgb, 255 - rgb[..., :2]], -1)
    made: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "jpg": [
            (image, {"quality": 90, "exif": turned}),
            (image, {"progressive": True}),
            (grey, {}),
            (image.convert("CMYK"), {}),
        ],
        "png": [(image, {}), (palette, {"transparency": 3}), (clear, {}), (deep, {}), (grey.convert("1"), {})],
        "gif": [(palette, {}), (palette, {"save_all": True, "append_images": [palette.rotate(90)]})],
        "bmp": [(image, {}), (palette, {}), (grey.convert("1"), {})],
        "tif": [
            (image, {}),
            (image, {"compression": "tiff_lzw"}),
            (image, {"compression": "jpeg"}),
            (image.convert("CMYK"), {"compression": "packbits"}),
            (deep, {"compression": "tiff_adobe_deflate"}),
            (floats, {"compression": "tiff_lzw", "tiffinfo": {317: 3}}),
            (clear, {"compression": "tiff_lzw", "tiffinfo": {317: 2}}),
            (grey.convert("1"), {"compression": "group4"}),
            (palette, {}),
            (deep, {"big_tiff": True}),
        ],
        "webp": [(image, {}), (clear, {"lossless": True})],
        "ppm": [(image, {}), (grey, {}), (grey.convert("1"), {})],
        "avif": [(image, {}), (clear, {})],
        "jp2": [(image, {}), (clear, {}), (image, {"quality_mode": "rates", "quality_layers": [20]})],
    }
    files = {ending: [_saved(*of, ending) for of in some] for ending, some in made.items()}
    arrays = (rgb, rgb[..., 0], bands, rgb / np.float32(255), rgb.astype(np.float64), rgb.astype(np.int64))
    files["npy"] = [_array(array) for array in arrays]
    return {ending: [data for data in some if data] for ending, some in files.items() if any(some)}


def _saved(image: Image.Image, options: dict[str, Any], ending: str) -> bytes:
    file = io.BytesIO()
    Image.init()
    try:
        image.save(file, Image.registered_extensions()[f".{ending}"], **options)
    except (KeyError, OSError, TypeError):
        return b""  # a build of Pillow without this format
    return file.getvalue()


def _array(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _flip(data: bytes, draw: np.random.Generator) -> bytes:
    out = bytearray(data)
    for at in draw.integers(len(out), size=int(draw.integers(1, 20))):
        out[at] ^= 1 << int(draw.integers(8))
    return bytes(out)


def _cut(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: int(draw.integers(len(data)))]


def _insert(data: bytes, draw: np.random.Generator) -> bytes:
    at = int(draw.integers(len(data)))
    return data[:at] + draw.bytes(int(draw.integers(1, 64))) + data[at:]


def _remove(data: bytes, draw: np.random.Generator) -> bytes:
    at = int(draw.integers(len(data)))
    return data[:at] + data[at + int(draw.integers(1, 64)) :]


def _header(data: bytes, draw: np.random.Generator) -> bytes:
    out = bytearray(data)
    for at in draw.integers(min(64, len(out)), size=int(draw.integers(1, 6))):
        out[at] = int(draw.integers(256))
    return bytes(out)


def _large(data: bytes, draw: np.random.Generator) -> bytes:
    """A large number of two or four bytes, likely in the header, or at the end, where a TIFF may have its tags."""
    near = int(draw.integers(min(200, len(data))))
    at = near if draw.random() < 0.7 else len(data) - 1 - near
    number = [b"\xff\xff\xff\x7f", b"\xff\xff", b"\x00\x00\x01\x00", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff"]
    chosen = number[int(draw.integers(len(number)))]
    return data[:at] + chosen + data[at + len(chosen) :]


DAMAGES: list[Callable[[bytes, np.random.Generator], bytes]] = [_flip, _cut, _insert, _remove, _header, _large]


if __name__ == "__main__":
    sys.exit(main())
