"""torchrun under a scheduler: signals reach the processes, and their exit code reaches the job's script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitrail.cluster.torchrun import pass_on

PROCESS = """
import os, signal, sys, time
rank = os.environ["RANK"]
place = sys.argv[1]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open(f"{place}/{rank}", "w").close()
if sys.argv[2] == "wait" or (sys.argv[2] != "0" and rank == "0"):
    time.sleep(100)
sys.exit(int(sys.argv[2]) if rank == "1" else 0)
"""


def started(folder: Path, how: str) -> subprocess.Popen[str]:
    """Two processes of torchrun: they wait for a signal, or the second ends with an exit code while the first works."""
    script = folder / "process.py"
    script.write_text(PROCESS)
    words = ["--standalone", "--nproc-per-node=2", str(script), str(folder), how]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "vitrail.cluster.torchrun", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_usr1_reaches_the_processes_and_75_the_caller(tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 75


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 2])
def test_a_process_that_fails_is_told_apart_from_one_that_saved(tmp_path: Path, code: int) -> None:
    process = started(tmp_path, str(code))
    said = process.communicate(timeout=200)[1]
    assert process.returncode == code
    assert ("vitrail: processes failed with exit code 2\n" in said) == bool(code)


def test_a_thread_that_ends_while_a_signal_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "children").write_text("77 78 ")
    sent: list[int] = []

    def kill(process: int, number: int) -> None:
        if process == 77:
            raise ProcessLookupError
        sent.append(process)

    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([tmp_path / "1", tmp_path / "2"]))  # the first has ended
    monkeypatch.setattr(os, "kill", kill)
    pass_on(signal.SIGUSR1, None)
    assert sent == [78]
