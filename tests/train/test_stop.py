"""Runs that are interrupted anywhere: each ends with the bits of the run that nothing disturbed."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_same, small_run, train
from torch import Tensor

from vitrail import files
from vitrail.data.loader import Batch, Loader
from vitrail.errors import Preempted, RunError, Stopped, UserError
from vitrail.process import PREEMPTING
from vitrail.tasks.task import Task
from vitrail.train import loop
from vitrail.train.folder import RunFolder
from vitrail.train.step import train_step
from vitrail.train.stop import Halt, Stop, preemptible

RUN = small_run(eval_every=0.2, save_every=3)
"""states after each third step, evaluations after each eighth and the last, of 30"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and log of the run that nothing disturbs."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return train(RUN, path), rows(path)


TIMES = ("seconds", "images_per_s", "wait")


def rows(path: Path) -> list[dict[str, Any]]:
    """The log without times, and without the row of each start."""
    kept = [row for row in RunFolder(path).rows() if row["kind"] != "start"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in kept]


def on_call(number: int, act: Callable[[], object], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which acts first in its call of that number."""
    calls = itertools.count(1)

    def wrapped(*args: Any, **named: Any) -> Any:
        if next(calls) == number:
            act()
        return function(*args, **named)

    return wrapped


def killed_in_step_26(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", on_call(26, kill, train_step))
        with pytest.raises(KeyboardInterrupt):
            train(RUN, path)


def test_signals_in_steps_and_evaluations_leave_the_same_bits(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    places: list[tuple[object, str, Any, int, signal.Signals, type[Stopped], int]] = [
        (loop, "train_step", train_step, 5, signal.SIGTERM, Preempted, 5),
        (Task, "evaluate", Task.evaluate, 1, PREEMPTING[-1], Preempted, 8),
        (Loader, "_plan", Loader._plan, 4, signal.SIGINT, Stopped, 11),  # while it waits for data
        (Task, "evaluate", Task.evaluate, 3, signal.SIGTERM, Preempted, 30),
    ]
    for i, (owner, name, function, number, how, outcome, step) in enumerate(places):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, on_call(number, partial(os.kill, os.getpid(), how), function))
            with pytest.raises(outcome, match=rf"step {step} of 30 is saved: resume with `vitrail train") as caught:
                train(RUN, path, resume=i > 0)
        assert caught.type is outcome and outcome.exit_code == (130 if how == signal.SIGINT else 75)
        assert RunFolder(path).states.steps()[-1] == step
        if name == "evaluate":
            assert not [row for row in rows(path) if (row["kind"], row["step"]) == ("val", step)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *args, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # the last evaluation is made again, and its state was there
            train(RUN, path, resume=True)
    assert_same(train(RUN, path, resume=True), whole[0])
    assert rows(path) == whole[1]


def test_a_run_that_falls_back_to_an_older_state_has_the_best_weights_of_that_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`best/` of a later step must not stay: nothing says that the resumed run will find it again."""
    scores = iter((0.9, 0.8, 0.95))
    monkeypatch.setattr(loop, "evaluate", lambda *args, **named: {"top1": next(scores)})
    path = tmp_path / "run"
    killed_in_step_26(path, monkeypatch)
    folder = RunFolder(path)
    assert folder.states.steps() == [21, 24]
    assert (folder.best / "model.safetensors").samefile(folder.states.best(24) / "model.safetensors")
    best = (folder.states.best(8) / "model.safetensors").read_bytes()
    state = folder.states.path / "step-24.pt"
    state.write_bytes(state.read_bytes()[:-1])
    scores = iter((0.7, 0.6, 0.5))
    train(RUN, path, resume=True)
    assert (folder.best / "model.safetensors").read_bytes() == best
    assert [line for line in caplog.messages if "is resumed from the state after step 21 instead" in line]
    assert [row["top1"] for row in rows(path) if row["kind"] == "val"] == [0.9, 0.8, 0.7, 0.6]


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_whose_last_states_are_damaged_ends_with_the_same_bits_or_one_line(
    damaged: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    killed_in_step_26(path, monkeypatch)
    folder = RunFolder(path)
    for step in folder.states.steps()[-damaged:]:
        (folder.states.path / f"step-{step}.pt").write_bytes(b"")
    if damaged == RUN.keep:
        with pytest.raises(UserError, match="to start the run again from the beginning"):
            train(RUN, path, resume=True)
        return
    assert_same(train(RUN, path, resume=True), whole[0])
    assert rows(path) == whole[1]


def test_a_disk_that_fills_ends_the_run_with_a_good_older_state(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    monkeypatch.setattr(files, "RETRY_FOR", 0.0)
    save = torch.save

    def fill(values: Any, file: Any) -> None:
        if RunFolder(path).states.steps()[-1:] == [12]:
            file.write(b"half of the sta")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(values, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(RunError, match=r"cannot write \S*step-15.pt: No space left on device; the last good"):
            train(RUN, path)
    assert RunFolder(path).states.steps()[-1] == 12
    assert_same(train(RUN, path, resume=True), whole[0])
    assert rows(path) == whole[1]


def test_workers_that_die_leave_a_state(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, batches = tmp_path / "run", Loader.batches

    def failing(loader: Loader, start: int = 0) -> Iterator[Batch]:
        yield from itertools.islice(batches(loader, start), 10)
        raise RunError("a worker process was killed by SIGKILL")

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batches", failing)
        with pytest.raises(RunError, match=r"^a worker .*; step 10 of 30 is saved: resume with `vitrail"):
            train(RUN, path)
    assert_same(train(RUN, path, resume=True), whole[0])
    assert rows(path) == whole[1]


def test_a_clock_that_jumps_changes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle((2e9, 0.0, 1e9))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    train(RUN, tmp_path / "run", steps=12)
    logged = RunFolder(tmp_path / "run").rows()
    seconds = [row["seconds"] for row in logged if "seconds" in row]
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] < 1e6
    assert all(0 < row["images_per_s"] < 1e6 and row["wait"] >= 0 for row in logged if row["kind"] == "train")


def test_a_second_ctrl_c_ends_at_once_and_a_schedulers_signals_may_repeat() -> None:
    for first in (signal.SIGINT, *PREEMPTING):
        stop = Stop()
        stop.on_signal(first)
        for again in PREEMPTING:
            stop.on_signal(again)
        assert stop.requested and stop.outcome is (Stopped if first == signal.SIGINT else Preempted)
        with pytest.raises(KeyboardInterrupt):
            stop.on_signal(signal.SIGINT)
        with pytest.raises(Halt), stop.between_steps():
            raise AssertionError("a stop that was requested lets nothing more begin")


def end_by(how: signal.Signals) -> None:
    with preemptible():
        os.kill(os.getpid(), how)
        time.sleep(10)


@pytest.mark.parametrize("how", PREEMPTING)
def test_a_scheduler_ends_what_trains_nothing_at_once(how: signal.Signals) -> None:
    old = signal.getsignal(how)
    with pytest.raises(Preempted, match=f"stopped by {how.name}: run the command again") as caught:
        end_by(how)
    assert caught.value.exit_code == 75 and signal.getsignal(how) is old
