"""Whole commands, run as a user runs them: what they print, where, and their exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from vitrail.cli import main
from vitrail.data.decode import EncodedImage
from vitrail.data.sets import open_data
from vitrail.errors import RunError
from vitrail.recipes import RECIPES
from vitrail.report import write_report
from vitrail.train.folder import RunFolder
from vitrail.variants import VariantConfig
from vitrail.zoo import create, load

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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_prints_the_test_score_and_eval_gives_the_same(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever training computes in, scores are in float32, as answers are."""
    args = ["train", "digits", "--out", str(tmp_path / "r"), "--epochs", "3", "--precision", precision, "--json", *TINY]
    assert main(args) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["split"] == "test" and trained["count"] == 360
    assert main(["eval", str(tmp_path / "r"), "--data", "digits", "--json", "--device", "cpu"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["split"] == "test"
    assert {k: scored[k] for k in ("top1", "confusion")} == {k: trained[k] for k in ("top1", "confusion")}


def test_predict_answers_good_images_and_names_bad_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = open_data("digits").test
    assert test is not None
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(test.image(0, 1)[0].numpy()).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    (folder / "c.jpg").write_bytes(b"")
    Image.new("1", (4_000_000, 1)).save(folder / "d.png")
    Image.new("L", (8, 8)).save(folder / "e.png")
    assert main(["predict", str(folder), str(tmp_path / "gone.png"), "--model", str(run), "--json"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png", "c.jpg", "d.png", "e.png", "gone.png"]
    assert len(rows[0]["labels"]) == 5 and rows[0]["task"] == "classify" and "error" not in rows[0]
    assert "labels" in rows[4], "one after a bad one"
    for row in [*rows[1:4], rows[5]]:
        assert row["error"].startswith(f"{row['image']}: ") and "labels" not in row
    assert "4000000x1: too long and thin" in rows[3]["error"]
    assert main(["predict", str(folder / "a.png"), "--model", str(run)]) == 0
    assert "a.png: " in capsys.readouterr().out


def test_tokens_merge_where_a_command_runs_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = VariantConfig(width=16, depth=2, heads=2, patch=2, image_size=(8, 8), channels=1, qk_norm=True)
    model, run = create(config, classes=open_data("digits").train.classes), tmp_path / "run"
    nn.init.normal_(model.get_parameter("head.linear.weight"))
    model.save(run)
    image = tmp_path / "a.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).save(image)

    def row(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, words), "--json", "--device", "cpu"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    for words in (("predict", image, "--model", run), ("eval", run, "--data", "digits", "--split", "val")):
        plain, merging = row(*words), row(*words, "--merge", "6")
        assert row(*words, "--merge", "0") == plain and merging.keys() == plain.keys() and merging != plain
    assert refused(capsys, "predict", image, "--model", run, "--merge", "2", "2", "2").endswith(
        "merge needs one number for all blocks, or one for each of 2: got 3"
    )
    assert refused(capsys, "eval", run, "--data", "digits", "--merge", "-1").startswith("vitrail: --merge must be at ")
    assert "--merge applies to a model" in refused(capsys, "eval", run, "--data", "digits", "--merge", "1", "--human")
    # In training it is a field of the model, and weights to start from leave it free.
    out = tmp_path / "merging"
    assert main(["train", "digits", "--init", str(run), "--fast-dev-run", "--merge", "6", "--out", str(out)]) == 0
    assert RunFolder(out).run().model.merge == (6,)  # type: ignore[union-attr]
    config = json.loads((out / "best" / "config.json").read_text())
    assert config["encoder"]["merge"] == [6]
    capsys.readouterr()
    assert main(["explain", str(image), "--model", str(out), "--out", str(tmp_path / "explained")]) == 0
    assert "no figures of the encoder: this model merges tokens" in caplog.text
    drawn = {path.stem for path in (tmp_path / "explained").iterdir()}
    assert "pca" in drawn and not {"rollout", "heads"} & drawn


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_that_are_not_utf8(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", printed)
    odd = os.fsdecode(b"caf\xe9")
    image = tmp_path / f"{odd}.png"
    Image.new("L", (9, 9)).save(image)
    assert main(["predict", str(image), "--model", str(run), "--device", "cpu"]) == 0
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "classes.json").write_text(json.dumps([odd, *"123456789"]))
    config = json.loads((out / "best" / "config.json").read_text())
    (out / "best" / "config.json").write_text(json.dumps({**config, "classes": [odd] * 10}))
    assert main(["explain", str(image), "--model", str(out), "--out", str(tmp_path / "seen"), "--device", "cpu"]) == 0
    write_report(out)
    (tmp_path / odd).symlink_to(out)
    assert main(["compare", str(tmp_path / odd), "--out", str(tmp_path / "plot.png")]) == 0
    printed.seek(0)
    for text in (printed.read(), (tmp_path / "seen" / "index.html").read_text(), (out / "report.html").read_text()):
        assert r"caf\udce9" in text


def test_a_demo_removes_its_own_run_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(recipe: object, data: str, init: None, changes: object, out: Path, device: None) -> None:
        assert not (out / "recipe.json").exists(), "the earlier run is gone"
        (out / "recipe.json").write_text("{}")
        raise RunError("far enough")

    monkeypatch.setattr("vitrail.demo.begin", begin)
    mine, link, room = tmp_path / "runs", tmp_path / "link", tmp_path / "room"
    shutil.copytree(run, mine / "digits")
    link.symlink_to(mine)
    before = sorted(mine.rglob("*"))
    for out in (mine, link, run / "recipe.json"):
        assert "is not the folder of a demo: choose another --out" in refused(capsys, "demo", "--out", out)
    assert sorted(mine.rglob("*")) == before
    room.mkdir()
    link.unlink()
    link.symlink_to(room)
    for _ in range(2):
        assert main(["demo", "--out", str(link)]) == 1
        assert capsys.readouterr().err == "vitrail: far enough\n"
        (room / "kept.txt").write_text("mine")
    assert (room / "kept.txt").exists() and link.is_symlink()


def test_compare_and_explain_draw(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), str(run), "--out", str(tmp_path / "plot.png"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and rows[0] == rows[1]
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size[0] > 100
    image = tmp_path / "p.png"
    Image.new("L", (20, 30), 90).save(image)
    capsys.readouterr()
    assert main(["predict", str(image), "--model", str(run), "--top", "10"]) == 0
    answer = capsys.readouterr().out
    assert main(["explain", str(image), "--model", str(run), "--out", str(tmp_path / "seen")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{image}: ") and said[0].split(",")[0] == answer.split(",")[0]
    assert said[1:] == [str(tmp_path / "seen" / "index.html")] and Path(said[1]).is_file()
    with Image.open(tmp_path / "seen" / "rollout.png") as image_of_it:
        assert image_of_it.size[0] > 100


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
        (["train", "--data", "digits"], "name a recipe"),
        (["train", "digts"], "did you mean digits? The recipes are digits, mnist, cifar10-quick"),
        (["train", "finetune-b16-384"], "needs pretrained weights: name them with --init"),
        (["train", "caption-coca"], "needs pretrained weights: name them with --init"),
        (["train", "caption-scst"], "needs pretrained weights: name them with --init"),
        (["train", "digits", "--epoch", "3"], "unknown option --epoch: did you mean --epochs?"),
        (["train", "digits", "--epochs", "many"], "epochs"),
        (["train", "digits", "--image-size", "9", "8"], "9x8 does not divide into patches of 2"),
        (["train", "digits", "--image-size", "0", "8"], "--image-size must be at least 1, got (0, 8)"),
        (["train", "digits", "--heads", "0"], "heads must be at least 1"),
        (["train", "digits", "--dropout", "1"], "dropout must be at least 0 and below 1"),
        (["train", "digits", "--batch-size", "0"], "vitrail: --batch-size must be at least 1, got 0"),
        (["train", "digits", "--accumulate", "0"], "accumulate must be at least 1"),
        (["train", "digits", "--accumulate", "many"], "--accumulate must be a whole number or auto, got 'many'"),
        (["train", "digits", "--epochs", "nan"], "epochs must be a number above 0"),
        (["train", "digits", "--eval-every", "0"], "--eval-every must be a number above 0"),
        (["train", "digits", "--workers", "-1"], "workers must not be negative"),
        (["train", "digits", "--max-bad", "1.5"], "--max-bad must be a fraction from 0 to 1"),
        (["train", "digits", "--early-size", "7"], "multiple of the patch size 2"),
        (["train", "digits", "--lr", "nan"], "lr must be a number of at least 0"),
        (["train", "digits", "--ema", "1"], "ema must be at least 0 and below 1"),
        (["train", "digits", "--mixup", "2"], "mixup must be 0 to 1"),
        (["train", "digits", "--std", "0"], "std must be above 0"),
        (["train", "digits", "--policy", "trivail"], "--policy cannot be 'trivail': did you mean trivial?"),
        (["train", "digits", "--resize=crp"], "--resize cannot be 'crp': did you mean crop?"),
        (["train", "digits", "--memory", "maybe"], "--memory cannot be 'maybe': choose from True, False, None"),
        (["train", "digits", "--optimizer", "adma"], "--optimizer cannot be 'adma': did you mean adamw?"),
        (["train", "folder", "--data", "no/such/folder"], "no data at no/such/folder"),
        (["train", "digits", "--init", "nothing"], "no model 'nothing'"),
        (["train", "--resume", "no/run"], "no/run holds no run"),
        (["train", "digits", "--device", "abacus"], "abacus"),
        (["train", "digits", "--device", "meta"], "device 'meta' cannot be used here"),
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


def test_other_classes_than_the_models_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "1.png")
    line = refused(capsys, "eval", run, "--data", tmp_path)
    assert "2 classes and the model 10" in line and "'ant'" in line


def test_out_must_be_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    image = tmp_path / "p.png"
    Image.new("L", (9, 9)).save(image)
    assert "is a file" in refused(capsys, "train", "digits", "--out", taken, *TINY)
    assert "Not a directory" in refused(capsys, "train", "digits", "--out", taken / "below", *TINY)
    assert "is a file" in refused(capsys, "explain", image, "--model", run, "--out", taken)
    assert taken.read_text() == ""


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Two classes of 60 images: four bad images, a wrong ending, a folder; and a truncated array."""
    root = tmp_path / "uneven"
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(60):
            image = Image.fromarray(generator.integers(0, 255, (32, 30 + i % 7, 3)).astype(np.uint8))
            image.save(root / name / f"{i}.jpg", "PNG" if i == 5 else "JPEG")
    ants = root / "ant"
    (ants / "0.jpg").write_bytes(b"")
    (ants / "1.jpg").write_bytes(b"no image")
    (ants / "2.jpg").write_bytes((ants / "2.jpg").read_bytes()[:400])
    (ants / "3.jpg").write_bytes(png_header(60_000, 60_000))
    (ants / "folder.jpg").mkdir()
    np.save(ants / "00.npy", np.zeros((32, 32, 3), np.uint8))
    (ants / "00.npy").write_bytes((ants / "00.npy").read_bytes()[:200])
    return root


def png_header(width: int, height: int) -> bytes:
    """A small file that declares a large image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


REASONS = {
    "ant/0.jpg": "the file is empty",
    "ant/00.npy": "the file is cut off",
    "ant/1.jpg": "the bytes are no image",
    "ant/2.jpg": "the file is cut off",
    "ant/3.jpg": "it declares more than 178,956,970 pixels, the limit",
}


@pytest.mark.parametrize("memory", ["True", "False"])
def test_bad_images_of_a_training(
    memory: str, uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Each is named once and left out; too many of them end the run, and then nothing is left of it."""
    small = ["--image-size", "32", "32", "--stem", "4", "--batch-size", "8", "--epochs", "4", "--workers", "0", *TINY]
    command = ["train", "folder", "--data", str(uneven), "--out", str(tmp_path / "run"), "--memory", memory, *small]
    line = refused(capsys, *command)
    assert "bad, more than 1.0% (ant/" in line and line.endswith("or raise --max-bad")
    assert not (tmp_path / "run").exists()
    caplog.clear()
    assert main([*command, "--max-bad", "0.05"]) == 0
    left_out = sorted(line for line in caplog.messages if line.startswith("left out"))
    assert left_out == [f"left out: {name}: {reason}" for name, reason in REASONS.items()]


def test_bad_images_of_a_prediction(uneven: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(uneven / "ant"), "--model", str(run), "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 61
    assert said.err.splitlines() == [f"{uneven / name}: {reason}" for name, reason in REASONS.items()]


def test_a_prediction_holds_one_decoded_image_per_thread(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos of 100 megapixels would else fill the memory, a batch of them at once."""
    alive: weakref.WeakSet[EncodedImage] = weakref.WeakSet()
    most = []

    class Counted(EncodedImage):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr("vitrail.predictions.answers.EncodedImage", Counted)
    monkeypatch.setattr("vitrail.predictions.answers.MAX_THREADS", 2)
    for i in range(40):
        Image.new("L", (9, 9), i).save(tmp_path / f"{i}.png")
    assert main(["predict", str(tmp_path), "--model", str(run), "--device", "cpu"]) == 0
    assert len(most) == 40 and max(most) <= 4  # the one before goes as the name gets the next


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--eval-every", "9"],
            r"the layer encoder\.\S+; start again with a lower --lr .*; no checkpoint was saved yet",
        ),
        # The rate is 0 in the first two epochs: the first evaluation is fine.
        (["--schedule", "epochs", "--warmup-start", "0"], r"the layer encoder\.\S+; .*; the last good checkpoint is"),
    ],
)
def test_a_loss_that_is_not_finite_is_a_fault_of_the_run(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["--optimizer", "sgd", "--lr", "1e30", "--epochs", "9", "--eval-every", "1", *TINY, *options]
    assert main(["train", "digits", "--out", str(out), *given]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"vitrail: the loss is nan .* at step \d+.*; it began in {words}", line)
    assert out.exists() == (out / "last").exists(), "what has no checkpoint leaves nothing"
    if out.exists():
        assert main(["eval", str(out), "--data", "digits", "--device", "cpu"]) == 0


def test_outputs_that_are_not_numbers_get_no_score(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest of NaNs is the first, so they would score as if each answer were the first class."""
    out = tmp_path / "run"
    options = ["--optimizer", "sgd", "--lr", "1e30", "--eval-every", "0.05", "--epochs", "9", *TINY]
    assert main(["train", "digits", "--out", str(out), *options]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "vitrail: the outputs for val are not numbers (cross_entropy is nan) after step 1: start again"
    )
    assert not out.exists()

    model = load(str(run))
    model.load_state_dict({name: value * float("nan") for name, value in model.state_dict().items()})
    model.save(tmp_path / "broken")
    assert main(["eval", str(tmp_path / "broken"), "--data", "digits", "--device", "cpu"]) == 2
    assert "the outputs for test are not numbers (cross_entropy is nan)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_run_that_saved_nothing_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("vitrail.train.loop.train_step", fail)
    with contextlib.suppress(MemoryError):
        main(["train", "digits", "--out", str(tmp_path / "run"), *TINY])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("metrics.jsonl", b"junk\n", "metrics.jsonl is damaged"),
        ("recipe.json", b"{}", "recipe.json is damaged: restore it"),
    ],
)
def test_a_damaged_run_is_not_resumed(
    file: str, content: bytes, words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    rows = [line for line in (copy / "metrics.jsonl").read_text().splitlines(keepends=True) if '"done"' not in line]
    (copy / "metrics.jsonl").write_text("".join(rows))
    (copy / file).write_bytes(content)
    assert words in refused(capsys, "train", "--resume", copy, "--device", "cpu")


@pytest.mark.parametrize("wanting", ["report", "examples"])
def test_a_report_that_could_not_be_written_is_written_by_a_resume(
    wanting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"vitrail.start.{'write_report' if wanting == 'report' else 'examples'}", no_space)
        assert main(["train", "digits", "--out", str(out), "--epochs", "1", "--json", *TINY]) == 1
    before = RunFolder(out).rows()
    assert before[-1]["kind"] == "done" and not (out / "report.html").exists()
    capsys.readouterr()
    assert main(["train", "--resume", str(out), "--json", "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    after = RunFolder(out).rows()
    assert [row["kind"] for row in after if row["kind"] != "start"] == [
        r["kind"] for r in before if r["kind"] != "start"
    ]
    assert after[-2] == before[-2] and scores["top1"] == after[-2]["top1"]
    assert (out / "report.html").exists() and (out / "examples.json").exists()


def two_classes(root: Path, count: int) -> Path:
    """A folder of dark and of light images."""
    for name, colour in (("dark", 20), ("light", 200)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20 + i, 24), (colour + i,) * 3).save(root / name / f"{i}.png")
    return root


SHORT = ["--epochs", "1", "--batch-size", "8", "--image-size", "32", "32", "--stem", "4", "--workers", "0", *TINY]


def test_names_with_line_breaks_stay_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = two_classes(tmp_path / "data", 12)
    (data / "dark" / "a\nb.png").write_bytes(b"no image")
    line = refused(capsys, "train", "folder", "--data", data, "--out", tmp_path / "run", *SHORT)
    assert "dark/a\\nb.png: the bytes are no image" in line
    assert main(["doctor", str(data), "--images", "0"]) == 0
    assert "    dark/a\\nb.png: the bytes are no image\n" in capsys.readouterr().out


def test_a_resume_says_how_its_data_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = two_classes(tmp_path / "data", 12), tmp_path / "run"
    assert main(["train", "folder", "--data", str(data), "--out", str(out), *SHORT]) == 0
    (out / "report.html").unlink()
    capsys.readouterr()

    def moved(source: str, target: str, words: str) -> None:
        (data / source).rename(tmp_path / target)
        line = refused(capsys, "train", "--resume", out, "--device", "cpu")
        assert f"{data} has changed since the run started: {words}; restore it" in line
        (tmp_path / target).rename(data / source)

    moved("dark/3.png", "away.png", "its train split had 24 images and has 23")
    moved("dark/3.png", "data/dark/30.png", "images of its train split have other names, labels or captions")
    moved("light", "data/bright", "it had 2 classes and has 2: light is missing, bright is new")
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 0


def test_a_run_finds_its_data_again_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(tmp_path / "data", 12)
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert main(["train", "folder", "--data", "data", "--out", str(out), *SHORT]) == 0
    (out / "report.html").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 0


def test_class_folders_beside_a_test_split_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = two_classes(tmp_path / "data", 2)
    two_classes(data / "test", 2)
    (data / "notes").mkdir()
    line = refused(capsys, "train", "folder", "--data", data)
    assert "no training split: move the image folders (dark, light) into a" in line


def test_a_folder_that_may_not_be_read_is_wrong_input(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = two_classes(tmp_path / "data", 2)
    listing = os.scandir

    def listed(path: Any = ".") -> Any:  # whoever is root may read everything
        if path == data:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", listed)
    for command in (["train", "folder", "--data", data], ["eval", run, "--data", data], ["predict", data]):
        assert refused(capsys, *command) == f"vitrail: cannot read {data}: Permission denied"


@pytest.mark.parametrize("number, code", [(errno.ENOENT, 2), (errno.EPERM, 1), (errno.EIO, 1)])
def test_what_the_system_refuses_gets_one_line(
    number: int, code: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_folder(path: Path, *args: object, **named: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", no_folder)
        assert main(["compare", str(run), "--out", str(tmp_path / "below" / "plot.png")]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert f"write {tmp_path / 'below'}: {os.strerror(number)}" in line
    assert line.endswith("choose another --out") == (code == 2)


def test_a_full_disk_is_a_fault_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vitrail.files.os.fsync", no_space)
    line = refused(capsys, "train", "digits", "--out", tmp_path / "r", "--epochs", "1", *TINY, code=1)
    assert "classes.json: No space left on device" in line
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", [["--help"], ["compare", "RUN", "--json"]])
def test_output_that_cannot_be_written_gets_one_line(command: list[str], run: Path, tmp_path: Path) -> None:
    words = [str(run) if word == "RUN" else word for word in command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    settings: dict[str, Any] = {"env": environment, "cwd": tmp_path, "timeout": 300, "text": True}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vitrail", *words], stdout=full, stderr=subprocess.PIPE, **settings
        )
    assert done.returncode == 1 and done.stderr == "vitrail: cannot write a file: No space left on device\n"


@pytest.mark.parametrize("words, err", [(["--help"], False), (["compare", "RUN"], False), (["compare", "no"], True)])
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(words: list[str], err: bool, run: Path) -> None:
    """As it ends `cat`. With `err`, standard error goes into the pipe too, as with 2>&1."""
    command = [sys.executable, "-m", "vitrail", *(str(run) if word == "RUN" else word for word in words)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=writing if err else subprocess.PIPE, timeout=300)
    os.close(writing)
    assert done.returncode == 141 and not done.stderr


def test_another_broken_pipe_is_a_fault(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(paths: object, out: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("vitrail.report.compare.compare", broken)
    assert main(["compare", "runs"]) == 1
    assert capfd.readouterr().err == "vitrail: cannot write a file: Broken pipe\n"


def test_a_bad_test_split_does_not_cost_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.data.memory.IN_MEMORY", 1000)  # what streams is not read before it is needed
    for split, count in (("train", 16), ("test", 4)):
        for name, colour in (("dark", 20), ("light", 200)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (20 + i, 24), (colour + i,) * 3)
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "data" / "test" / "dark" / "0.png").write_bytes(b"no image")
    Image.new("1", (1_000_000, 1)).save(tmp_path / "data" / "test" / "dark" / "1.png")
    small = ["--epochs", "1", "--batch-size", "8", "--image-size", "32", "32", "--stem", "4", "--device", "cpu", *TINY]
    command = ["train", "folder", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main([*command, "--workers", "0", *small]) == 0
    assert any(
        m.startswith("the test split is not scored, so the validation split is scored instead") for m in caplog.messages
    )
    assert any("test/dark/1.png: the image is 1000000x1: too long" in m for m in caplog.messages)
    kinds = [row["kind"] for row in RunFolder(tmp_path / "run").rows()]
    assert kinds[-1] == "done" and "test" not in kinds and (tmp_path / "run" / "report.html").exists()


def test_eval_of_what_a_run_learned_from_reads_what_it_held_back(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, colour in (("dark", 20), ("light", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (20 + i, 24), (colour + i,) * 3).save(tmp_path / "data" / name / f"{i}.png")
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    small = ["--epochs", "1", "--batch-size", "8", "--image-size", "32", "32", "--stem", "4", "--device", "cpu", *TINY]
    monkeypatch.chdir(tmp_path)
    assert main(["train", "folder", "--data", "data", "--out", out, "--json", *small]) == 0
    monkeypatch.chdir(tmp_path / "data")  # a run finds its data again from another folder
    trained = json.loads(capsys.readouterr().out)
    for source, options in ((out, []), (f"{out}/best", []), (out, ["--split", "val"])):
        assert main(["eval", source, "--data", data, "--json", "--device", "cpu", *options]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["split"], scores["count"]) == ("val", trained["count"]) and scores["count"] < 20
        assert scores["top1"] == trained["top1"]
    # So does a copy, and all images of a folder that it did not learn from are scored.
    other = tmp_path / "other"
    shutil.copytree(data, other)
    assert main(["eval", out, "--data", str(other), "--json", "--device", "cpu"]) == 0
    copied = json.loads(capsys.readouterr().out)
    assert (copied["top1"], copied["count"]) == (trained["top1"], trained["count"])
    assert any("has the names and labels of what" in message for message in caplog.messages)
    (other / "dark" / "0.png").rename(other / "dark" / "another.png")
    for words, count in (([], 60), (["--split", "val"], trained["count"])):
        assert main(["eval", out, "--data", str(other), "--json", "--device", "cpu", *words]) == 0
        assert json.loads(capsys.readouterr().out)["count"] == count


def test_help_is_quick_to_reach_and_the_package_imports_without_torch() -> None:
    code = (
        "import sys, vitrail; from vitrail.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert all(f"vitrail {name}" in done.stdout for name in ("demo", "train", "eval", "predict", "explain", "compare"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_help_that_names_its_fields(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", name, "--help-all"]) == 0
    said = capsys.readouterr().out
    assert f"vitrail train {name}" in said and "--muon-lr" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda how: how.name
)
def test_a_killed_command_is_resumed_to_the_end(how: signal.Signals, tmp_path: Path) -> None:
    """The signal reaches the worker too, as a terminal's Ctrl-C does, and what Slurm sends."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vitrail", "train", "digits", "--out", str(out), *TINY]
    command += ["--epochs", "24", "--eval-every", "3", "--memory", "False", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 150
        while not RunFolder(out).states.steps():
            assert process.poll() is None and time.monotonic() < deadline, "it saved nothing"
            time.sleep(0.05)
        os.killpg(process.pid, how)
        code = process.wait(timeout=100)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert code == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}.get(how, 75)
    assert not [row for row in RunFolder(out).rows() if row["kind"] == "done"]
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 0
    rows = RunFolder(out).rows()
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert rows[-1]["kind"] == "done" and steps == sorted(set(steps)) and steps[-1] == rows[-1]["step"]
