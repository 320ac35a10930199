"""Where runs go, how long they last, and what is refused before they begin."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import checked
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.options import parse_fields
from vitrail.recipes import RECIPES
from vitrail.train.folder import RunFolder
from vitrail.train.optim import Optimizers, factor
from vitrail.train.run import FAST_IMAGES, FAST_STEPS, with_fields
from vitrail.variants import as_variant
from vitrail.vit import ViTConfig

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a command that works prints."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of a command that stops."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("vitrail: ") and said.err.count("\n") == 1, said.err
    return said.err


def rows_of(run: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in RunFolder(Path(run)).rows() if row["kind"] == kind]


def two_classes(root: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    for name, light in (("dark", 0), ("light", 150)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(light, light + 100, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_the_default_folder_gets_a_number_and_one_that_is_named_is_refused(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("runs").mkdir()
    Path("runs/digits-0").write_text("a file in the way")
    short = ["train", "digits", "--max-steps", "1", *TINY]
    for _ in range(2):
        assert main(short) == 0
    places = ["runs/digits-0-2", "runs/digits-0-3"]
    assert [m for m in caplog.messages if "holds another" in m] == [
        f"runs/digits-0 holds another run, so this one is in {place}" for place in places
    ]
    assert all(Path(place, "report.html").exists() for place in places)
    assert "already holds a run: continue it with" in refused(capsys, *short, "--out", places[0])
    assert "is a file: choose another" in refused(capsys, *short, "--out", "runs/digits-0")
    assert Path("runs/digits-0").read_text() == "a file in the way"


@pytest.mark.parametrize("test_split", [True, False])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_resuming_a_run_that_has_ended_prints_its_scores_again(
    options: list[str], test_split: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the letter, without its data, without training and without a change."""
    data = two_classes(tmp_path / "data" / "train" if test_split else tmp_path / "data", 12)
    if test_split:
        two_classes(tmp_path / "data" / "test", 4)
    small = ["--image-size", "32", "--stem", "4", "--max-steps", "2", "--batch-size", "8", *TINY]
    first = printed(capsys, "train", "folder", "--data", tmp_path / "data", "--out", "run", *small, *options)
    assert first.startswith('{"split": "test"' if options and test_split else ("test", "val", "{")[2 * bool(options) :])
    shutil.rmtree(data)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert printed(capsys, "train", "--resume", "run", *options) == first
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    Path("run/scores.json").write_text("{")
    assert "scores.json is damaged" in refused(capsys, "train", "--resume", "run")


def test_max_steps_ends_the_run_and_spans_its_schedule(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.train.loop.LOG_EVERY", 1)
    for steps, epochs in ((25, 0.5), (7, 1000)):
        options = ["--max-steps", steps, "--epochs", epochs, "--warmup", 0, "--schedule", "linear", "--lr", 1e-3]
        printed(capsys, "train", "digits", "--out", f"run{steps}", *options, *TINY)
        rates = [row["lr"] for row in rows_of(f"run{steps}", "train")]
        optim = RunFolder(Path(f"run{steps}")).run().optim
        assert rates == pytest.approx([1e-3 * factor(optim, step, steps) for step in range(steps)])
        assert rates[0] > 1.9 * rates[steps // 2 + 1] and rates[-1] < 2e-3 / steps
        [done] = rows_of(f"run{steps}", "done")
        assert done["step"] == steps == rows_of(f"run{steps}", "val")[-1]["step"]
        assert json.loads(Path(f"run{steps}/recipe.json").read_text())["max_steps"] == steps
    assert "--max-steps must be at least 1, got 0" in refused(capsys, "train", "digits", "--max-steps", "0")
    assert "--max-step: did you mean --max-steps?" in refused(capsys, "train", "digits", "--max-step", "3")


def test_a_stopped_run_keeps_its_max_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is resumed to the same bits."""
    options = ["--max-steps", "30", "--eval-every", "0.5", *TINY]
    printed(capsys, "train", "digits", "--out", "whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizers, "step", interrupted(Optimizers.step, 3))
        assert main(["train", "digits", "--out", "resumed", *options]) == 75
    assert RunFolder(Path("resumed")).states.steps() == [3]
    printed(capsys, "train", "--resume", "resumed", "--device", "cpu")
    ends = [rows_of(name, "test")[0]["cross_entropy"] for name in ("whole", "resumed")]
    assert ends[0] == ends[1] and rows_of("resumed", "done")[0]["step"] == 30


def interrupted(function: Callable[..., Any], call: int, how: signal.Signals = signal.SIGTERM) -> Callable[..., Any]:
    """The function, which sends the process a signal in its call of that number."""
    calls = itertools.count(1)

    def wrapped(*args: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), how)
        return function(*args, **named)

    return wrapped


@pytest.mark.parametrize("method", ["full", "lora", "linear", "knn"])
def test_a_fast_dev_run_tries_everything_on_a_few_images(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    for split in ("train", "val", "test"):
        two_classes(data / split, 30)
    command = ["train", "finetune", "--data", data, "--method", method, "--out", "run", "--fast-dev-run", "--json"]
    scores = json.loads(printed(capsys, *command, "--device", "cpu"))
    assert scores["fast_dev_run"] and scores["count"] == FAST_IMAGES
    assert sum(map(bool, map(sum, scores["confusion"]))) == 2, "both classes are there"
    assert any(m.startswith("fast dev run: ") and "say nothing" in m for m in caplog.messages)
    assert all(row["count"] == FAST_IMAGES for row in rows_of("run", "val") if "top1" in row)
    if method in ("full", "lora"):
        assert rows_of("run", "done")[0]["step"] == FAST_STEPS
    assert json.loads(Path("run/recipe.json").read_text())["fast_dev_run"] is True
    assert "A fast dev run: its scores say nothing" in Path("run/report.html").read_text()
    assert all(Path("run", name, "model.safetensors").exists() for name in ("best", "last"))
    for how in ([], ["--probe"]):
        found = json.loads(printed(capsys, "eval", "run", "--data", data, "--fast-dev-run", "--json", *how))
        assert found["count"] == FAST_IMAGES and found["fast_dev_run"]
    assert json.loads(printed(capsys, "train", "--resume", "run", "--json")) == scores
    caplog.clear()
    assert "run (fast dev run)" in printed(capsys, "compare", "run")
    assert caplog.messages == ["run: a fast dev run, its scores say nothing about the model"]


def test_a_fast_dev_run_chooses_by_the_whole_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The method follows the number of images; one bad image is judged by it too."""
    data = two_classes(tmp_path / "data", 200)
    (data / "dark" / "0.png").write_bytes(b"no image")
    args = ["train", "finetune", "--data", data, "--fast-dev-run", "--device", "cpu"]
    assert "(fast dev run)" in printed(capsys, *args, "--out", "run")
    assert any(m.startswith("method full: 400 ") for m in caplog.messages)


def test_the_limit_of_unreadable_images_holds_for_the_probes_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit of the command holds for every split that the probes read."""
    data = two_classes(tmp_path / "data", 20)
    for name in ("1.png", "2.png"):
        (data / "dark" / name).write_bytes(b"no image")
    vitrail.create("nano/2", classes=["dark", "light"]).save("model")
    command = ["eval", "model", "--data", data, "--probe", "--device", "cpu"]
    assert "or raise --max-bad" in refused(capsys, *command)
    printed(capsys, *command, "--max-bad", "0.5")


def test_a_fast_dev_run_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "demo", "--fast-dev-run", "--device", "cpu")
    assert f"of {FAST_IMAGES} digits" in said and Path("runs/demo/attention/rollout.png").exists()
    assert RunFolder(Path("runs/demo/digits")).run().fast_dev_run


def test_an_evenly_spaced_choice_of_images() -> None:
    train = open_data("digits").train
    few = train.spread(10)
    assert few.keys == [train.keys[round(i * (len(train) - 1) / 9)] for i in range(10)]
    assert (few.image(9) == train.image(len(train) - 1)).all()
    assert train.spread(None) is train.spread(len(train)) is train
    assert len(train.spread(1)) == 1


@pytest.mark.parametrize(
    "sizes, size",
    [
        (["--image-size", "16"], [16, 16]),
        (["--image-size=16"], [16, 16]),
        (["--image_size", "16"], [16, 16]),
        (["--image-size", "16", "8"], [16, 8]),
        (["--image-size=16", "8"], [16, 8]),
    ],
)
def test_one_number_is_a_square(sizes: list[str], size: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "train", "digits", "--out", "run", *sizes, "--fast-dev-run", *TINY)
    assert json.loads(Path("run/recipe.json").read_text())["model"]["image_size"] == size


@pytest.mark.parametrize("name", ["mlp-cifar10", "cnn-cifar10", "rnn-digits", "caption-vit", "finetune"])
def test_one_number_is_a_square_for_every_kind_of_encoder(name: str) -> None:
    run = RECIPES[name](1000)
    run = with_fields(run, parse_fields(run, ["--epochs", "2", "--image-size", "64", "--seed", "1"]))
    assert run.model.image_size == (64, 64) and run.epochs == 2 and run.seed == 1


def test_fields_of_a_variant_are_flags_of_every_transformer() -> None:
    run = RECIPES["digits"](1000)
    assert parse_fields(run, []) == {} and with_fields(run, {}) == run
    # The recipe has one change to the paper's model; without it, fields that name the paper's values change nothing.
    assert type(with_fields(run, parse_fields(run, ["--no-qk-norm", "--qkv-bias"])).model) is ViTConfig
    changes = parse_fields(run, ["--qk-norm", "--kv-heads", "2", "2", "2", "2"])
    assert changes == {"qk_norm": True, "kv_heads": (2, 2, 2, 2)}
    assert with_fields(run, changes).model == replace(as_variant(checked(ViTConfig, run.model)), **changes)
    with pytest.raises(UserError, match="--qk-norm does not apply to the recipe's model \\(CNN\\)"):
        parse_fields(RECIPES["cnn-cifar10"](1000), ["--qk-norm"])
    with pytest.raises(UserError, match="--qk-norm does not apply to this run's model \\(CNN\\)"):
        with_fields(RECIPES["cnn-cifar10"](1000), changes)


def test_overrides_are_plain_values_that_fit_any_run() -> None:
    """They are read by their types alone: values that only together are wrong are refused where they meet."""
    run = RECIPES["finetune"](1000)
    args = [
        "--lr",
        "1e-3",
        "--no-balanced",
        "--mean",
        "0.1",
        "0.2",
        "0.3",
        "--method=lora",
        "--fast_dev_run",
    ]
    changes = parse_fields(run, args)
    assert changes == {
        "lr": 1e-3,
        "balanced": False,
        "mean": (0.1, 0.2, 0.3),
        "method": "lora",
        "fast_dev_run": True,
    }
    changed = with_fields(run, changes)
    assert (changed.optim.lr, changed.task.balanced, changed.tune.method) == (1e-3, False, "lora")
    assert run == RECIPES["finetune"](1000) and with_fields(changed, {"lr": run.optim.lr}).optim == run.optim
    wrong = parse_fields(run, ["--weighted", "--balanced"])
    with pytest.raises(UserError, match="weighted and balanced both"):
        with_fields(run, wrong)
    assert parse_fields(RECIPES["caption-cnn-lstm"](9), ["--drop-path", "0.1"], also=("drop_path",)) == {
        "drop_path": 0.1
    }


@pytest.mark.parametrize("sizes", [["64", "64", "64"], [], ["large"], ["64", "--seed"]])
def test_other_sizes_are_one_line(sizes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "train", "digits", "--image-size", *sizes)


URL = "https://example.org//a/cat.jpg?size=1"


@pytest.mark.parametrize(
    "command",
    [
        ["predict", URL],
        ["predict", "x.jpg", f"--model={URL}"],
        ["explain", URL, "--out", "seen"],
        ["eval", "classify", "--data", URL],
        ["eval", URL, "--data", "digits"],
        ["train", "folder", "--data", URL],
        ["train", "finetune", "--data", "digits", "--init", URL],
        ["train", "--resume", URL],
        ["convert", URL, "out"],
        ["compare", URL],
    ],
)
def test_a_url_is_named_unchanged(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *command)
    assert (
        line
        == f"vitrail: {URL} is a URL, which vitrail does not download: download the file first, and give its path\n"
    )


def test_a_page_of_the_hub_says_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(
        capsys, "predict", "x.jpg", "--model", "https://huggingface.co/google/vit-base-patch16-224/tree/main"
    )
    assert line.endswith("download the file first, or give the Hub id google/vit-base-patch16-224\n")


def test_compare_draws_only_where_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "train", "digits", "--out", "run", "--fast-dev-run", *TINY)
    before = sorted(Path().rglob("*"))
    assert "digits" in printed(capsys, "compare", "run")
    assert sorted(Path().rglob("*")) == before
    assert main(["compare", "run", "--out", "below/plot.png"]) == 0
    assert capsys.readouterr().err == "vitrail: plot: below/plot.png\n"
    with Image.open("below/plot.png") as plot:
        assert plot.size[0] > 100


@pytest.mark.parametrize("classes, shown", [(2, False), (5, False), (6, True)])
def test_top_5_is_told_where_it_tells_something(
    classes: int, shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, split in itertools.product(range(classes), ("train", "test")):
        (tmp_path / "data" / split / str(k)).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), (40 * k, i, 0)).save(tmp_path / "data" / split / str(k) / f"{i}.png")
    small = ["--image-size", "16", "--patch", "8", "--fast-dev-run", *TINY]
    trained = printed(capsys, "train", "folder", "--data", tmp_path / "data", "--out", "run", *small)
    assert re.fullmatch(
        r"test top1 \d+\.\d\d % in \d+ s \(fast dev run\)\nbest weights: run/best, report: run/report.html\n", trained
    )
    said = printed(capsys, "eval", "run", "--data", tmp_path / "data")
    assert "top1" in said and ("top5" in said) == shown
    row = json.loads(printed(capsys, "eval", "run", "--data", tmp_path / "data", "--json"))
    assert 0 <= row["top5"] <= 1 and not math.isnan(row["top5"])
    assert ("top 5" in Path("run/report.html").read_text()) == shown
