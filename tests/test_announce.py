"""What a training tells at its start and its end, and that a resumed run says where it resumes."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from images import folder_of
from small_runs import CPU, small_run

from vitrail import announce, recommended
from vitrail.announce import (
    advice,
    an_image,
    busy_line,
    chosen_lines,
    classes_of,
    start_lines,
    training_line,
    used_by_others,
)
from vitrail.cli import main
from vitrail.data.sets import ImageSet, open_data
from vitrail.data.targets import Labels, Texts
from vitrail.recipes import RECIPES
from vitrail.tasks.values import Score
from vitrail.train.build import build
from vitrail.train.folder import RunFolder
from vitrail.train.run import Run

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--stem", "4", "--device", "cpu"]


def labelled(*counts: int) -> ImageSet:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return ImageSet(
        "set", [str(i) for i in range(len(labels))], [], Labels(labels, [f"c{i}" for i in range(len(counts))])
    )


@pytest.mark.parametrize(
    "counts, text",
    [
        ((3, 1200), " (c0 3, c1 1,200)"),
        ((2,) * 7, " (7 classes, 2 each)"),
        ((5, 2, 9, 5, 5, 5, 0), " (7 classes, 0 (c6) to 9 (c2) each)"),
    ],
)
def test_images_per_class(counts: tuple[int, ...], text: str) -> None:
    assert classes_of(labelled(*counts)) == text


def test_captions_have_no_classes() -> None:
    assert classes_of(ImageSet("set", ["a"], [], Texts([["a dog"]]))) == ""


def test_the_start_names_splits_model_training_and_folder(tmp_path: Path) -> None:
    run = small_run()
    components, steps = build(run, open_data("digits"), CPU)
    lines = list(start_lines(run, components, RunFolder(tmp_path / "run"), steps))
    val = len(components.val.set)
    assert lines[0].startswith(f"train: {1437 - val:,} images (10 classes, ")
    assert lines[1].startswith(f"val: {val} images held back from train (10 classes, ")
    assert lines[2].startswith("test: 360 images (10 classes, ")
    parameters = sum(parameter.numel() for parameter in components.task.parameters())
    assert lines[3].startswith("model: ViT, ") and lines[3].endswith(" parameters, images of 8x8, from scratch")
    assert f"{parameters / 1000:.3g} k" in lines[3]
    assert lines[4].startswith(f"training: 60 epochs = {steps:,} steps of 32 images on CPU, ")
    assert lines[-1] == f"folder: {tmp_path / 'run'}"
    assert max(map(len, lines[:5])) <= 100
    components.train.bad |= {3: "3.png: the file is cut off", 5: "5.png: the file is empty"}
    lines = list(start_lines(run, components, RunFolder(tmp_path / "run"), steps))
    assert lines[0].endswith(" each), 2 of them left out") and "left out" not in "".join(lines[1:])


def test_the_device_its_threads_and_the_number_format(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(small_run(), precision="fp32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert training_line(run, CPU, 90, 45) == "training: 2 epochs = 90 steps of 32 images on CPU, 4 threads, fp32"
    few = training_line(run, CPU, 1, 1, images=12)
    assert few == "training: 1 epoch = 1 step of all 12 images (--batch-size 32 is more) on CPU, 4 threads, fp32"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    half = training_line(replace(run, precision="auto"), torch.device("cuda"), 45, 45)
    assert half.endswith("on Tesla T4, fp16, the loss is scaled")
    frozen = replace(run, tune=replace(run.tune, method="linear"))
    assert training_line(frozen, torch.device("cuda"), 45, 45) == "training: one pass on Tesla T4, fp32"


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    # The last minute may have been an installation.
    for load, now, told in ((1.9, 3.0, False), (2.1, 3.0, True), (2.1, 1.9, False), (2.1, None, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        monkeypatch.setattr(announce, "used_by_others", lambda total, seconds, now=now: now)
        line = busy_line()
        assert (line is not None) == told
        assert line is None or "use 3.0 of the 4 cores" in line
    monkeypatch.delattr(os, "getloadavg")
    assert busy_line() is None, "Windows has none"


def test_what_others_use_is_measured_without_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, own = tmp_path / "stat", iter([10.0, 10.5])
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    clock.write_text("cpu  100 0 100 1000 50 0 0 0 7 0\ncpu0 1 1 1 1\n")
    monkeypatch.setattr(time, "sleep", lambda _: clock.write_text("cpu  150 0 125 1020 55 0 0 0 9 0\n"))
    # 75 of 100 ticks of work are 3 of 4 cores; half a second of it in half a second is this process's.
    assert used_by_others(4, 0.5, clock) == 2.0
    assert used_by_others(4, 0.5, tmp_path / "none") is None


def folder_run(**changes: Any) -> Run:
    return replace(RECIPES["folder"](200), data="my pets", **changes)


def test_advice_is_a_command_that_starts_from_weights() -> None:
    (why, command) = advice(folder_run(), 200, gpu=False)
    assert "facebook/dinov2-small" in why and "Apache-2.0" in why
    words = shlex.split(command.removeprefix("tip: "))
    source = recommended.choice("classify").encoders[2].source
    assert words == ["vitrail", "train", "finetune", "--data", "my pets", "--init", source]
    assert "dinov2-base" in next(advice(folder_run(), 200, gpu=True))


def test_advice_is_for_those_whom_it_helps() -> None:
    tuned = replace(RECIPES["finetune"](200), data="pets")
    assert len(list(advice(tuned, 200, gpu=False))) == 2, "the recipe's default is a small bundled model"
    assert list(advice(replace(tuned, init="facebook/dinov2-base"), 200, gpu=False)) == []
    assert list(advice(folder_run(), recommended.MANY, gpu=False)) == []
    assert list(advice(small_run(), 200, gpu=False)) == [], "8 pixels"
    assert list(advice(RECIPES["resnet-cifar10"](200), 200, gpu=False)) == [], (
        "another network than the recipe's subject"
    )


ROWS = [
    *({"kind": "val", "step": step, "top1": top1} for step, top1 in ((10, 0.5), (20, 0.75), (30, 0.75), (40, 0.7))),
    {"kind": "train", "step": 40, "loss": 1.0},
]


def test_how_the_best_weights_were_chosen() -> None:
    rule, run = Score("top1", unit="%"), small_run()
    assert list(chosen_lines(run, rule, "test", ROWS)) == [
        "chosen: step 30 of 40, the best of 4 evaluations on val (75.00 %)"
    ]
    (_, note) = chosen_lines(run, rule, "val", ROWS[:1])
    assert "too good" in note
    lowest = next(chosen_lines(run, replace(rule, best="min"), "test", ROWS))
    assert lowest.startswith("chosen: step 10 of 40")
    frozen = replace(run, tune=replace(run.tune, method="linear"))
    assert next(chosen_lines(frozen, rule, "test", ROWS)).startswith("chosen: method linear is solved in one pass")
    assert list(chosen_lines(run, rule, "test", [])) == []


def test_an_image_of_an_evaluation_split_comes_first(tmp_path: Path) -> None:
    assert an_image(tmp_path) is None and an_image(tmp_path / "digits") is None
    folder_of(tmp_path / "train", {"a": 1})
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    assert an_image(tmp_path) == tmp_path / "train" / "a" / "0.jpg"
    folder_of(tmp_path / "val", {"annotations": 1, "photos": 1})
    assert an_image(tmp_path) == tmp_path / "val" / "photos" / "0.jpg", "a mask is no input"


def test_commands_at_the_end_run_unchanged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "my pets", {"cat": 6, "dog": 6})
    args = ["train", "folder", "--data", "my pets", "--image-size", "32", "--patch", "16", *TINY, "--out", "my run"]
    assert main([*args, "--max-steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "val"
    said = list(caplog.messages)
    assert "best weights: my run/best, report: my run/report.html" in said, "with --json standard output has the scores"
    assert any(line.startswith("chosen: step 2 of 2, the only evaluation on val") for line in said)
    commands = [shlex.split(line.removeprefix("next: "))[1:] for line in said if line.startswith("next: ")]
    assert [words[0] for words in commands] == ["predict", "explain", "serve"]
    assert main([*commands[0], "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("my pets/cat/0.jpg")


def test_a_resumed_run_says_where(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", *TINY, "--max-steps", "3", "--out", "run"]) == 0
    caplog.clear()
    assert main(["train", "--resume", "run", "--max-steps", "5", "--device", "cpu"]) == 0
    assert "resuming run after step 3 of 5 (epoch 0.15)" in caplog.messages
    assert not any(line.startswith("tip: ") for line in caplog.messages)
    assert capsys.readouterr().out.splitlines()[-1] == "best weights: run/best, report: run/report.html"


def test_every_line_is_for_a_terminal_of_any_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = small_run()
    components, steps = build(run, open_data("digits"), CPU)
    with caplog.at_level(logging.WARNING):
        announce.begin(run, components, RunFolder(tmp_path), steps, resume=False)
    assert caplog.messages and all(line.isascii() and line.isprintable() for line in caplog.messages)
