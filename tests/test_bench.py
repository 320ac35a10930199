"""Measuring scripts run from end to end, on sizes whose figures mean nothing."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_gpu_script_goes_through_its_stages(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "attention", "data", "step-b16", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert set(rows) == {"attention", "data", "step-b16"}
    assert rows["data"]["batches of 1 and 64 alike"] and rows["step-b16"]["vitrail"]["pictures a second"] > 0


def test_rungs_of_the_ladder_get_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trainings whose first three fifths of steps take a second and the others two, on one core."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    ladder = importlib.import_module("ladder")
    made: list[dict[str, str]] = []

    def train(command: list[str], **_: Any) -> SimpleNamespace:
        options = {name: value for name, value in itertools.pairwise(command) if name.startswith("--")}
        made.append({"recipe": command[4], **options})
        an_epoch = ladder.PICTURES[Path(options["--data"]).name] // ladder.recipe_of(command[4]).batch_size
        steps = round(float(options["--epochs"]) * an_epoch)
        marks = {*range(20, steps, 20), steps}
        rows = [{"kind": "train", "step": s, "seconds": s + max(0.0, s - 0.6 * steps)} for s in sorted(marks)]
        rows.append({"kind": "val", "cider": 1 / float(options["--lr"]), "bleu4": 0.1})
        Path(options["--out"]).mkdir(parents=True)
        (Path(options["--out"]) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(stdout='{"parameters": 5, "cider": -1}')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder.subprocess, "run", train)
    monkeypatch.setattr(ladder, "machine", lambda: {"cores": 1, "bf16": False})
    monkeypatch.setattr(
        ladder, "record", lambda name, rows, to: (to / f"{name}.json").write_text(json.dumps({"rows": rows}))
    )
    budget = {"core_minutes": 40.0, "try_core_minutes": 10.0}
    for name in ladder.RUNGS:
        ladder.measure(name, Path("data"), [0], budget, tmp_path)
        row = json.loads((tmp_path / f"ladder-{name}.json").read_text())["rows"]
        assert row["rate"] == 0.5, "the rate with the best score on validation"
        assert [tried["training_seconds"] for tried in row["tries"]] == pytest.approx([600] * 3, rel=0.03)
        assert [run["training_seconds"] for run in row["runs"]] == pytest.approx([2400], rel=0.03)
    assert all("--init" in command for command in made if command["recipe"] == "caption-coca"), "timed too"
    # What is there is not made again, and another seed takes as many epochs.
    before = len(made)
    ladder.measure("f", Path("data"), [0, 1], budget, tmp_path)
    first, second = made[before:]
    assert (first["recipe"], second["recipe"], second["--init"]) == ("caption-match", "caption-coca", first["--out"])
    row = json.loads((tmp_path / "ladder-f.json").read_text())["rows"]
    assert row["runs"][0]["epochs"] == row["runs"][1]["epochs"] and second["--seed"] == "1"
    # A faster kind of processor trains for more epochs in the same time, so nothing of the slower one is kept.
    monkeypatch.setattr(ladder, "machine", lambda: {"cores": 1, "bf16": True})
    before = len(made)
    ladder.measure("e", Path("data"), [0], budget, tmp_path)
    assert len(made) == before + 5, "its speed, three tries and the run"


@pytest.mark.parametrize("left", ["stopped", "done", "no state", "another rate"])
def test_a_stopped_training_of_the_ladder_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """One that is done, that has saved nothing or that was another command begins anew."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    ladder = importlib.import_module("ladder")
    climb, out = ladder.Climb(ladder.RUNGS["e"], Path("data"), tmp_path), tmp_path / "caption-vit"
    commands: list[list[str]] = []

    def train(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command[3:])
        kind = "done" if left == "done" else "train"
        rows = [{"kind": "start", "command": shlex.join(["vitrail", *commands[0]])}, {"kind": "train", "seconds": 1}]
        rows += [{"kind": "val", "cider": 0.2}, {"kind": kind, "seconds": 2}]
        (out if left == "no state" else out / "state").mkdir(parents=True, exist_ok=True)
        torn = '{"kind": "tr' if left == "stopped" else ""  # by the kill
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
        return SimpleNamespace(stdout='{"parameters": 5}')

    monkeypatch.setattr(ladder.subprocess, "run", train)
    climb.train("caption-vit", 2.0, 1.0, 0)
    climb.train("caption-vit", 2.0, 0.5 if left == "another rate" else 1.0, 0)
    first, second = commands
    assert first[:2] == ["train", "caption-vit"]
    if left == "stopped":
        assert second == ["train", "--resume", str(out), "--json"]
    else:
        assert second[:2] == ["train", "caption-vit"]
