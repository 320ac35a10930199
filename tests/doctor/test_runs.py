"""Faults of a run are named from its folder; a healthy one gives no finding."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_sets import clean
from images import folder_of

from vitrail.cli import main
from vitrail.data.preprocess import Preprocess
from vitrail.doctor import examine
from vitrail.recipes import RECIPES
from vitrail.tasks.task import Task
from vitrail.train.folder import RunFolder
from vitrail.train.optim import Optim
from vitrail.train.run import Run
from vitrail.train.tune import Tune
from vitrail.zoo import create

FALLING = [2.28, 1.7, 1.2, 0.9, 0.7, 0.55, 0.5]
CLASSES = [str(i) for i in range(10)]


def model(**preprocess: Any) -> Task:
    """A model for digits whose norms and biases have moved, as if it was trained."""
    torch.manual_seed(0)
    own = Preprocess(size=(8, 8), channels=1, **preprocess)
    task = create("nano/2", classes=CLASSES, channels=1, preprocess=own)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return task


def folder(
    root: Path,
    losses: list[float],
    run: Run | None = None,
    task: Task | None = None,
    val: list[float] | None = None,
    final: dict[str, Any] | None = None,
    **row: Any,
) -> Path:
    """The folder of a run on the digits with this log, and the weights of `task`."""
    written = RunFolder(root / "run")
    written.path.mkdir()
    written.begin(RECIPES["digits"](1437) if run is None else run, CLASSES)
    for i, loss in enumerate(losses, 1):
        written.log(kind="train", step=20 * i, loss=loss, **{"wait": 0.02, "skipped": 0, **row})
    for i, loss in enumerate(val or [1.5, 0.8, 0.7], 1):
        written.log(kind="val", step=40 * i, top1=0.9, cross_entropy=loss, count=142)
    if final is not None:
        written.end(final)
    (task or model()).save(written.last)
    return written.path


def checks(path: Path) -> list[str]:
    return [finding.check for finding in examine(str(path)).findings]


def digits(**changes: Any) -> Run:
    return replace(RECIPES["digits"](1437), **changes)


def test_healthy_run_gives_no_finding(tmp_path: Path) -> None:
    assert checks(folder(tmp_path, FALLING)) == []


@pytest.mark.parametrize(
    "check, how",
    [
        ("rate-too-high", {"losses": [2.3, 9.0, 4.0, 2.5, 2.4]}),
        ("rate-too-high", {"losses": [2.32, 2.31, 2.3, 2.31], "run": digits(optim=Optim(lr=0.3))}),
        ("rate-too-low", {"losses": [2.31, 2.3, 2.31, 2.3], "run": digits(optim=Optim(lr=1e-7))}),
        ("frozen", {"losses": [2.31, 2.305, 2.31, 2.3], "run": digits(optim=Optim(lr=0))}),
        ("loss-at-rest", {"losses": [2.31, 2.303, 2.302, 2.303, 2.304, 2.303]}),
        ("wrong-mean-std", {"losses": FALLING, "task": model(mean=(124.0,), std=(58.0,))}),
        ("wrong-mean-std", {"losses": FALLING, "task": model(mean=(0.5,), std=(0.002,))}),
        ("collapsed", {"losses": FALLING, "final": {"classes": CLASSES, "confusion": [[9] + [0] * 9] * 10}}),
        ("starved", {"losses": FALLING, "wait": 0.8, "run": digits(memory=False)}),
        ("overfit", {"losses": [*FALLING, 0.01], "val": [0.9, 0.8, 1.3]}),
        ("fast-dev-run", {"losses": FALLING, "run": digits(fast_dev_run=True)}),
    ],
)
def test_fault_is_named(check: str, how: dict[str, Any], tmp_path: Path) -> None:
    assert checks(folder(tmp_path, **how)) == [check]


def test_weights_that_stayed_those_of_init_are_frozen(tmp_path: Path) -> None:
    model().save(tmp_path / "init")
    frozen = digits(init=str(tmp_path / "init"), tune=Tune("frozen"))
    assert checks(folder(tmp_path, [2.3, 2.1, 2.0, 1.95, 1.94], run=frozen)) == ["frozen"]


def test_frozen_weights_that_fit_are_no_fault(tmp_path: Path) -> None:
    model().save(tmp_path / "init")
    assert checks(folder(tmp_path, FALLING, run=digits(init=str(tmp_path / "init"), tune=Tune("frozen")))) == []


def test_init_of_a_new_model_loaded_nothing(tmp_path: Path) -> None:
    create("nano/2", classes=CLASSES, channels=1).save(tmp_path / "init")
    assert checks(folder(tmp_path, FALLING, run=digits(init=str(tmp_path / "init")))) == ["loaded-nothing"]


def test_mean_other_than_that_of_init(tmp_path: Path) -> None:
    model(mean=(0.2,), std=(0.3,)).save(tmp_path / "init")
    changed = digits(init=str(tmp_path / "init"), mean=(0.6,))
    moved = model(mean=(0.6,), std=(0.3,))
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.01)
    assert checks(folder(tmp_path, FALLING, run=changed, task=moved)) == ["wrong-mean-std"]


def test_a_damaged_image_does_not_end_the_look_at_the_others(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", {"a": 8, "b": 8}, (8, 8))
    (root / "a" / "0.jpg").write_bytes(b"")
    wrong = model(mean=(124.0,), std=(58.0,))
    assert checks(folder(tmp_path, FALLING, run=digits(data=str(root)), task=wrong)) == ["wrong-mean-std"]


def test_command_prints_findings_of_a_run_and_of_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path, [2.3, 9.0, 4.0, 2.5, 2.4])
    assert main(["doctor", str(run), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["check"] == "rate-too-high"
    data, out = clean(tmp_path / "data"), tmp_path / "report.json"
    (data / "train" / "circle" / "circle0.png").write_bytes(b"")
    assert main(["doctor", str(data), "--images", "0", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "broken-files (certain)" in shown.out and "circle0.png" in shown.out and "1 finding" in shown.out
    assert "96 images read: 72 in train, 24 in val, 3 classes" in shown.err
    assert json.loads(out.read_text())["findings"][0]["check"] == "broken-files"


def test_what_a_run_does_not_have_is_told(tmp_path: Path) -> None:
    """A run that was stopped before its first evaluation has no weights, and a damaged log is no healthy one."""
    run = folder(tmp_path, FALLING)
    assert not [note for note in examine(str(run)).notes if "damaged" in note or "not checked" in note]
    with (run / "metrics.jsonl").open("a") as log:
        log.write("junk\n")
    shutil.rmtree(run / "last")
    notes = examine(str(run)).notes
    assert any("metrics.jsonl is damaged" in note for note in notes)
    assert "weights are not checked: the run has no checkpoint yet, which its first evaluation writes" in notes


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        ([str(tmp_path / "nothing")], "no data at"),
        ([str(tmp_path), "--out", "report.txt"], "the report is a JSON file: give --out report.json"),
        ([str(tmp_path), "--images", "-1"], "--images must be a number of at least 0"),
    ):
        assert main(["doctor", *words]) == 2
        assert told in capsys.readouterr().err
