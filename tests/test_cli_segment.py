"""Segmentation as a user runs it: train, score, predict, on images whose left half is bright."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.baselines import ResNet, ResNetConfig
from vitrail.cli import main
from vitrail.data.preprocess import Preprocess
from vitrail.data.rle import decode
from vitrail.start import score
from vitrail.tasks.embed import Embed
from vitrail.tasks.segment import Segment
from vitrail.tasks.segment.report import VOID, painted

SMALL = [
    "--width",
    "32",
    "--depth",
    "2",
    "--heads",
    "2",
    "--global-blocks",
    "1",
    "--image-size",
    "16",
    "16",
    "--crop-fraction",
    "1",
]
SHORT = ["--device", "cpu", "--workers", "0", "--batch-size", "8", "--max-steps", "60", "--eval-every", "10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 24x20 pixels; the two right columns of their masks are void."""
    root = tmp_path_factory.mktemp("halves")
    (root / "classes.txt").write_text("bright\ndark\n")
    for split, count in (("train", 24), ("val", 6)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 100, (24, 20, 3)).astype(np.uint8)
            pixels[:, :10] += 150
            Image.fromarray(pixels).save(root / split / "images" / f"{i}.png")
            mask = np.where(np.arange(20) < 10, 0, np.where(np.arange(20) < 18, 1, 255))
            Image.fromarray(mask.astype(np.uint8)[None].repeat(24, 0)).save(root / split / "masks" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", "segment", "--data", str(data), "--out", str(out), *SMALL, *SHORT]) == 0
    return out


def test_a_segmenter_learns_and_its_score_is_that_of_its_predictions(run: Path, data: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("val") >= 2
    task = vitrail.load(run)
    assert isinstance(task, Segment) and task.classes == ["bright", "dark"]
    _, scores = score(task, str(run), str(data), "val")
    assert scores["miou"] > 0.8 and scores["miou_windows"] > 0.8 and scores["count"] == 6
    images = [data / "val" / "images" / f"{i}.png" for i in range(6)]
    found = torch.stack([answer.mask for answer in task.predict([Image.open(path) for path in images])])  # type: ignore[attr-defined]
    truth = torch.where(torch.arange(20) < 10, 0, 1).expand(24, 20)
    right = (found == truth)[:, :, :18]
    assert scores["pixel_accuracy"] == pytest.approx(float(right.double().mean()), abs=1e-9)


def test_the_report_shows_truth_and_prediction_of_a_set_without_a_test_split(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.count('class="example wide"') == 6 and "IoU of each class" in page
    (row, *_) = json.loads((run / "examples.json").read_text())
    truth = painted(row["truth"]["segments"], ["bright", "dark"])
    expected = torch.where(torch.arange(20) < 10, 0, torch.where(torch.arange(20) < 18, 1, VOID))
    assert torch.equal(truth, expected.expand(24, 20).int())


def test_predictions_as_lines_tables_figures_and_masks(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (41, 30), "white").save(tmp_path / "white.png")
    given = ["predict", str(data / "val" / "images" / "0.png"), str(tmp_path / "white.png"), "--model", str(run)]
    assert main([*given, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["task"] for row in rows] == ["segment", "segment"]
    for row, size in zip(rows, [(24, 20), (30, 41)], strict=True):
        areas = [segment["area"] for segment in row["segments"]]
        assert sum(areas) == size[0] * size[1] and areas == sorted(areas, reverse=True)
        for segment in row["segments"]:
            mask = decode(segment["rle"])
            assert mask.shape == size and int(mask.sum()) == segment["area"]
            assert segment["share"] == pytest.approx(segment["area"] / mask.numel())

    assert main([*given, "--out", str(tmp_path / "figures")]) == 0
    with Image.open(tmp_path / "figures" / "white.mask.png") as mask_file:
        assert mask_file.size == (41, 30) and set(np.unique(np.array(mask_file))) <= {0, 1}
    assert (tmp_path / "figures" / "0.png").exists()

    assert main([*given, "--out", str(tmp_path / "areas.csv")]) == 0
    with (tmp_path / "areas.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == sum(len(row["segments"]) for row in rows)
    assert table[0].keys() == {"image", "task", "label", "share", "area", "error"}


@pytest.mark.parametrize(
    "options", [["--inference", "windows"], ["--flip"], ["--inference", "windows", "--flip", "--overlap", "0.75"]]
)
def test_other_ways_of_inference(options: list[str], run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--data", str(data), "--json", *options]) == 0
    scores: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert scores["miou"] > 0.8
    assert ("miou_whole" in scores) == ("windows" in options) and ("miou_windows" in scores) != ("windows" in options)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--overlap", "0.75"], "--overlap applies to windows: add --inference windows"),
        (["--void", "7"], "--void is for the masks of a data set, and this command reads none: leave it out"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    options: list[str], words: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = str(data / "val" / "images" / "0.png"), tmp_path / "figures"
    assert main(["predict", image, "--model", str(run), "--out", str(out), *options]) == 2
    said = capsys.readouterr()
    assert said.err == f"vitrail: {words}\n" and said.out == "" and not out.exists()


def test_settings_of_other_heads_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "segment", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL, *SHORT]
    assert main([*args, "--queries", "4"]) == 2
    assert "the head linear does not use --queries" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*args, "--head", "mask-transformer", "--queries", "4"]) == 2


def test_a_run_with_a_mask_that_cannot_be_used_ends_well(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Below the share that may be bad, such an image is left out of training, scores and the examples of the report."""
    root = tmp_path / "halves"
    shutil.copytree(data, root)
    (root / "val" / "masks" / "0.png").unlink()
    Image.new("L", (20, 10)).save(root / "val" / "masks" / "5.png")
    args = ["train", "segment", "--data", str(root), "--out", str(tmp_path / "run"), *SMALL, *SHORT]
    assert main([*args, "--max-steps", "1", "--max-bad", "0.4"]) == 0
    said = [line for line in caplog.messages if line.startswith("left out: ")]
    assert len(said) == 2 and said[0] == "left out: val/images/0.png: the image has no mask"
    examples = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert len([row for row in examples if "mistake" not in row]) == 4
    assert (tmp_path / "run" / "report.html").exists()


def test_void_of_the_data_is_named_by_a_flag(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--data", str(data), "--void", "7", "--json"]) == 2
    assert "255" in capsys.readouterr().err
    args = ["train", "segment", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL, *SHORT]
    assert main([*args, "--void", "1"]) == 2
    error = capsys.readouterr().err
    assert "dark" in error and "void" in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("head, own", [("mask-transformer", []), ("queries", ["--queries", "4"])])
def test_other_heads_train_and_start_from_weights(
    head: str, own: list[str], run: Path, data: Path, tmp_path: Path
) -> None:
    if head == "queries":
        pytest.importorskip("scipy")
    args = ["train", "segment", "--data", str(data), "--out", str(tmp_path / "run"), "--init", str(run), *SHORT]
    assert main([*args, "--head", head, "--head-blocks", "1", *own, "--max-steps", "3"]) == 0
    task = vitrail.load(tmp_path / "run")
    assert isinstance(task, Segment) and task.config()["segmentation"]["head"] == head


def test_a_segmenter_continues_on_whole_images(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "segment-whole", "--data", str(data), "--out", str(tmp_path / "run"), *SHORT]
    assert main([*args, "--init", "classify"]) == 2
    assert "continues training the task segment, and classify holds the task classify" in capsys.readouterr().err
    steps = ["--image-size", "24", "32", "--max-steps", "3", "--muon-lr", "0", "--lr", "0", "--weight-decay", "0"]
    assert main([*args, "--init", str(run), *steps]) == 0
    before, after = vitrail.load(run), vitrail.load(tmp_path / "run")
    theirs = dict(before.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in after.named_parameters()), "it begins with them all"
    assert after.preprocess.crop_fraction == 1 and after.preprocess.size == (24, 32)


@pytest.mark.parametrize("method", ["frozen", "lora", "last-blocks"])
def test_methods_of_fine_tuning(method: str, run: Path, data: Path, tmp_path: Path) -> None:
    args = ["train", "segment", "--data", str(data), "--out", str(tmp_path / "run"), "--init", str(run), *SHORT]
    assert main([*args, "--method", method, "--max-steps", "3"]) == 0


@pytest.mark.parametrize("head", [["linear"], ["mask-transformer", "--head-blocks", "1"]])
def test_a_convolutional_encoder_is_segmented_from_at_the_scale_of_the_recipe(
    head: list[str], data: Path, tmp_path: Path
) -> None:
    """The network's own images were squashed squares, which would distort the images of a segmenter."""
    network = ResNet(ResNetConfig(widths=(8, 16), depth=1, strides=(1, 2), image_size=(16, 16)))
    seen = Preprocess(size=(16, 16), mean=(0.3, 0.4, 0.5), resize="squash")
    Embed(network, seen).save(tmp_path / "weights")
    args = ["train", "segment", "--data", str(data), "--out", str(tmp_path / "run"), *SHORT]
    shape = ["--image-size", "16", "16", "--crop-fraction", "0.8"]
    assert main([*args, *shape, "--init", str(tmp_path / "weights"), "--head", *head]) == 0
    task = vitrail.load(tmp_path / "run")
    assert task.preprocess.mean == seen.mean and task.preprocess.resize == "crop"
    assert task.frames(data / "val" / "images" / "0.png").images.shape[-2:] == (24, 20)
    assert score(task, "run", str(data), "val")[1]["miou"] > 0.5
