"""The last states of a run: whole or passed over, and no more of them than wanted."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.errors import UserError
from vitrail.train.states import States

CPU = torch.device("cpu")


def values(step: int) -> dict[str, Any]:
    return {"module": {"weight": torch.full((3, 4), float(step))}, "best": step / 10}


def saved(path: Path, *steps: int, keep: int = 2) -> States:
    """States of these steps, of which each even one has new best weights."""
    states, best = States(path / "state"), None
    for step in steps:
        if step % 2 == 0:
            best = states.best(step)
            best.mkdir(parents=True)
            (best / "model.safetensors").write_bytes(bytes([step] * 1000))
        states.write(step, values(step), best, keep)
    return states


def names(states: States) -> list[str]:
    return sorted(path.relative_to(states.path).as_posix() for path in states.path.rglob("*") if path.is_file())


def files_of(*steps: int) -> list[str]:
    return [f"step-{step}.{ending}" for step in steps for ending in ("pt", "sha256")]


@pytest.mark.parametrize("keep, steps", [(1, [9]), (2, [7, 9]), (3, [5, 7, 9]), (9, [2, 5, 7, 9])])
def test_the_last_states_are_kept_with_the_best_weights_that_they_need(
    keep: int, steps: list[int], tmp_path: Path
) -> None:
    states = saved(tmp_path, 2, 5, 7, 9, keep=keep)
    assert states.steps() == steps
    assert names(states) == sorted(
        [f"step-{s}.{end}" for s in steps for end in ("pt", "sha256")] + ["best-2/model.safetensors"]
    )
    found = states.newest(CPU)
    assert found is not None and found.step == 9 and found.best == states.best(2)
    assert torch.equal(found.values["module"]["weight"], values(9)["module"]["weight"])
    states.write(10, values(10), None, keep)
    assert states.best(2).exists() == (keep > 1), "the last one needs none"


def test_the_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    states = saved(tmp_path, 2)
    for line in (states.path / "step-2.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((states.path / name).read_bytes()).hexdigest() == digest


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "step-4.pt, cut": (cut, "step-4.pt has another digest than when it was written"),
    "step-4.pt, flip": (flip, "step-4.pt has another digest"),
    "step-4.pt, empty": (lambda path: path.write_bytes(b""), "step-4.pt has another digest"),
    "best-4/model.safetensors, flip": (flip, "best-4/model.safetensors has another digest"),
    "best-4/model.safetensors, lost": (Path.unlink, "best-4/model.safetensors: No such file"),
    "step-4.sha256, lost": (Path.unlink, "step-4.sha256: No such file"),
    "step-4.sha256, empty": (lambda path: path.write_bytes(b""), "step-4.sha256 does not name it"),
    "step-4.sha256, binary": (lambda path: path.write_bytes(b"\xff\x00"), "step-4.sha256 is no text"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_passed_over_with_one_line(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = saved(tmp_path, 2, 3, 4)
    damage, words = DAMAGE[what]
    damage(states.path / what.split(",")[0])
    found = states.newest(CPU)
    assert found is not None and found.step == 3 and found.best == states.best(2)
    [line] = caplog.messages
    assert "step-4.pt is damaged (" in line and words in line and line.endswith("from the state after step 3 instead")
    assert names(states) == ["best-2/model.safetensors", "step-3.pt", "step-3.sha256"], "and it is gone"
    caplog.clear()
    assert states.newest(CPU) is not None and not caplog.messages


def test_states_that_are_all_damaged_are_one_line(tmp_path: Path) -> None:
    states = saved(tmp_path, 2, 3)
    cut(states.path / "step-3.pt")
    flip(states.path / "best-2" / "model.safetensors")
    with pytest.raises(UserError, match=r"step-3.*; .*step-2.*: remove .*state to start the run again") as caught:
        states.newest(CPU)
    assert "\n" not in str(caught.value) and states.steps() == [2, 3], "nothing is removed"


def test_a_whole_file_that_is_no_state_is_one_line(tmp_path: Path) -> None:
    states = saved(tmp_path, 3)
    (states.path / "step-3.pt").write_bytes(b"junk")
    (states.path / "step-3.sha256").write_text(f"{hashlib.sha256(b'junk').hexdigest()}  step-3.pt\n")
    with pytest.raises(UserError, match=r"step-3.pt cannot be read \(.*\): remove .*state to start the run again"):
        states.newest(CPU)


@pytest.mark.parametrize("ending", [".sha256", ".pt"])
def test_a_write_that_stops_before_a_rename_leaves_the_states_of_before(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a killed process does, which cleans up nothing."""
    states = saved(tmp_path, 2, 3)
    replace, unlink = os.replace, Path.unlink

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith(f"step-4{ending}"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda path, **named: None)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 4)
    assert unlink is Path.unlink and states.steps() == [2, 3] and len(names(states)) > 6
    found = states.newest(CPU)
    assert found is not None and found.step == 3
    assert names(states) == [
        "best-2/model.safetensors",
        *(f"step-{s}.{end}" for s in (2, 3) for end in ("pt", "sha256")),
    ]


def test_no_state_is_no_error(tmp_path: Path) -> None:
    states = States(tmp_path / "state")
    assert states.newest(CPU) is None and states.steps() == []
    saved(tmp_path, 2)
    shutil.rmtree(states.path)
    assert states.newest(CPU) is None
