"""Runs that are resumed with data that has moved, with other settings, or beyond their end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.train.folder import RunFolder
from vitrail.train.optim import factor
from vitrail.train.step import train_step

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--image-size", "16", "--stem", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name, light in (("dark", 0), ("light", 100)):
        Path("data", name).mkdir(parents=True)
        for i in range(20):
            pixels = draw.integers(light, light + 100, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("data", name, f"{i}.png"))
    monkeypatch.setattr("vitrail.train.loop.LOG_EVERY", 1)


def start(out: str, *options: str) -> int:
    """The exit code of a run of six steps in two epochs, by default in memory."""
    more = ["--batch-size", "12", "--max-steps", "6", "--eval-every", "1", "--save-every", "2", *options]
    return main(["train", "folder", "--data", "data", "--out", out, *more, *TINY])


def begun(out: str, *options: str) -> RunFolder:
    """The folder of such a run."""
    assert start(out, *options) == 0
    return RunFolder(Path(out))


def unfinished(folder: RunFolder, step: int = 4) -> None:
    """As if the run had been killed after a step of which the state was saved."""
    for path in folder.states.path.glob("step-*"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()
    folder.report.unlink()


def resume(*options: object) -> int:
    return main(["train", "--resume", "run", "--device", "cpu", *map(str, options)])


def refused(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    capsys.readouterr()
    assert resume(*options) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("vitrail: ") and said.err.count("\n") == 1, said.err
    return said.err


def weights(run: str) -> dict[str, Any]:
    return vitrail.load(Path(run) / "last").state_dict()


def test_data_that_has_moved_is_named_and_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun("run")
    before = weights("run")
    unfinished(folder)
    shutil.move("data", "moved")
    was = tmp_path / "data"
    assert f"no data at {was}, where the run's data was: if it has moved, add --data" in refused(capsys)
    shutil.copytree("moved", "other")
    Path("other/dark/0.png").rename("other/dark/30.png")
    assert "other has changed since the run started: images of its train split" in refused(capsys, "--data", "other")
    assert resume("--data", "moved") == 0
    assert all(torch.equal(value, before[name]) for name, value in weights("run").items())
    assert folder.run().data == "moved"
    unfinished(folder)
    assert resume() == 0, "and later resumes find it there"
    assert json.loads(Path("run/data.json").read_text())["path"] == str(tmp_path / "moved")


def test_images_that_change_sides_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Their content decides which are held back: a folder of smaller copies would be validated on learned images."""
    folder = begun("run")
    unfinished(folder)
    shutil.copytree("data", "smaller")
    for path in Path("smaller").rglob("*.png"):
        with Image.open(path) as image:
            image.resize((12, 10)).save(path)
    assert "other images would be held back for validation" in refused(capsys, "--data", "smaller")
    with Image.open("data/dark/0.png") as image:
        image.save("data/dark/0.png")  # the same bytes
    assert resume() == 0


def test_a_recipe_that_was_edited_is_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    """Its steps before and after would be those of two runs, under one name."""
    folder = begun("run")
    unfinished(folder)
    recipe = Path("run/recipe.json")
    whole = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**whole, "batch_size": 8, "optim": {**whole["optim"], "lr": 0.1}, "keep": 3}))
    assert "run/recipe.json was edited since the run was saved (lr, batch_size)" in refused(capsys)
    recipe.write_text(json.dumps({**whole, "keep": 3}))
    assert resume() == 0, "what may change may change there too"


def test_a_folder_of_runs_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/seed=0").mkdir(parents=True)
    Path("run/seed=0/recipe.json").write_text("{}")
    assert "one run by its folder, as run/seed=0" in refused(capsys)
    assert main(["doctor", "run"]) == 2
    assert "run holds runs in subfolders, as a grid does: give one of them" in capsys.readouterr().err


def test_a_run_is_not_written_into_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    """Class lists of masks, for one, are called classes.json too."""
    assert main(["train", "folder", "--data", "data", "--out", "../" + Path.cwd().name + "/data", *TINY]) == 2
    assert "is the folder of the data" in capsys.readouterr().err and not Path("data/recipe.json").exists()


def test_options_that_a_finished_run_does_not_take_are_named(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    begun("run")
    assert resume("--keep", 4, "--data", "elsewhere") == 0
    assert "the run in run is finished, so --keep, --data changed nothing" in caplog.messages
    assert resume("--data", "data") == 0 and caplog.messages.count("the run in run is finished") == 1
    assert "--keep must be at least 1" in refused(capsys, "--keep", 0)


@pytest.mark.parametrize("file", ["scores.json", "examples.json", "report.html"])
def test_a_run_that_is_killed_after_its_end_ends_once_more(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith(file):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert start("run") == 130
    folder, before = RunFolder(Path("run")), weights("run")
    assert folder.scores is None and resume() == 0 and folder.scores is not None
    assert all(torch.equal(value, before[name]) for name, value in weights("run").items())
    ends = [(row["kind"], row["step"]) for row in folder.rows()][-3:]
    assert ends == [("val", 6), ("start", 6), ("done", 6)], "the last evaluation is that of before"


def test_longer_runs_continue_on_the_longer_schedule(caplog: pytest.LogCaptureFixture) -> None:
    folder = begun("run", "--schedule", "cosine", "--warmup", "0")
    rate = folder.run().optim.lr
    assert resume("--max-steps", "10") == 0
    optim = folder.run().optim
    rates = {row["step"]: row["lr"] for row in folder.rows() if row["kind"] == "train"}
    spans = [6] * 6 + [10] * 4
    assert rates == {i + 1: pytest.approx(rate * factor(optim, i, spans[i])) for i in range(10)}
    [line] = [line for line in caplog.messages if "is extended" in line]
    was, now = factor(optim, 5, 6), factor(optim, 5, 10)
    assert line == (
        "the run is extended from 6 to 10 steps, over which its schedule (cosine) now stretches: after step 6 the "
        f"learning rate continues at {now:.1%} of the peak, where it was {was:.1%}"
    )
    ends = [row["step"] for row in folder.rows() if row["kind"] == "done"]
    assert ends == [10] and folder.run().max_steps == 10
    assert resume() == 0 and folder.rows()[-1]["step"] == 10, "it is finished"


def test_a_longer_run_that_is_stopped_stays_longer(capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun("run")
    assert resume("--max-steps", "9") == 0
    long = weights("run")
    shutil.rmtree("run")
    begun("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.train.loop.train_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert resume("--max-steps", "9") == 130
    assert folder.scores is None and not folder.report.exists() and resume() == 0
    assert all(torch.equal(value, long[name]) for name, value in weights("run").items())
    assert folder.rows()[-1]["step"] == 9


def test_what_cannot_change_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun("run")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert "--lr: a resumed run keeps its settings: only --data, --epochs, --max-steps, " in refused(capsys, "--lr", 1)
    assert "did you mean --max-steps" in refused(capsys, "--max-step", 9)
    assert "the run has 6 steps (2 epochs), and would have 5: a run" in refused(capsys, "--max-steps", 5)
    assert "the run ends after --max-steps 6: raise that" in refused(capsys, "--epochs", 50)
    assert "give no recipe, --init, --out or --group" in refused(capsys, "--out", "other")
    assert "with its own recipe: leave out folder" in refused(capsys, "folder")
    assert "keep must be at least 1" in refused(capsys, "--max-steps", 9, "--keep", 0)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_settings_on_which_no_step_depends_may_change() -> None:
    folder = begun("run", "--memory", "False", "--workers", "1")
    before = weights("run")
    unfinished(folder)
    assert resume("--workers", 0, "--keep", 5, "--save-every", 1) == 0
    assert all(torch.equal(value, before[name]) for name, value in weights("run").items())
    run = folder.run()
    assert (run.workers, run.keep, run.save_every) == (0, 5, 1) and folder.states.steps() == [2, 4, 5, 6][1:]


def test_a_run_that_met_too_many_bad_images_is_resumed_with_a_larger_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count(1)

    def damaging(*args: Any) -> Any:
        if next(steps) == 4:
            Path("data/dark/3.png").write_bytes(b"")
        return train_step(*args)

    monkeypatch.setattr("vitrail.train.loop.train_step", damaging)
    more = ["--batch-size", "12", "--max-steps", "12", "--save-every", "1", "--memory", "False", "--workers", "1"]
    assert main(["train", "folder", "--data", "data", "--out", "run", *more, *TINY]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 40 images of data are bad, more than 1.0% (dark/3.png: the file is empty): " in line
    assert "or raise --max-bad" in line
    assert refused(capsys).endswith("or raise --max-bad\n")
    assert resume("--max-bad", "0.1") == 0
    assert RunFolder(Path("run")).rows()[-1]["step"] == 12


def test_a_run_with_a_frozen_encoder_has_no_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "folder", "--data", "data", "--out", "base", "--max-steps", "1", *TINY]) == 0
    tuned = ["--init", "base", "--method", "linear", "--out", "run", "--device", "cpu"]
    assert main(["train", "finetune", "--data", "data", *tuned]) == 0
    assert "method linear trains in one pass, so --epochs has no effect" in refused(capsys, "--epochs", 90)
