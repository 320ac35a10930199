"""Whole commands, run as a user runs them: what they print, where, and their exit codes."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.data.sets import open_data
from vitrail.recipes import RECIPES
from vitrail.train.state import RunFolder

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", "--out", str(out), "--epochs", "3", *TINY]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    """The one line that a command ends with on standard error."""
    assert main([str(arg) for arg in args]) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vitrail: "), said.err
    return lines[0]


def test_a_run_leaves_what_the_design_names(run: Path) -> None:
    for name in ("recipe.json", "metrics.jsonl", "best/model.safetensors", "last/config.json", "report.html"):
        assert (run / name).stat().st_size > 0
    assert RunFolder(run).run().model.width == 16
    assert "<html" in (run / "report.html").read_text()


def test_train_prints_the_test_score_and_eval_gives_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "digits", "--out", str(tmp_path / "r"), "--epochs", "3", "--json", *TINY]
    assert main(args) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["part"] == "test" and trained["count"] == 360
    assert main(["eval", str(tmp_path / "r"), "--data", "digits", "--json", "--device", "cpu"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["split"] == "test"
    assert {k: scored[k] for k in ("top1", "confusion")} == {k: trained[k] for k in ("top1", "confusion")}


def test_predict_answers_good_pictures_and_names_bad_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = open_data("digits").test
    assert test is not None
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(test.picture(0, 1)[0].numpy()).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    (folder / "c.jpg").write_bytes(b"")
    assert main(["predict", str(folder), str(tmp_path / "gone.png"), "--model", str(run), "--json"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png", "c.jpg", "gone.png"]
    assert len(rows[0]["labels"]) == 5 and rows[0]["task"] == "classify" and "error" not in rows[0]
    assert all("error" in row and "labels" not in row for row in rows[1:])
    assert main(["predict", str(folder / "a.png"), "--model", str(run)]) == 0
    assert "a.png: " in capsys.readouterr().out


def test_compare_and_explain_draw(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), str(run), "--out", str(tmp_path / "plot.png"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and rows[0] == rows[1]
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size[0] > 100
    picture = tmp_path / "p.png"
    Image.new("L", (20, 30), 90).save(picture)
    assert main(["explain", str(picture), "--model", str(run), "--out", str(tmp_path / "seen")]) == 0
    with Image.open(tmp_path / "seen" / "rollout.png") as picture_of_it:
        assert picture_of_it.size[0] > 100


def test_training_from_weights_and_on_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, colour in (("dark", 20), ("light", 220)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20 + i, 24), (colour + i,) * 3).save(tmp_path / "data" / name / f"{i}.jpg")
    common = ["train", "folder", "--data", str(tmp_path / "data"), "--epochs", "2", "--batch-size", "8"]
    small = ["--image-size", "32", "32", "--stem", "4", *TINY]
    assert main([*common, "--out", str(tmp_path / "scratch"), *small]) == 0
    assert main([*common, "--out", str(tmp_path / "tuned"), "--init", str(run), "--device", "cpu"]) == 0
    model = RunFolder(tmp_path / "tuned").run().model
    assert model.width == 16 and model.image_size == (16, 16) and model.channels == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train"], "name a recipe: digits"),
        (["train", "digts"], "did you mean digits?"),
        (["train", "digits", "--epoch", "3"], "unknown option --epoch: did you mean --epochs?"),
        (["train", "digits", "--epochs", "many"], "epochs"),
        (["train", "digits", "--image-size", "9", "8"], "9x8 does not divide into patches of 2"),
        (["train", "folder", "--data", "no/such/folder"], "no data at no/such/folder"),
        (["train", "digits", "--init", "nothing"], "no model 'nothing'"),
        (["train", "--resume", "no/run"], "no/run holds no run"),
        (["train", "digits", "--device", "abacus"], "abacus"),
        (["trian"], "did you mean train?"),
        (["eval", "nothing", "--data", "digits"], "no model 'nothing'"),
        (["eval", "nothing"], "--data"),
        (["predict"], "images"),
        (["predict", "x.png", "--modl", "y"], "did you mean --model?"),
        (["compare", "no/run"], "no/run"),
    ],
)
def test_wrong_input_gets_one_line(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *args)


def test_a_run_folder_holds_one_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "already holds a run" in refused(capsys, "train", "digits", "--out", run, "--device", "cpu")
    assert "is done" in refused(capsys, "train", "--resume", run)


def test_other_classes_than_the_models_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "1.png")
    line = refused(capsys, "eval", run, "--data", tmp_path)
    assert "2 classes and the model 10" in line and "'ant'" in line


def test_a_full_disk_is_a_fault_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vitrail.files.os.fsync", no_space)
    line = refused(capsys, "train", "digits", "--out", tmp_path / "r", "--epochs", "1", *TINY, code=1)
    assert "No space left on device" in line
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_help_is_quick_to_reach_and_the_package_imports_without_torch() -> None:
    code = (
        "import sys, vitrail; from vitrail.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'tyro', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert all(f"vitrail {name}" in done.stdout for name in ("demo", "train", "eval", "predict", "explain", "compare"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_help_that_names_its_fields(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", name, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"vitrail train {name}" in said and "--matrix-lr" in said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_is_resumed_to_the_end(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vitrail", "train", "digits", "--out", str(out), *TINY]
    command += ["--epochs", "40", "--eval-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not (out / "state" / "state.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline, "it saved nothing"
            time.sleep(0.05)
        process.send_signal(how)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert not [row for row in RunFolder(out).rows() if row["kind"] == "done"]
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 0
    rows = RunFolder(out).rows()
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert rows[-1]["kind"] == "done" and steps == sorted(set(steps)) and steps[-1] == rows[-1]["step"]
