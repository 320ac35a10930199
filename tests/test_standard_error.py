"""Standard error holds vitrail's own lines alone, whatever decoders and other packages write there."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.standard_error import OneLine

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


def test_a_name_cannot_control_the_terminal() -> None:
    record = logging.LogRecord("vitrail", logging.WARNING, "", 0, "left out: \x1b[2J\udce9 caf\xe9\n.jpg", None, None)
    assert OneLine().format(record) == "vitrail: left out: \\x1b[2J\\udce9 caf\xe9 .jpg"


def test_warnings_are_shown_where_python_was_told_to() -> None:
    assert "UserWarning: a warning" in ran("-W", "always", "-c", NOISY, "noisy").stderr


def test_a_mistake_keeps_its_traceback() -> None:
    done = ran("-c", NOISY, "noisy", "now")
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: a mistake of vitrail's own\n")


def test_standard_error_comes_back() -> None:
    done = ran("-c", NOISY.replace("sys.exit(cli.main())", "cli.main(); os.write(2, b'after\\n')"), "noisy")
    assert done.stderr.endswith("vitrail: said\nafter\n")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """LZW-packed TIFFs of two classes, some of which libtiff complains about on descriptor 2."""
    for i in range(14):
        draw = np.random.default_rng(i)
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "TIFF", compression="tiff_lzw")
        data = bytearray(buffer.getvalue())
        if i % 3 == 2 and i < 12:
            data[2000:2040] = draw.bytes(40)
        folder = tmp_path / "data" / ("train" if i < 12 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.tif").write_bytes(data)
    return tmp_path / "data"


def test_damaged_files_leave_no_lines_of_their_decoders(damaged: Path) -> None:
    done = ran("-m", "vitrail", "predict", str(damaged), "--device", "cpu")
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 14
    assert done.stderr and all(str(damaged) in line for line in done.stderr.splitlines())


@pytest.mark.slow
def test_nor_do_they_in_workers(damaged: Path, tmp_path: Path) -> None:
    small = ["--image-size", "32", "32", "--stem", "4", "--width", "16", "--depth", "1", "--heads", "2"]
    command = ["train", "folder", "--data", str(damaged), "--out", str(tmp_path / "run"), "--epochs", "0.1"]
    options = ["--memory", "False", "--workers", "2", "--max-bad", "1", "--device", "cpu", *small]
    done = ran("-m", "vitrail", *command, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr and all(line.startswith("vitrail: ") for line in done.stderr.splitlines())


def test_images_that_come_out_dark_are_named_once(tmp_path: Path) -> None:
    """Cameras of 12 bits and satellites use fewer than 16 bits."""
    for i in range(3):
        Image.fromarray(np.full((32, 32), 3000 + i, np.uint16)).save(tmp_path / f"{i}.png")
    done = ran("-m", "vitrail", "predict", str(tmp_path), "--device", "cpu")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    assert done.stderr == (
        "vitrail: the 16-bit images use values up to 3,002 of 65,535 and come out dark, with 12 of 256 levels: "
        "rescale them to use the whole range\n"
    )
