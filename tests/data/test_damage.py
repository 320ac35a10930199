"""Damaged files of every format are images, or get one line."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from vitrail.data.decode import BadImage, decode
from vitrail.data.preprocess import Preprocess

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("seed", [7])
def test_damaged_files(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    fuzz = importlib.import_module("fuzz")
    good, way, lines = 0, Preprocess((32, 32)), {}
    files = fuzz.write_files(tmp_path, 400, seed)
    assert len({file.suffix for file in files}) >= 9
    for file in files:
        try:
            image, made = decode(file, 3), way.prepare(file)
        except BadImage as error:
            lines[file] = str(error)
            continue
        good += 1
        assert image.dtype == torch.uint8 and len(image) == 3 and made.shape == (3, 32, 32)
    assert 60 < good < 300
    assert all(re.fullmatch(rf"{re.escape(str(file))}: \S.*", line) for file, line in lines.items())
