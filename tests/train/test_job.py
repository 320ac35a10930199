"""A job that is started again resumes the run that it began; for any other process the run's folder is taken."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from images import folder_of
from safetensors.torch import load_file

from vitrail.cli import main
from vitrail.train import loop
from vitrail.train.folder import RunFolder, Taken
from vitrail.train.job import JOB, marks
from vitrail.train.step import train_step

TINY = ["digits", "--width", "16", "--depth", "1", "--heads", "2", "--batch-size", "32", "--device", "cpu"]
SHORT = [*TINY, "--max-steps", "6", "--no-compile", "--workers", "0", "--save-every", "2"]
AGENT = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
TIMES = ("seconds", "images_per_s", "wait", "command")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (JOB, *AGENT):
        monkeypatch.delenv(name, raising=False)


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return {
        f"{kind} {name}": value
        for kind in ("best", "last")
        for name, value in load_file(Path(path) / kind / "model.safetensors").items()
    }


def log_of(path: str | Path) -> list[dict[str, Any]]:
    """The log without times and starts."""
    rows = [row for row in RunFolder(Path(path)).rows() if row["kind"] != "start"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def same_run(a: str | Path, b: str | Path) -> bool:
    one, other = weights(a), weights(b)
    equal = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return equal and log_of(a) == log_of(b)


def stopped_in_step(number: int, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a `train` command that gets SIGTERM in a step."""
    calls = itertools.count(1)

    def step(*args: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        return main(["train", *words])


def test_without_a_launcher_there_is_no_mark() -> None:
    assert marks({}) == [] and marks({"WORLD_SIZE": "2", "RANK": "0"}) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell when a process started")
def test_processes_of_one_torchrun_have_one_mark_and_those_of_another_have_another() -> None:
    tell = "import json; from vitrail.train.job import marks; print(json.dumps(marks()), flush=True)"
    twice = f"import subprocess, sys\nfor _ in range(2): subprocess.run([sys.executable, '-c', {tell!r}], check=True)"
    told = [
        subprocess.run([sys.executable, "-c", twice], env={**os.environ, **AGENT}, stdout=subprocess.PIPE, check=True)
        for _ in range(2)
    ]
    (one, again), (other, _) = ([json.loads(line) for line in each.stdout.splitlines()] for each in told)
    assert one == again and len(one) == 1 and set(one).isdisjoint(other)
    assert set(one).isdisjoint(marks(AGENT)) and marks(AGENT) != marks({**AGENT, "TORCHELASTIC_RUN_ID": "7"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["train", *SHORT, "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("out", [["--out", "x"], []])
def test_a_job_that_is_started_again_ends_as_an_undisturbed_one(
    out: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(JOB, "here")
    path = (out or ["", "runs/digits-0"])[1]
    assert stopped_in_step(5, [*SHORT, *out], monkeypatch) == 75
    assert RunFolder(Path(path)).states.steps()[-1] == 5
    assert main(["train", *SHORT, *out]) == 0
    assert f"the job of the run in {path} is started again, so that run is resumed" in caplog.messages
    assert same_run(whole, path) and not Path("runs/digits-0-2").exists()


def test_another_command_with_the_same_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(JOB, "here")
    assert stopped_in_step(3, [*SHORT, "--out", "x"], monkeypatch) == 75
    before = sorted(Path("x").rglob("*"))
    for job in ("elsewhere", ""):
        monkeypatch.setenv(JOB, job)
        assert main(["train", *SHORT, "--out", "x"]) == 2
        assert "x already holds a run: continue it with `vitrail train --resume x`" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # torchrun starts it again, since the first attempt was refused
        for name, value in (AGENT | {"TORCHELASTIC_RESTART_COUNT": "1"}).items():
            patch.setenv(name, value)
        assert main(["train", *SHORT, "--out", "x"]) == 2
    assert sorted(Path("x").rglob("*")) == before
    monkeypatch.setenv(JOB, "here")
    assert main(["train", *SHORT, "--out", "x", "--muon-lr", "0.5"]) == 2
    assert "x already holds a run: continue it with `vitrail train --resume x`" in capsys.readouterr().err
    for other in (["--data", "elsewhere"], ["--init", "classify"], ["--no-hflip"]):
        assert main(["train", *SHORT, "--out", "x", *other]) == 2, "not resumed with the settings of the first command"
    assert main(["train", *SHORT[:1], *SHORT[-6:], "--out", "x"]) == 2, "nor if it leaves flags out"
    assert sorted(Path("x").rglob("*")) == before
    # A command of the job may change what no step before the old end depends on.
    assert main(["train", *SHORT, "--out", "x", "--max-bad", "0.5", "--keep", "1"]) == 0
    assert RunFolder(Path("x")).run().max_bad == 0.5 and len(RunFolder(Path("x")).states.steps()) == 1
    assert main(["train", *SHORT, "--out", "x"]) == 0, "a finished run gives its scores again"
    assert "the run in x is finished" in caplog.messages


def test_a_job_resumes_on_its_own_data_and_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that was changed must not train on with what it no longer names; data may move, as to a new node."""
    monkeypatch.setenv(JOB, "here")
    for name in ("data", "other"):
        folder_of(Path(name), {"a": 6, "b": 6 + (name == "other")}, (8, 8))
    words = ["folder", "--out", "x", "--image-size", "8", "--patch", "4", "--batch-size", "4", "--no-balanced"]
    words += [*TINY[1:7], "--device", "cpu", "--max-steps", "4", "--save-every", "1", "--workers", "0"]
    assert stopped_in_step(2, [*words, "--data", "data"], monkeypatch) == 75
    capsys.readouterr()
    for changed, line in (
        (["--data", "other"], "other has changed since the run started: its train split had "),
        (["--data", "hf://datasets/a/b"], "the run in x has another data set than this command"),
    ):
        assert main(["train", *words, *changed]) == 2
        assert line in capsys.readouterr().err
    Path("data").rename("moved")
    assert main(["train", *words, "--data", "moved"]) == 0 and RunFolder(Path("x")).run().data == "moved"


def test_a_job_that_saved_nothing_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its first state, or refused: neither leaves a run."""
    monkeypatch.setenv(JOB, "here")

    def kill(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", kill)
        patch.setattr(RunFolder, "drop", lambda self: None)  # as SIGKILL leaves it
        assert main(["train", *SHORT, "--out", "x"]) == 130
    assert Path("x/job.json").exists() and not RunFolder(Path("x")).states.steps()
    assert main(["train", *SHORT, "--out", "x"]) == 0 and Path("x/report.html").exists()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", kill)
        assert main(["train", *SHORT, "--out", "y"]) == 130
    assert not Path("y").exists()


def test_a_job_waits_for_the_lock_of_a_machine_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system holds it for a while; another process that trains holds it for longer."""
    held = [True]

    def lock(handle: int, how: int) -> None:
        if held:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "lockf", lock)
    monkeypatch.setattr(time, "sleep", lambda seconds: held.pop())
    with RunFolder(tmp_path).alone(patience=100):
        pass
    held.append(True)
    with pytest.raises(Taken, match="another process is training in"), RunFolder(tmp_path).alone():
        pass


KILLED = """
import os, signal, sys, time
from pathlib import Path
from vitrail.train import loop
from vitrail.train.folder import RunFolder
from vitrail.train.step import train_step

steps, killed = 0, sys.argv[1]

def step(*args):
    global steps
    steps += 1
    if steps == 4 and os.environ["RANK"] == killed and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        while not RunFolder(Path(sys.argv[-1])).states.steps():  # which is written beside the training
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args)

loop.train_step = step
from vitrail.cli import main
sys.argv = ["vitrail", *sys.argv[2:]]
sys.exit(main(sys.argv[1:]))
"""


def torchrun(folder: Path, rank: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Two processes that torchrun starts, and starts again when one of them kills itself in its fourth step."""
    script = folder / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, "-m", "vitrail.cluster.torchrun", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(script), rank, "train", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_torchrun_resumes_the_run_of_a_process_that_was_killed(tmp_path: Path) -> None:
    undisturbed = torchrun(tmp_path, "none", [*SHORT, "--out", "whole"])
    assert undisturbed.returncode == 0, undisturbed.stderr
    done = torchrun(tmp_path, "0", [*SHORT, "--out", "x"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the job of the run in x is started again, so that run is resumed\n") == 1
    starts = [row["step"] for row in RunFolder(Path("x")).rows() if row["kind"] == "start"]
    assert starts == [0, 2], "the state after step 2 was the last one"
    assert same_run("whole", "x")
