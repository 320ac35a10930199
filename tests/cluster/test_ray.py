"""Prediction and training by a local Ray: the rows of `predict`, each once, and a stop that costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.cluster.ray_predict import Workers, allotted
from vitrail.errors import UserError

SRC = Path(__file__).resolve().parents[2] / "src"
NEEDS_RAY = "needs Ray: pip install 'vitrail[cluster]'"


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for i in range(11):
        place = Path("images") / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place)
    Path("images/a/broken.jpg").write_bytes(b"")
    return Path("images")


def ray(*words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, as Ray keeps threads and settings."""
    pytest.importorskip("ray", reason=NEEDS_RAY)
    environment = {**os.environ, "PYTHONPATH": str(SRC), "RAY_worker_niceness": "0"}
    command = [sys.executable, "-m", "vitrail", "cluster", "ray", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


def rows_of(folder: str) -> dict[str, dict[str, Any]]:
    rows = ds.dataset(folder).to_table().to_pylist()
    found = {row["image"]: {name: value for name, value in row.items() if value is not None} for row in rows}
    assert len(found) == len(rows), "none twice"
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_rows_are_those_of_predict_and_a_second_command_adds_none(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "classify", "--data", "images", "--out", "rows", "--address", "local"]
    done = ray(*words, "--workers", "2", "--batch-size", "4", "--top", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rows: 12 rows in 1 Parquet files, 1 with an error\n"
    assert all(line.startswith("vitrail: ") for line in done.stderr.splitlines()), done.stderr
    assert main(["predict", "images", "--json", "--top", "1", "--device", "cpu"]) == 2
    expected = {row["image"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    found = rows_of("rows")
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        if "error" in row:
            assert found[name] == row
        else:
            [label], [other] = found[name]["labels"], row["labels"]
            assert label["label"] == other["label"] and label["score"] == pytest.approx(other["score"], abs=1e-5)
    again = ray(*words, "--top", "1")
    assert again.returncode == 0 and "rows has rows of 12 of 12 images already" in again.stderr
    other = ray(*words, "--top", "2")
    assert other.returncode == 2 and "rows holds predictions with other options: choose another --out" in other.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_of_parquet_that_are_missing_are_added(images: Path) -> None:
    files = sorted(images.rglob("*.png"))
    column = [{"bytes": file.read_bytes(), "path": file.name} for file in files] + [{"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": column}), "set.parquet", row_group_size=5)
    words = ["predict", "classify", "--data", "set.parquet", "--out", "rows", "--address", "local", "--workers", "1"]
    assert ray(*words).returncode == 0
    names = set(rows_of("rows"))
    assert len(names) == 12
    [file] = Path("rows").glob("*.parquet")
    pq.write_table(pq.read_table(file).slice(0, 7), file)  # as if the first command had been killed
    done = ray(*words)
    assert done.returncode == 0 and "rows has rows of 7 of 12 images already" in done.stderr, done.stderr
    assert set(rows_of("rows")) == names


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_is_the_train_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["digits", "--width", "16", "--depth", "1", "--heads", "2", "--fast-dev-run", "--out", "runs/x"]
    done = ray("train", "--cpu", "--address", "local", "--", *words)
    assert done.returncode == 0, done.stderr
    assert Path("runs/x/report.html").is_file()
    failed = ray(
        "train", "--cpu", "--address", "local", "--max-failures", "0", "--", *words[:-1], "runs/y", "--data", "no"
    )
    assert failed.returncode == 1 and "vitrail train ended with exit code 2" in failed.stderr, failed.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (["predict", "classify", "--data", "images", "--out", "rows"], "pip install 'vitrail[cluster]'"),
        (["train", "--cpu", "--", "digits", "--out", "runs/x"], "pip install 'vitrail[cluster]'"),
        (["train", "digits"], "write the recipe after two dashes"),
        (["train", "--", "digits"], "name the run's folder with --out"),
        (["train", "--", "digits", "--out", "x", "--nproc", "2"], "--nproc has no meaning here"),
        (["train", "--device", "cpu", "--", "digits", "--out", "x"], "--device has no meaning here"),
        (["train", "--", "train", "digits", "--out", "x"], "leave out `train` after the two dashes"),
        (["train", "--workers", "0", "--", "digits", "--out", "x"], "--workers must be at least 1"),
        (["train", "--", "digits", "--out", "x", "--epoch", "2"], "did you mean --epochs?"),
        (["predict", "classify", "--data", "images", "--out", "rows", "--workers", "0"], "must be at least 1"),
        (
            ["predict", "classify", "--data", "images", "--out", "rows", "--gpus-per-worker", "-1"],
            "--gpus-per-worker must be at least 0, got -1",
        ),
        (
            ["predict", "classify", "--data", "images", "--out", "rows", "--device", "cpu"],
            "--device has no meaning here",
        ),
        (["predict", "classify", "--data", "images", "--out", "rows", "--beams", "2"], "unknown option --beams"),
        (["serve"], "choose from predict, train"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    words: list[str], said: str, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["cluster", "ray", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not Path("rows").exists() and not Path("runs").exists()


def test_what_each_worker_gets() -> None:
    assert allotted(Workers(), {"CPU": 4.0}) == (4, 0.0, 0.8)
    assert allotted(Workers(), {"CPU": 16.0, "GPU": 2.0}) == (2, 1.0, 1.0)
    assert allotted(Workers(gpus=0.5), {"CPU": 16.0, "GPU": 2.0}) == (4, 0.5, 1.0)
    with pytest.raises(UserError, match="room for 2: lower --workers"):
        allotted(Workers(count=3), {"CPU": 16.0, "GPU": 2.0})
    with pytest.raises(UserError, match="lower --gpus-per-worker"):
        allotted(Workers(gpus=1.0), {"CPU": 16.0})
    with pytest.raises(UserError, match="no CPU cores"):  # a head node that runs nothing itself
        allotted(Workers(), {"memory": 1e9})
