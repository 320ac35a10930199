"""Several processes as people start them: one speaks, one fails for all, and none hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrail.cli import main
from vitrail.errors import RunError, UserError
from vitrail.train import launcher
from vitrail.train.launcher import STARTER, Bulletin, free_port, joined, loopback, wait_for
from vitrail.train.parallel import World

TINY = ["--fast-dev-run", "--device", "cpu", "--no-compile"]


def lines_of(work: Callable[[World], object], path: Path, count: int = 2) -> tuple[list[int | None], list[str]]:
    """The exit codes of ranks that do `work`, and what all of them print, as the command line does."""
    port, context = str(free_port()), multiprocessing.get_context("fork")
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def rank(number: int) -> None:
        sys.stderr = path.open("a", buffering=1)
        own = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            STARTER: str(os.getppid()),
            "GLOO_SOCKET_IFNAME": loopback(),
        }
        os.environ.update(shared | own)
        code = 0
        try:
            with joined("cpu") as world:
                work(world)
        except (UserError, RunError) as error:
            print(f"vitrail: {error}", file=sys.stderr)
            code = error.exit_code
        except Exception:
            code = 3
        sys.stderr.flush()
        os._exit(code)

    ranks = [context.Process(target=rank, args=(number,)) for number in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    return [process.exitcode for process in ranks], path.read_text().splitlines()


def test_an_error_of_one_process_is_one_line_and_ends_all(tmp_path: Path) -> None:
    def work(world: World) -> None:
        if world.rank == 1:
            raise RunError("the disk is full")
        world.all_gather_number(1)  # waits for the other one

    codes, lines = lines_of(work, tmp_path / "lines")
    assert lines == ["vitrail: process 1 of 2: the disk is full"]
    assert 0 not in codes and None not in codes


def test_an_error_of_all_is_told_once(tmp_path: Path) -> None:
    def work(world: World) -> None:
        raise UserError("lr must be a number of at least 0, got -1")

    codes, lines = lines_of(work, tmp_path / "lines")
    assert codes == [2, 2] and lines == ["vitrail: lr must be a number of at least 0, got -1"]


def test_a_process_without_a_sign_of_life_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a machine loses its power: no connection is closed, so the others wait for a message for ever."""
    monkeypatch.setattr(launcher, "GRACE", 0.1)
    monkeypatch.setattr(launcher, "BEAT", 0.02)
    monkeypatch.setattr(launcher, "SILENT", 20)
    beat = Bulletin.beat

    def beats(self: Bulletin) -> None:
        if self.rank == 0:
            beat(self)

    monkeypatch.setattr(Bulletin, "beat", beats)

    def work(world: World) -> None:
        if world.rank:
            time.sleep(600)  # until the other one has ended
        world.all_gather_number(1)

    codes, lines = lines_of(work, tmp_path / "lines")
    assert codes == [1, 1]
    assert lines == [
        "vitrail: process 0 of 2 lost another one, which was killed or whose machine failed: resume the run"
    ]


def test_only_the_first_process_speaks(tmp_path: Path) -> None:
    def work(world: World) -> None:
        print(f"vitrail: {world.rank} of {world.size} on {world.device}", file=sys.stderr)

    assert lines_of(work, tmp_path / "lines") == ([0, 0], ["vitrail: 0 of 2 on cpu"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--nproc", "0"], "--nproc must be at least 1, got 0"),
        (["--shard"], "--shard shares the weights among several processes: add --nproc N, or start with torchrun"),
    ],
)
def test_numbers_of_processes_that_cannot_be(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", *words]) == 2
    assert capsys.readouterr().err == f"vitrail: {line}\n"


def test_a_killed_process_is_named_and_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    quick, stuck = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    quick.kill()
    began = time.monotonic()
    assert wait_for([stuck, quick]) == (1, -signal.SIGKILL)
    assert time.monotonic() - began < 50 and stuck.poll() is not None


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_the_command_starts_processes_that_write_one_run(
    tmp_path: Path, shard: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "digits", *TINY, "--out", str(tmp_path / "run"), "--nproc", "2", "--json", *shard]
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["split"] == "test" and len(out.splitlines()) == 1
    assert err.count("fast dev run") == 1 and "Traceback" not in err
    assert (tmp_path / "run" / "best" / "model.safetensors").exists() and not (tmp_path / "run" / "lock").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("done") == 1
    assert rows[0]["command"].endswith(" ".join(command[-(4 + len(shard)) :])), "the command as it was typed"


@pytest.mark.slow
def test_torchrun_starts_them_too_and_refusals_come_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vitrail", "train"]
    words = ["digits", *TINY, "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *words, "--batch-size", "7"], capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if line.startswith("vitrail: ")]
    assert len(told) == 1 and "a batch of 7 cannot be divided among 2 processes" in told[0]
    assert not (tmp_path / "run").exists()
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("best weights") == 1, done.stderr
