"""What a new user types: flags of other tasks, values that are not allowed, outputs that exist. Each gets one line."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.errors import UserError
from vitrail.files import atomic_file, atomic_folder
from vitrail.units import score_text


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An image in the current folder, which holds nothing else."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), (200, 90, 30)).save("a.png")
    return "a.png"


def refused(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    assert main([*args, "--device", "cpu"]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return said.err.removeprefix("vitrail: ").rstrip("\n")


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main([*args, "--device", "cpu"]) == 0
    return capsys.readouterr().out


OF_CAPTION = "is an option of `predict`, `eval` and recipes for the task caption, and the recipe digits trains the task"


@pytest.mark.parametrize(
    "args, line",
    [
        ("train digits --beam 3", f"--beam {OF_CAPTION} classify: leave it out"),
        ("train digits --no-sample", f"--no-sample {OF_CAPTION} classify: leave it out"),
        ("train digits --beams 3", f"unknown option --beams: did you mean --beam? It {OF_CAPTION} classify"),
        (
            "train digits --vocabulary words",
            "--vocabulary is an option of recipes for the task caption, and the recipe digits trains the task "
            "classify: leave it out",
        ),
        (
            "train digits --top 3",
            "--top is an option of `predict` and `eval` for the tasks classify and tag: leave it out",
        ),
        ("train digits --widths 3", "--widths does not apply to the recipe's model (ViT): leave it out"),
        ("train cnn-cifar10 --qk-norm", "--qk-norm does not apply to the recipe's model (CNN): leave it out"),
        ("train digits --recipe mine", "--recipe is the first argument of `train`: leave it out"),
        ("train digits --epoch 3", "unknown option --epoch: did you mean --epochs?"),
        ("train digits 3", "unknown argument '3': --help lists the options"),
        ("predict a.png --epochs 3", "--epochs is an option of `train`: leave it out"),
        (
            "explain a.png --out looks --top 3",
            "--top is an option of `predict` and `eval` for the tasks classify and tag: leave it out",
        ),
    ],
)
def test_whose_flag_it_is(args: str, line: str, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *args.split()) == line


@pytest.mark.parametrize(
    "args, line",
    [
        ("train digits --lr x", "--lr must be a number, got 'x'"),
        ("train digits --lr", "--lr needs a value: a number"),
        ("train digits --epochs 1 2", "--epochs must be a number, got '1 2'"),
        ("train digits --early_size x", "--early_size must be a whole number or None, got 'x'"),
        ("train digits --image-size 3 4 5", "--image-size must be 2 whole numbers, got '3 4 5'"),
        ("train digits --stem a", "--stem must be any number of whole numbers, got 'a'"),
        ("train digits --flip=yes", "--flip takes no value, got 'yes': write --flip or --no-flip"),
        (
            "train digits --pool avrage",
            "--pool cannot be 'avrage': did you mean average? The choices are token, average, max, average_max, "
            "attention, distilled, token_average",
        ),
        ("train digits --batch_size 0", "--batch_size must be at least 1, got 0"),
        ("train digits --policy-count -1", "--policy-count must not be negative, got -1"),
        ("train digits --lora-rank 0", "--lora-rank must be at least 1, got 0"),
        ("train cnn-cifar10 --data digits --widths 8 0 --strides 1 2", "--widths must be at least 1, got (8, 0)"),
        ("predict a.png --top 0", "--top must be at least 1, got 0"),
        ("predict a.png --model caption --beam 0", "--beam must be from 1 to 10,000, got 0"),
        ("predict a.png --model caption --max-length 20000", "--max-length must be from 1 to 10,000, got 20000"),
        ("predict a.png --model caption --top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("predict a.png --model caption --temperature=0", "--temperature must be from 0.01 to 100, got 0.0"),
    ],
)
def test_the_flag_the_value_and_what_is_allowed(
    args: str, line: str, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *args.split()) == line


def test_help_lists_choices_and_no_field_that_train_has_an_argument_for(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(printed(capsys, "train", "digits", "--help-all").split())
    assert "One of token, average, max," in said and "One of gelu, gelu_tanh," in said
    assert said.count("--data ") == 1 + said.count("[--data DATA]") + said.count("vitrail train RECIPE [--data D]")
    assert "--recipe" not in said


def test_no_command_overwrites_what_is_there(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = vitrail.create("nano/2", classes=["a", "b"], image_size=8)
    small.save("model")
    commands = {
        "t.csv": ["predict", image, "--model", "model", "--out", "t.csv"],
        "figures/a.png": ["predict", image, "--model", "model", "--out", "figures"],
        "looks/words.png": ["explain", image, "--model", "model", "--out", "looks"],
        "copy": ["convert", "model", "copy", "--to", "timm"],
    }
    Path("looks").mkdir()
    for name in ("looks/notes.txt", "looks/words.png"):  # another model's
        Path(name).write_bytes(b"mine")
    assert refused(capsys, *commands["looks/words.png"]).startswith("looks/words.png exists: choose another name")
    Path("looks/words.png").unlink()
    for command in commands.values():
        printed(capsys, *command)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for name, command in commands.items():
        line = refused(capsys, *command)
        if name.startswith("looks"):
            name = "looks/relevance.png"
        assert line.startswith(f"{name} exists") and ": choose another name, or remove the f" in line
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    Path("figures/a.png").rename("figures/b.png")
    printed(capsys, *commands["figures/a.png"])  # a folder of figures may take more


@pytest.mark.parametrize("out", ["t.xlsx", "t.json", "t.txt", "below/t.tsv"])
def test_endings_of_files_are_no_folders(out: str, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "predict", image, "--out", out)
    assert line == (
        f"{out} has the ending of a file, {Path(out).suffix}: choose .jsonl, .csv or .parquet for a table, or a folder "
        "without an ending for figures"
    )
    assert sorted(os.listdir()) == ["a.png"]
    Path("v1.b").mkdir()
    assert "v1.b: 1 figure" in printed(capsys, "predict", image, "--out", "v1.b"), "a folder that is there has any name"


def test_explain_draws_one_image_into_a_folder(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args, line in {
        ("a.png", "b.png", "--out", "looks"): "explain draws one image, got 2: name one of them",
        (".", "--out", "looks"): ". is a folder, and explain draws one image: name a file in it",
        ("a.png", "--out", "b.png"): "b.png has the ending of a file, .png: choose a folder without an ending for the "
        "figures",
        ("a.png", "--out", "a.png"): "a.png is a file: choose a folder without an ending for the figures",
    }.items():
        assert refused(capsys, "explain", *args) == line


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody can write")
def test_an_error_of_writing_names_the_users_file(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["predict", image, "--out", "/proc/t.csv"])
    said = capsys.readouterr().err
    assert code in (1, 2) and said.startswith("vitrail: cannot ") and " /proc/t.csv: " in said


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_temporary_name_is_never_told(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(old: Any, new: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(old), None, str(new))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left") as caught, write(tmp_path / "t"):
        pass
    assert caught.value.filename == str(tmp_path / "t") and caught.value.filename2 is None
    assert not list(tmp_path.iterdir())


TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--fast-dev-run"]


def test_training_names_its_folder_at_the_end_and_not_before_a_refusal(
    image: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("runs/digits-0", "runs/digits-0-2"):
        lines = printed(capsys, "train", "digits", *TINY).splitlines()
        assert lines[-1] == f"best weights: {folder}/best, report: {folder}/report.html"
        assert all(Path(folder, name).exists() for name in ("best", "report.html"))
    assert "runs/digits-0 holds another run, so this one is in runs/digits-0-2" in caplog.messages
    caplog.clear()
    assert "needs pretrained weights" in refused(capsys, "train", "digits", *TINY, "--method", "lora")
    assert caplog.messages == []
    again = printed(capsys, "train", "--resume", "runs/digits-0").splitlines()
    assert again[-1] == "best weights: runs/digits-0/best, report: runs/digits-0/report.html"
    assert len(printed(capsys, "train", "digits", *TINY, "--json").splitlines()) == 1


def test_one_line_for_what_weights_replace(
    image: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fixed = "the weights of classify fix the model: "
    printed(capsys, "train", "digits", "--init", "classify", "--fast-dev-run", "--out", "b")
    (line,) = (message for message in caplog.messages if "fix the model" in message)
    assert line.startswith(fixed) and "patch 4 (not 2), image size 32x32 (not 8x8), channels 3 (not 1)" in line
    caplog.clear()
    printed(capsys, "train", "digits", "--init", "classify", "--image-size", "16", "--fast-dev-run", "--out", "c")
    (line,) = (message for message in caplog.messages if "fix the model" in message)
    assert line.startswith(fixed) and "image size" not in line, "the user's own choice"
    caplog.clear()
    printed(capsys, "train", "digits", *TINY, "--out", "own")
    printed(capsys, "train", "digits", "--width", "16", "--init", "own", "--fast-dev-run", "--out", "d")
    (line,) = (message for message in caplog.messages if "fix the model" in message)
    assert line == "the weights of own fix the model: depth 1 (not 4), heads 2 (not 4)"


@pytest.mark.parametrize("flags, count", [([], 3), (["--top", "2"], 2), (["--top", "5"], 5), (["--top", "99"], 10)])
def test_as_many_classes_as_requested(
    flags: list[str], count: int, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(capsys, "predict", image, *flags).count("%") == count


def test_scores_have_digits_that_tell_something() -> None:
    values = [0.0, 1.0, 0.97778, 2.30259, 1e-6, -0.00004321, 12345.678, 1e12, 0.001]
    texts = ["0.0000", "1.0000", "0.9778", "2.303", "1e-06", "-4.321e-05", "12,346", "1e+12", "0.0010"]
    assert list(map(score_text, values)) == texts


def test_features_are_probed_with_classes(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("set").mkdir()
    for name in "abcd":
        Image.new("RGB", (40, 32)).save(f"set/{name}.jpg")
    rows = [f"{name}.jpg,{text}" for name in "abcd" for text in ("a dog runs", "a cat sits")]
    Path("set/captions.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    assert refused(capsys, "eval", "caption", "--data", "set", "--probe") == (
        "--probe scores features by how well they tell classes apart, and set holds captions without classes: remove "
        "--probe, or give --data one folder per class"
    )


def test_a_task_without_a_solution_says_so() -> None:
    model = vitrail.create("nano/2", image_size=8)
    with pytest.raises(UserError, match="method linear is not for the task embed: choose frozen, full, lora"):
        model.prepare_to_solve("linear", 8)


@pytest.mark.parametrize(
    "words", [["predict", "a.png"], ["explain", "a.png"], ["train", "digits"], ["convert", "classify"]]
)
def test_an_empty_path_is_not_the_current_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main([*words, *([""] if words[0] == "convert" else ["--out", ""])]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_plot_is_a_png_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path), "--out", "plot.txt"]) == 2
    assert "give --out plot.png" in capsys.readouterr().err


def test_a_letterbox_needs_no_second_flag(tmp_path: Path) -> None:
    for i, name in enumerate(["a", "b"] * 4):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (i * 30, 0, 0)).save(tmp_path / "data" / name / f"{i}.png")
    args = ["train", "vit-s16-90", "--data", str(tmp_path / "data"), "--resize", "letterbox", "--fast-dev-run"]
    small = [
        "--width",
        "32",
        "--depth",
        "1",
        "--heads",
        "2",
        "--image-size",
        "32",
        "32",
        "--device",
        "cpu",
        "--no-compile",
    ]
    assert main([*args, *small, "--out", str(tmp_path / "run")]) == 0
    assert vitrail.load(tmp_path / "run").preprocess.resize == "letterbox"


def test_eval_reads_data_that_its_run_could_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("train", "val"):
        for i, name in enumerate(["a", "b"] * 5):
            (data / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(data / split / name / f"{i}.png")
    (data / "val" / "a" / "0.png").write_bytes(b"no image")
    small = ["--width", "16", "--depth", "1", "--heads", "2", "--image-size", "8", "8", "--patch", "4", "--stem", "16"]
    args = ["train", "folder", "--data", str(data), "--out", str(run), "--device", "cpu", "--max-steps", "2", *small]
    assert main([*args, "--max-bad", "0.2"]) == 0
    assert main(["eval", str(run), "--data", str(data)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(data), "--max-bad", "0.05"]) == 2
    assert "more than 5.0%" in capsys.readouterr().err
