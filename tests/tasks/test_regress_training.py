"""Numbers from a table: units, loss, scores, and a run from a table to answers."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import checked
from images import encoded, smooth
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Numbers
from vitrail.errors import UserError
from vitrail.tasks.regress import Regress, Regression, Units, Values, units_of
from vitrail.zoo import convert

CPU = ["--device", "cpu"]


def table(folder: Path, text: str) -> Path:
    """A table of numbers, and images 0.png to 7.png beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        (folder / f"{i}.png").write_bytes(encoded(smooth(8, 8, i)))
    (folder / "ages.csv").write_text(text)
    return folder / "ages.csv"


def splits_of(values: list[list[float]], names: list[str]) -> Splits:
    keys = [str(i) for i in range(len(values))]
    target = Numbers(torch.tensor(values, dtype=torch.float64), names)
    return Splits(ImageSet("any", keys, torch.zeros(len(values), 3, 8, 8, dtype=torch.uint8), target))


def small(splits: Splits) -> Regress:
    torch.manual_seed(0)
    plain = vitrail.create("nano/2", classes=["x"])
    task = Regress.create(Regression(), plain.encoder, splits, plain.preprocess)
    torch.nn.init.normal_(task.get_parameter("head.linear.weight"), std=0.1)
    return task


def test_columns_of_numbers_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = table(tmp_path, "image,age,height\n0.png,31,1.80\n1.png,-4e1, 170 \n")
    train = Numbers.open(file, val_fraction=0).train
    assert checked(Numbers, train.target).names == ["age", "height"]
    assert train.target.truth(1) == {"values": [{"name": "age", "value": -40.0}, {"name": "height", "value": 170.0}]}
    assert "2 images, numbers, from the columns age, height" in caplog.text
    chosen = Numbers.open(file, val_fraction=0, values=("height",)).train
    assert checked(Numbers, chosen.target).values.tolist() == [[1.8], [170.0]]
    assert "columns not used: age" in caplog.text


@pytest.mark.parametrize(
    "cell, reason",
    [
        ("", "age is empty"),
        ("nan", "age is 'nan', not a finite number"),
        ("-inf", "age is '-inf', not a finite number"),
        ("1e60", "age is '1e60', not a finite number"),
        ("old", "age is 'old', not a number"),
        ("1_0", "age is '1_0', not a finite number"),
        ('"3,5"', "age is '3,5', not a number: write a point"),
    ],
)
def test_cells_that_are_no_numbers_are_bad_rows(cell: str, reason: str, tmp_path: Path) -> None:
    train = Numbers.open(table(tmp_path, f"image,age\n0.png,1\n1.png,2\n2.png,{cell}\n"), val_fraction=0).train
    assert len(train) == 2
    assert train.bad_rows == (f"{tmp_path / 'ages.csv'}, line 4: {reason}",)


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,age,name\n0.png,1,Ann\n1.png,2,Bo\n", "the column name holds 'Ann' .*--values age; .*name to label"),
        ("image,name,who,a b\n0.png,Ann,he,1\n", "the column name holds 'Ann' .*--values 'a b'; if these"),
        (
            "image,label,note\n0.png,cat,\n",
            "not numbers: add numbers; if these are classes, use `vitrail train folder`",
        ),
        ("image\n0.png\n", "no column of numbers beside the image"),
        ("image,age\n0.png,old\n", "the column age holds 'old'"),
    ],
)
def test_tables_without_numbers_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Numbers.open(table(tmp_path, text))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no column 'size' .its columns: "):
        Numbers.open(table(tmp_path / "again", "image,age\n0.png,1\n"), values=("size",))


def test_a_value_that_never_changes_is_refused() -> None:
    with pytest.raises(UserError, match="age is 31 in all training images"):
        units_of(Numbers(torch.tensor([[31.0, 1], [31.0, 2]]), ["age", "x"]))


def test_values_are_learned_in_units_and_answered_in_the_tables() -> None:
    values = [[2000.0, 0.1], [2010.0, 0.3], [1990.0, 0.2]]
    task = small(splits_of(values, ["year", "angle"])).eval()
    target = checked(Numbers, task.encode_target(splits_of(values, ["year", "angle"]).train.target))
    torch.testing.assert_close(target.values.mean(dim=0), torch.zeros(2))
    torch.testing.assert_close(target.values.std(dim=0, correction=0), torch.ones(2))
    images = torch.randn(3, 3, 8, 8)
    batch = {"image": images, "values": target.values, "sample": torch.arange(3)}
    found = task(images)
    assert (found[:, 0] - 2000).abs().max() < 100
    assert task.units is not None
    expected = F.smooth_l1_loss(task.units.normalise(found.double()).float(), target.values)
    torch.testing.assert_close(task.loss(batch)["loss"] / 3, expected, rtol=1e-3, atol=1e-4)


def test_scores_are_in_the_tables_units() -> None:
    task = small(splits_of([[10.0, 0], [20.0, 1], [40.0, 2]], ["age", "x"]))
    assert task.units is not None
    right = torch.tensor([[10.0, 5], [20.0, 5], [40.0, 5]], dtype=torch.float64)
    metric = task.metric()
    outputs = right + torch.tensor([[1.0, 1], [-2.0, 1], [3.0, 1]], dtype=torch.float64)
    metric.update({"values": task.units.normalise(right).float(), "sample": torch.arange(3)}, outputs)
    scores = metric.compute()
    assert scores["mae"] == pytest.approx(1.5, abs=1e-5)
    spread = ((right[:, 0] - right[:, 0].mean()) ** 2).sum().item()
    assert scores["r2"] == pytest.approx(1 - 14 / spread, abs=1e-5)  # x never changes here: it has none
    assert scores["per_value"][0] == {"name": "age", "mae": pytest.approx(2.0, abs=1e-5), "r2": scores["r2"]}
    assert scores["per_value"][1]["r2"] is None
    assert {"mae age", "r2 age", "mae x"} <= task.printed_scores(scores).keys()


def test_the_report_shows_the_true_values_beside_the_predicted_ones() -> None:
    values = [{"name": "age", "value": 31.25}, {"name": "a<b", "value": 12345.6}]
    truth = Numbers(torch.tensor([[33.0, 20000.0]]), ["age", "a<b"]).truth(0)
    row = {"values": values, "truth": truth, "image": base64.b64encode(b"image").decode()}
    run = SimpleNamespace(final={}, examples=[row, {**row, "truth": None}, {"image": row["image"]}])
    _, examples = (section.html for section in Regress.report(run))
    assert examples.count("<figure") == 2 and examples.count("<td>–</td>") == 2
    assert re.search(r"age</td><td>31.25</td><td>33</td>.*a&lt;b</td><td>12346</td><td>20000</td>", examples)


def test_a_csv_file_has_a_column_per_value() -> None:
    answer = Values([{"name": "age", "value": 31.25}, {"name": "error", "value": 0.5}])
    assert answer.records() == [{"age": 31.25, "error_value": 0.5}]


def test_scores_are_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    right, outputs = torch.randn(2, 20, 3, generator=draw, dtype=torch.float64)
    task = small(splits_of(right.tolist(), ["a", "b", "c"]))
    assert task.units is not None
    metric = task.metric()
    metric.update({"values": task.units.normalise(right), "sample": torch.arange(20)}, outputs)
    scores = metric.compute()
    assert scores["r2"] == pytest.approx(sklearn.r2_score(right, outputs))
    assert scores["mae"] == pytest.approx(sklearn.mean_absolute_error(right, outputs))


def test_mixup_mixes_values_by_the_images_shares() -> None:
    target = Numbers(torch.tensor([[1.0], [3.0]]), ["age"])
    fields = target.collate([], torch.tensor([0, 1]), training=True)
    assert target.mix(fields, torch.tensor([1, 0]), torch.tensor([0.75, 0.5]))["values"].tolist() == [[1.5], [2.0]]


def test_a_head_in_units_is_written_for_other_libraries_as_values(tmp_path: Path) -> None:
    """What is written has no units, and gives the same values."""
    pytest.importorskip("transformers")
    plain = vitrail.create("nano/2", classes=["x"], activation="gelu")
    task = Regress(plain.encoder, ["age", "x"], plain.preprocess, units=Units((40.0, 0.0), (12.0, 0.01))).eval()
    torch.nn.init.normal_(task.get_parameter("head.linear.weight"), std=0.1)
    task.save(tmp_path / "own")
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    for kind in ("hf", "timm"):
        convert(tmp_path / "own", tmp_path / kind, kind, verify=True)
        again = checked(Regress, vitrail.load(tmp_path / kind))
        assert again.units is None and again.values == ["age", "x"]
        for one, other in zip(
            task.predict(image)[0].row()["values"], again.predict(image)[0].row()["values"], strict=True
        ):
            assert other["value"] == pytest.approx(one["value"], rel=1e-5, abs=1e-5)


def test_training_continues_from_the_same_values_in_other_units() -> None:
    before = small(splits_of([[10.0], [20.0]], ["age"])).eval()
    after = Regress.adopt(Regression(), before, splits_of([[100.0], [300.0]], ["age"]), before.preprocess).eval()
    assert after.units == Units((200.0,), (100.0,))
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(after(images), before(images), rtol=1e-4, atol=1e-3)
    other = Regress.adopt(Regression(), before, splits_of([[1.0], [2.0]], ["size"]), before.preprocess)
    assert not other.get_parameter("head.linear.weight").any()


def discs(folder: Path, count: int = 200) -> Path:
    """Bright discs on grey noise, with their places and size."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:16, 0:16]
    lines = ["image,x,radius,split"]
    for i in range(count):
        cx, cy, radius = draw.uniform(5, 11), draw.uniform(5, 11), draw.uniform(1.5, 4.5)
        pixels = 60 + draw.normal(0, 10, (16, 16)) + 150 * (np.hypot(x - cx, y - cy) < radius)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{1000 + cx:.3f},{radius / 100:.5f},{'val' if i % 4 == 0 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_places_and_sizes_are_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = discs(tmp_path / "discs"), tmp_path / "run"
    sizes = {"width": 48, "depth": 2, "heads": 2, "patch": 4, "stem": 16, "image-size": 16, "batch-size": 25}
    small = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    how = ["--epochs", "20", "--eval-every", "10", "--workers", "0", "--crop", "none", "--precision", "fp32"]
    command = ["train", "regress", "--data", str(data), "--out", str(out), "--json", "--crop-fraction", "1"]
    assert main([*command, *small, *how, *CPU]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["r2"] > 0.7  # the mean of the training split has about 0
    assert [row["name"] for row in scores["per_value"]] == ["x", "radius"]
    assert scores["per_value"][0]["mae"] < 1 and scores["per_value"][1]["mae"] < 0.005

    model = str(out / "best")
    assert main(["eval", model, "--data", str(data), "--json", *CPU]) == 0
    assert json.loads(capsys.readouterr().out)["r2"] == pytest.approx(scores["r2"], abs=1e-6)
    image = str(data / "0.png")
    assert main(["predict", image, "--model", model, "--json", *CPU]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["task"] == "regress" and [value["name"] for value in row["values"]] == ["x", "radius"]
    assert math.isclose(row["values"][0]["value"], 1008, abs_tol=4)
    assert main(["export", model, str(tmp_path / "exported"), "--to", "pt2", *CPU]) == 0
    capsys.readouterr()
    assert main(["predict", image, "--model", str(tmp_path / "exported"), "--json", *CPU]) == 0
    again = json.loads(capsys.readouterr().out)
    for one, other in zip(row["values"], again["values"], strict=True):
        assert other["value"] == pytest.approx(one["value"], rel=1e-4)
    assert main(["explain", image, "--model", model, "--out", str(tmp_path / "seen"), *CPU]) == 0
    assert "error of radius" in (out / "report.html").read_text()
