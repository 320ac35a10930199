"""Early stopping: when a run ends, what it says, and that a resume ends at the same step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CPU, assert_same, small_run

from vitrail.cli import main
from vitrail.data.sets import open_data
from vitrail.errors import Stopped
from vitrail.train.build import build
from vitrail.train.folder import RunFolder
from vitrail.train.loop import fit
from vitrail.train.run import Run
from vitrail.train.stop import Halt
from vitrail.zoo import load


def train(
    run: Run, path: Path, scores: Sequence[float], monkeypatch: pytest.MonkeyPatch, resume: bool = False
) -> dict[str, Any]:
    """Train 12 steps with an evaluation every two, whose scores these are."""
    components, _ = build(run, open_data("digits"), CPU)
    folder = RunFolder(path)
    if not resume:
        folder.begin(run, components.task.classes)
    own = type(components.task).evaluate

    def evaluate(task: Any, loaders: Any, split: str = "val", *args: Any, **named: Any) -> dict[str, Any]:
        found = own(task, loaders, split, *args, **named)
        done = sum(row["kind"] == "val" for row in folder.rows())
        return {**found, "top1": scores[done]} if split == "val" else found

    with monkeypatch.context() as patch:
        patch.setattr(type(components.task), "evaluate", evaluate)
        return fit(run, components, folder, 12, resume)


def run_of(**changes: Any) -> Run:
    return small_run(eval_every=1.0, **changes)


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation every two steps of few images."""
    monkeypatch.setattr(Run, "images", 64)


STEPS = [(None, 12), (1, 6), (2, 8), (5, 12)]
SCORES = [0.2, 0.3, 0.3, 0.1, 0.2, 0.2, 0.2]


@pytest.mark.parametrize("patience, steps", STEPS)
def test_a_run_ends_after_so_many_evaluations_without_a_better_score(
    patience: int | None,
    steps: int,
    small_digits: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A score that is as good as the best is no better one, though its weights are kept."""
    found = train(run_of(patience=patience), tmp_path, SCORES, monkeypatch)
    rows = RunFolder(tmp_path).rows()
    assert max(row["step"] for row in rows) == steps == rows[-1]["step"] and rows[-1]["kind"] == "done"
    early = steps < 12
    assert found.get("stopped_early", False) is early
    told = f"stopped early after step {steps} of 12: no better top1 than 30.00 % in {patience} evaluations"
    assert (told in caplog.text) is early
    if early:
        assert "of its peak" in caplog.text


def test_a_resumed_run_ends_at_the_same_step_with_the_same_weights(
    small_digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(patience=2)
    train(run, tmp_path / "whole", SCORES, monkeypatch)
    from vitrail.train import loop

    step = loop.Training.step

    def stopped(self: Any, batch: Any) -> None:
        if self.done == 7:
            raise Halt(Stopped)
        step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "step", stopped)
        with pytest.raises(Stopped):
            train(run, tmp_path / "halves", SCORES, monkeypatch)
    assert RunFolder(tmp_path / "halves").states.steps()[-1] == 7
    train(run, tmp_path / "halves", SCORES, monkeypatch, resume=True)
    assert RunFolder(tmp_path / "halves").rows()[-1]["step"] == 8
    assert_same(*(dict(load(tmp_path / name / "last").state_dict()) for name in ("whole", "halves")))
    # Killed before its scores were written: it trains no further.
    (tmp_path / "halves" / "scores.json").unlink(missing_ok=True)
    train(run, tmp_path / "halves", SCORES, monkeypatch, resume=True)
    assert RunFolder(tmp_path / "halves").rows()[-1]["step"] == 8


def losses(path: Path) -> list[tuple[int, float]]:
    """The rows of training in a log."""
    return [(row["step"], row["loss"]) for row in RunFolder(path).rows() if row["kind"] == "train"]


def test_the_last_steps_of_a_run_that_stops_early_are_logged(
    small_digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run shorter than the distance of two rows has a training curve too. The row is none of a longer run."""
    train(run_of(patience=2), tmp_path / "run", SCORES, monkeypatch)
    assert [step for step, _ in losses(tmp_path / "run")] == [8]
    rows = RunFolder(tmp_path / "run").rows()
    assert next(row for row in rows if row["kind"] == "train")["images_per_s"] > 0
    first = losses(tmp_path / "run")
    train(run_of(patience=2), tmp_path / "run", SCORES, monkeypatch, resume=True)
    assert losses(tmp_path / "run") == first
    train(run_of(patience=5), tmp_path / "run", SCORES, monkeypatch, resume=True)
    train(run_of(patience=5), tmp_path / "whole", SCORES, monkeypatch)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "run")] == [12]


def test_a_row_that_was_just_logged_is_not_logged_again(
    small_digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.train.loop.LOG_EVERY", 4)
    train(run_of(patience=2), tmp_path / "run", SCORES, monkeypatch)
    first = losses(tmp_path / "run")
    train(run_of(patience=2), tmp_path / "run", SCORES, monkeypatch, resume=True)
    assert losses(tmp_path / "run") == first and [step for step, _ in first] == [4, 8]


def test_more_patience_continues_a_run_that_stopped_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitrail.train.keep.Keeper.score", _never_better(monkeypatch))
    small = ["--width", "16", "--depth", "1", "--heads", "1", "--stem", "4", "--device", "cpu", "--workers", "0"]
    how = ["--max-steps", "60", "--eval-every", "0.5", "--patience", "1", "--out", str(tmp_path / "run"), "--json"]
    assert main(["train", "digits", *small, *how]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["stopped_early"]
    steps = RunFolder(tmp_path / "run").rows()[-1]["step"]
    again = ["train", "--resume", str(tmp_path / "run"), "--json", "--device", "cpu"]
    assert main(again) == 0
    assert RunFolder(tmp_path / "run").rows()[-1]["step"] == steps
    assert main([*again, "--patience", "2"]) == 0
    assert RunFolder(tmp_path / "run").rows()[-1]["step"] > steps


def _never_better(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`Keeper.score` with the same score each time."""
    from vitrail.train.keep import Keeper

    own = Keeper.score

    def score(self: Keeper, step: int, score: float | None, sums: dict[str, float]) -> None:
        own(self, step, 0.5, sums)

    return score


def test_patience_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--patience", "0"]) == 2
    assert "--patience must be at least 1" in capsys.readouterr().err


def test_equal_scores_are_kept_as_the_best(small_digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run_of(patience=1), tmp_path, [0.3, 0.3, 0.3], monkeypatch)
    best, last = (load(tmp_path / name).state_dict() for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)
