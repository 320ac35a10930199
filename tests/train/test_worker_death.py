"""A data worker that dies while several processes train: no image is lost, or the run ends with one line to resume."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from processes import in_ranks
from small_runs import CPU, small_run

from vitrail.cli import main
from vitrail.data.sets import Splits, open_data
from vitrail.train import loop
from vitrail.train.build import build
from vitrail.train.folder import Follower, RunFolder
from vitrail.train.loop import fit
from vitrail.train.parallel import World
from vitrail.train.step import AsyncScalars, train_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers' set would have to be pickled")


def kill_a_worker() -> None:
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)


def trained(world: World, path: Path, kill_in: int) -> tuple[list[list[int]], list[float]]:
    """The images and losses of each step; in one of them, a worker of rank 1 dies."""
    samples: list[list[int]] = []
    losses: list[float] = []

    def noted(run: Any, module: Any, batch: Any, *rest: Any) -> AsyncScalars:
        samples.append(batch["sample"].tolist())
        if len(samples) == kill_in and world.rank == 1:
            kill_a_worker()
        scalars = train_step(run, module, batch, *rest)
        losses.append(scalars.read()["loss"])
        return scalars

    run = replace(small_run(memory=False, workers=1, eval_every=100.0), batch_size=32)
    splits = open_data("digits")
    splits = Splits(splits.train.spread(300), splits.train.spread(40))
    components, _ = build(run, splits, CPU, world=world)
    folder = RunFolder(path) if world.is_main else Follower(path)
    folder.begin(run, components.task.classes)
    with patch.object(loop, "train_step", noted):
        fit(run, components, folder, 10)
    return samples, losses


@pytest.mark.slow
def test_a_worker_of_one_of_two_processes_is_started_again_from_its_missing_batch(tmp_path: Path) -> None:
    whole = in_ranks(2, False, trained, tmp_path / "whole", 0)
    assert in_ranks(2, False, trained, tmp_path / "run", 4) == whole


FAILING = """
import os, sys
from test_worker_death import kill_a_worker
from vitrail.data import workers
from vitrail.train import loop
from vitrail.train.step import train_step

workers.RESTARTS = 1
steps = 0

def step(*args):
    global steps
    steps += 1
    if steps in (5, 9) and os.environ["RANK"] == "1":
        kill_a_worker()
    return train_step(*args)

loop.train_step = step
from vitrail.cli import main
sys.exit(main(sys.argv[1:]))
"""
RUN = [
    *("train", "digits", "--width", "16", "--depth", "1", "--heads", "2", "--batch-size", "32", "--max-steps", "40"),
    *("--memory", "False", "--workers", "1", "--device", "cpu", "--save-every", "2", "--out", "run"),
]


@pytest.mark.slow
def test_workers_that_die_too_often_end_all_processes_with_one_line_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("failing.py").write_text(FAILING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "failing.py"]
    done = subprocess.run([*command, *RUN], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1 and RunFolder(Path("run")).states.steps() and not Path("run/lock").exists()
    [line] = [line for line in done.stderr.splitlines() if line.startswith("vitrail: process")]
    assert re.fullmatch(
        "vitrail: process 1 of 2: a worker process was killed by SIGKILL, probably because memory ran out, 2 times: "
        r"lower --workers or --batch-size; step \d+ of 40 is saved: resume with `vitrail train --resume run`",
        line,
    ), done.stderr
    assert main(["train", "--resume", "run", "--device", "cpu"]) == 0
    assert Path("run/report.html").exists()
