"""Folders as people have them, through the commands: hidden and linked files, HEIC, small classes, groups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.data.groups import groups_of
from vitrail.data.sets import open_data, split_val
from vitrail.report import read_run

SMALL = ["--epochs=1", "--patch=8", "--width=24", "--heads=2", "--depth=1", "--device=cpu", "--workers=0"]
SMALL += ["--image-size", "16", "16"]


def images(root: Path, *names: str) -> Path:
    draw = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name)
    return root


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_predict_answers_for_what_train_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = images(tmp_path / "data", *(f"{c}/IMG_{i}.JPG" for c in ("cat", "dog") for i in range(3)))
    images(data, "cat/._IMG_0.JPG", "__MACOSX/cat/IMG_0.JPG", "dog/.ipynb_checkpoints/IMG_2-checkpoint.JPG")
    (data / "cat" / "up").symlink_to("..")
    (data / "cow").symlink_to(images(tmp_path / "store", "0.png"))
    (data / "cow" / "1.NEF").write_bytes(b"raw")
    assert main(["predict", str(data), "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    answered = [Path(json.loads(line)["image"]).relative_to(data).as_posix() for line in printed.out.splitlines()]
    assert answered == open_data(data).train.keys and len(answered) == 7
    assert f"1 file that is not an image known to vitrail is left out in {data} (.NEF: 1)" in said(caplog)


def test_a_run_keeps_groups_together_and_scores_what_it_held_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = images(tmp_path / "data", *(f"{c}/s{s}_{i}.png" for c in ("cat", "dog") for s in range(8) for i in range(3)))
    out, group = tmp_path / "run", r"s\d"
    assert main(["train", "folder", "--data", str(data), "--out", str(out), *SMALL, "--group", group]) == 0
    assert json.loads((out / "recipe.json").read_text())["group"] == group
    assert json.loads((out / "data.json").read_text())["groups"]["count"] == 8 and read_run(out).groups == "8"
    assert "groups in the data" in (out / "report.html").read_text()
    held = split_val(open_data(data).train, group=group)[1]
    capsys.readouterr()
    caplog.clear()
    assert main(["eval", str(out), "--data", str(data), "--json", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["split"], row["count"]) == ("val", len(held)) and len(held) == 6 * len(set(groups_of(held, group)))
    share = f"{len(held) // 6} of 8 groups are held back for validation, {len(held) / 48:.0%} of the images"
    assert said(caplog) == [f"{share}"]


def test_a_resumed_run_has_the_groups_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = images(tmp_path / "data", *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(6)))
    table = tmp_path / "groups.csv"
    rows = [f"{c}\\{i}.png,{i // 2}\n" for c in ("cat", "dog") for i in range(6)]
    table.write_text("image,group\n" + "".join(rows))
    out = tmp_path / "run"
    assert main(["train", "folder", "--data", str(data), "--out", str(out), *SMALL, "--group", str(table)]) == 0
    (out / "report.html").unlink()  # as if the run had been stopped
    table.write_text("image,group\n" + "".join(rows).replace(",2", ",1"))
    capsys.readouterr()
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 2
    assert "has changed since the run started: its images are in other groups" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--group", "("], "--group (: not `parent`, not a CSV file, and not a valid regular expression: "),
        (["--group", "parent"], "--group parent: 6 of 6 images of data are directly in a class folder"),
        (["--group", r"\d"], "the group '0' is in the train split (train/a/0.png) and in the val split (val/a/0.png)"),
    ],
)
def test_wrong_groups_get_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(3)] + ["val/a/0.png", "val/b/1.png"]
    data = images(tmp_path / "data", *names)
    assert main(["train", "folder", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL, *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("vitrail: ") and line in said and not (tmp_path / "run").exists()


def test_a_class_too_small_to_split_is_learned_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = images(
        tmp_path / "data", *(f"{c}/{i}.png" for c in ("ash", "oak") for i in range(8)), "yew/0.png", "yew/1.png"
    )
    assert main(["train", "folder", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL]) == 0
    line = "too small to hold images back for validation (fewer than 3 different images), so all train: yew (2)"
    assert line in said(caplog)
    assert split_val(open_data(data).train)[0].labels.tolist().count(2) == 2
