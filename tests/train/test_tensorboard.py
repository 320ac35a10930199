"""The log of a run for TensorBoard."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest

from vitrail import files
from vitrail.cli import main
from vitrail.train.folder import RunFolder
from vitrail.train.tensorboard import Events

SMALL = ["--width", "16", "--depth", "1", "--heads", "1", "--stem", "4", "--device", "cpu", "--workers", "0"]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in a folder as TensorBoard reads them: step and value, by tag."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_events_are_the_rows_of_the_log_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    how = ["--max-steps", "40", "--eval-every", "0.5", "--tensorboard", "--out", str(out)]
    assert main(["train", "digits", *SMALL, *how]) == 0
    for steps in (40, 60):  # the second resumes, and writes what follows
        if steps == 60:
            assert main(["train", "--resume", str(out), "--max-steps", "60", "--device", "cpu"]) == 0
        (file,) = (out / "tensorboard").iterdir()
        assert "tfevents" in file.name
        found, rows = read(out / "tensorboard"), RunFolder(out).rows()
        for tag in ("train/loss", "val/top1", "test/top1"):
            kind, name = tag.split("/")
            expected = [(row["step"], row[name]) for row in rows if row["kind"] == kind]
            assert [step for step, _ in found[tag]] == [step for step, _ in expected]
            assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected])
        assert max(step for step, _ in found["train/loss"]) == steps
        assert not [tag for tag in found if tag.endswith(("/step", "/seconds"))]


def test_a_disk_that_is_full_for_a_while_loses_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it end the run, as for the log itself."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(files, "RETRY_EVERY", 0.001)
    refused, opened = [True], Path.open

    def full(path: Path, *args: Any, **named: Any) -> Any:
        if refused and "tfevents" in path.name:
            refused.pop()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *args, **named)

    monkeypatch.setattr(Path, "open", full)
    events, rows = Events(tmp_path / "tensorboard"), list[dict[str, Any]]()
    for step in (20, 40):
        rows.append({"kind": "train", "step": step, "loss": step / 10})
        events.add(rows[-1], lambda: rows)
    assert not refused and read(tmp_path / "tensorboard") == {"train/loss": [(20, 2.0), (40, 4.0)]}


def test_a_missing_package_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", "digits", *SMALL, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'vitrail[track]'" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
