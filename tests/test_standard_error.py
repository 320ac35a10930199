"""Standard error holds vitrail's own lines alone, whatever decoders and other packages write there."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

NOISY = """
import logging, os, sys, warnings
from vitrail import cli

def noisy(args):
    os.write(2, b"a decoder in C\\n")
    warnings.warn("a warning")
    logging.getLogger("PIL.TiffImagePlugin").error("a package's log")
    logging.getLogger("vitrail").warning("left out:\\nx.jpg")
    print("vitrail: said", file=sys.stderr)
    if args:
        raise RuntimeError("a mistake of vitrail's own")
    return 0

cli.COMMANDS["noisy"] = noisy
sys.exit(cli.main())
"""


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)


def test_others_lines_are_dropped() -> None:
    assert ran("-c", NOISY, "noisy").stderr == "vitrail: left out: x.jpg\nvitrail: said\n"


def test_warnings_are_shown_where_python_was_told_to() -> None:
    assert "UserWarning: a warning" in ran("-W", "always", "-c", NOISY, "noisy").stderr


def test_a_mistake_keeps_its_traceback() -> None:
    done = ran("-c", NOISY, "noisy", "now")
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: a mistake of vitrail's own\n")


def test_standard_error_comes_back() -> None:
    done = ran("-c", NOISY.replace("sys.exit(cli.main())", "cli.main(); os.write(2, b'after\\n')"), "noisy")
    assert done.stderr.endswith("vitrail: said\nafter\n")


def test_damaged_files_leave_no_lines_of_their_decoders(tmp_path: Path) -> None:
    """In `predict`, and in training by workers."""
    for i in range(14):
        draw = np.random.default_rng(i)
        noise = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "TIFF", compression="tiff_lzw")
        data = bytearray(buffer.getvalue())
        if i % 3 == 2 and i < 12:
            data[2000:2040] = draw.bytes(40)  # libtiff complains about these on descriptor 2
        folder = tmp_path / "data" / ("train" if i < 12 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.tif").write_bytes(data)
    done = ran("-m", "vitrail", "predict", str(tmp_path / "data"), "--device", "cpu")
    assert done.returncode in (0, 2) and len(done.stdout.splitlines()) == 14
    assert all(str(tmp_path) in line for line in done.stderr.splitlines())
    small = ["--image-size", "32", "32", "--stem", "4", "--width", "16", "--depth", "1", "--heads", "2"]
    command = ["train", "folder", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--epochs", "0.1"]
    options = ["--memory", "False", "--workers", "2", "--max-bad", "1", "--device", "cpu", *small]
    done = ran("-m", "vitrail", *command, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("vitrail: ") for line in lines)
