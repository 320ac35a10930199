"""The cores and the memory of a process: what a container or a scheduler allows, not what the machine has."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vitrail import process
from vitrail.data import memory
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.process import _quota, cores, memory_left
from vitrail.train import device
from vitrail.train.device import limit_threads


def groups(root: Path, listing: str, **files: str) -> float:
    """The quota for a process in the groups `listing`, with these files below `root`; `__` in a name is a slash."""
    own = root / "cgroup"
    own.write_text(listing)
    for name, text in files.items():
        file = root / "fs" / name.replace("__", "/").replace("_max", ".max").replace("cfs", "cpu.cfs")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return _quota(own, root / "fs")


def test_version_2_takes_the_smallest_of_all_groups_above(tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/job/step\n", job__step__cpu_max="max 100000\n") == math.inf
    assert groups(tmp_path, "0::/job/step\n", job__cpu_max="250000 100000\n") == 2.5
    assert groups(tmp_path, "0::/job/step\n", cpu_max="150000 100000\n") == 1.5
    assert groups(tmp_path, "0::/\n") == 1.5


def test_version_1_has_the_quota_in_two_files(tmp_path: Path) -> None:
    listing = "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n"
    group = "cpu__docker__x__cfs"
    assert groups(tmp_path, listing, **{f"{group}_quota_us": "-1\n", f"{group}_period_us": "100000\n"}) == math.inf
    assert groups(tmp_path, listing, **{f"{group}_quota_us": "300000\n"}) == 3


@pytest.mark.parametrize("text", ["", "max", "x y\n", "0 0\n", "100000 0\n"])
def test_a_file_that_says_nothing_limits_nothing(text: str, tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/\n", cpu_max=text) == math.inf
    assert _quota(tmp_path / "missing", tmp_path) == math.inf


@pytest.mark.parametrize(
    "listing, folder, names, stat, left",
    [
        ("0::/job/step\n", "job", ("memory.max", "memory.current"), "anon 5\ninactive_file 200\n", 700),
        ("0::/job\n", "job", ("memory.max", "memory.current"), "anon 5\n", 500),
        (
            *("4:memory:/docker/x\n", "memory/docker/x", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
            *("inactive_file 1\ntotal_inactive_file 100\n", 600),
        ),
        ("4:cpu:/docker/x\n", "memory/docker/x", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "a 1\n", math.inf),
    ],
)
def test_the_memory_of_a_container_is_its_limit_without_what_it_holds(
    listing: str, folder: str, names: tuple[str, str], stat: str, left: float, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(listing)
    (tmp_path / "fs" / folder).mkdir(parents=True)
    for name, text in zip((*names, "memory.stat"), ("1000\n", "500\n", stat), strict=True):
        (tmp_path / "fs" / folder / name).write_text(text)
    assert memory_left(tmp_path / "cgroup", tmp_path / "fs") == left
    (tmp_path / "fs" / folder / names[0]).write_text("max\n")
    assert memory_left(tmp_path / "cgroup", tmp_path / "fs") == math.inf


def test_a_set_is_kept_in_memory_by_what_the_container_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    train = open_data("digits").train
    given = (train, train.target, Preprocess((8, 8), channels=1), None, torch.device("cpu"))
    size = len(train) * 64
    for left, kept in ((4 * size, True), (4 * size - 1, False), (-1, False)):
        monkeypatch.setattr(memory, "memory_left", lambda left=left: left)
        assert memory.fits(*given) is kept


def test_there_is_always_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cores()
    assert whole >= 1
    for quota, count in {0.25: 1, 1.75: 1, math.inf: whole}.items():
        monkeypatch.setattr(process, "_quota", lambda quota=quota: quota)
        assert cores() == count


def test_threads_are_lowered_to_the_cores_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(device, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    limit_threads()
    assert given == [], "the user's own choice"
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert given == [2]
    monkeypatch.setattr(device, "cores", lambda: 128)
    limit_threads()
    assert given == [2]
