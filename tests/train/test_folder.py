"""One training per run folder, whatever is started beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vitrail.train.folder import RunFolder, Taken

HOLD = """
import sys
from pathlib import Path
from vitrail.train.folder import RunFolder
with RunFolder(Path(sys.argv[1])).new():
    print("mine", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that has taken the folder, and keeps it until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    return process


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_belongs_to_one_process_until_it_ends(killed: bool, tmp_path: Path) -> None:
    """Also one that is killed, of which the file of the lock stays."""
    folder = RunFolder(tmp_path / "runs" / "run")
    other = hold(folder.path)
    with pytest.raises(Taken, match="another process is training in .*run: wait"), folder.new():
        pass
    assert (folder.path / "lock").exists(), "whoever is refused leaves it"
    if killed:
        os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert [path.name for path in tmp_path.rglob("*")] == (["runs", "run", "lock"] if killed else [])
    with folder.new():
        assert (folder.path / "lock").exists()
    assert not list(tmp_path.rglob("lock"))


def test_an_error_leaves_no_folders_but_those_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine", "mine/made/run"):
        with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / name).new():
            raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in (".best.x1", ".best.old.x2", ".last.x3", "best", ".mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    for name in (".metrics.jsonl.x4", ".recipe.json.x5", "metrics.jsonl", ".notes"):
        (tmp_path / name).write_text("")
    folder.remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", ".notes", "best", "metrics.jsonl"]
