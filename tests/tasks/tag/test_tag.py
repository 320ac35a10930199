"""Several labels per image: tables, loss, scores, answers, and a run from a table to answers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded, smooth
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.data.builtin import digits
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Tags
from vitrail.errors import UserError
from vitrail.report import write_report
from vitrail.tasks.tag import PredictedLabels, Tag, Tagging
from vitrail.tasks.tag.metric import average_precision

CPU = ["--device", "cpu"]


def table(folder: Path, text: str) -> Path:
    """A table of labels, and images 0.png to 7.png beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        (folder / f"{i}.png").write_bytes(encoded(smooth(8, 8, i)))
    (folder / "tags.csv").write_text(text)
    return folder / "tags.csv"


def read(file: Path) -> dict[str, list[str]]:
    """The labels of each image."""
    train = Tags.open(file, val_fraction=0).train
    return {key: train.target.truth(i)["labels"] for i, key in enumerate(train.keys)}


def small(classes: list[str] | None = None, **how: float) -> Tag:
    torch.manual_seed(0)
    plain = vitrail.create("nano/2", classes=["x"])
    return Tag(plain.encoder, classes or ["a", "b", "c"], plain.preprocess, **how)  # type: ignore[arg-type]


def batch_of(tags: list[list[float]]) -> dict[str, torch.Tensor]:
    return {"tags": torch.tensor(tags).float(), "sample": torch.arange(len(tags))}


def test_a_cell_holds_any_number_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = table(tmp_path, 'image,label\n0.png,cat|dog\n1.png,\n2.png," dog | dog |"\n3.png,sea bass\n')
    assert read(file) == {"0.png": ["cat", "dog"], "1.png": [], "2.png": ["dog"], "3.png": ["sea bass"]}
    assert "4 images, 3 labels, from the column label; 1 images have none of them" in caplog.text


def test_a_column_of_0_and_1_per_label(tmp_path: Path) -> None:
    file = table(tmp_path, "image,dog,cat\n0.png,1,0\n1.png,0,0\n2.png,1.0,1\n3.png,-1,0\n4.png,,1\n")
    assert read(file) == {"0.png": ["dog"], "1.png": [], "2.png": ["dog", "cat"]}
    bad = Tags.open(file, val_fraction=0).train.bad_rows
    assert [reason.partition(": ")[2] for reason in bad] == ["dog is '-1', not 0 or 1", "dog is '', not 0 or 1"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,label\n0.png,cat;dog\n", r"line 2: 'cat;dog' may be one label or several: write \| between"),
        ('image,label\n0.png,"cat, dog"\n', "may be one label or several"),
        ("image,label\n0.png,cat|dog;bird\n", "may be one label or several"),
        ("image,label\n0.png,\n", "names no label"),
        ("image,age\n0.png,31\n", "no row can be used .the first: .*age is '31', not 0 or 1"),
        ("image\n0.png\n", "names no label"),
    ],
)
def test_what_cannot_be_told_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Tags.open(table(tmp_path, text))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no table of labels"):
        Tags.open(tmp_path)


def test_a_label_that_no_training_image_has_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Tags.open(table(tmp_path, "image,label,split\n0.png,cat,train\n1.png,dog,val\n2.png,cat,val\n"))
    assert "no image of the training split has the label dog: it cannot be learned" in caplog.text


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_average_precision_is_scikit_learns(data: st.DataObject) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    count = data.draw(st.integers(1, 30))
    scores = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))  # with ties
    right = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count).filter(any))
    own = average_precision(torch.tensor(scores, dtype=torch.float32), torch.tensor(right, dtype=torch.float32))
    assert own == pytest.approx(sklearn.average_precision_score(right, scores), abs=1e-12)


def test_scores_are_macro_means_and_leave_out_labels_without_images(caplog: pytest.LogCaptureFixture) -> None:
    metric = small().metric()
    logits = torch.tensor([[3.0, -1.0, 0.0], [2.0, 2.0, 0.0], [-1.0, 1.0, -4.0]])
    metric.update(batch_of([[1, 1, 0], [0, 1, 0], [1, 0, 0]]), logits)
    scores = metric.compute()
    # a: right at ranks 1 and 3; b: right at ranks 1 and 3; c has no image.
    assert scores["per_class"] == [pytest.approx(5 / 6), pytest.approx(5 / 6), None]
    assert scores["mean_ap"] == pytest.approx(5 / 6) and scores["count"] == 3 and scores["without_label"] == 0
    assert scores["f1"] == pytest.approx(0.5)  # of each, one right, one wrong and one missed
    assert "no image of this split has the label c: it is left out" in caplog.text
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 0, 0]]))
    assert scores["binary_cross_entropy"] == pytest.approx(expected.item())


def test_the_report_tells_of_images_without_a_label() -> None:
    metric = small().metric()
    metric.update(batch_of([[1, 1, 0], [0, 0, 0], [0, 0, 0]]), torch.zeros(3, 3))
    final = metric.compute()
    assert final["without_label"] == 2
    found = [{"label": "a", "score": 0.75}]
    image = base64.b64encode(b"image").decode()
    rows = [{"labels": labels, "truth": {"labels": []}, "image": image} for labels in ([], found)]
    run = SimpleNamespace(final=final, examples=rows, classes=["a", "b", "c"])
    head, examples, _ = (section.html for section in Tag.report(run))
    assert "<b>2</b><span>images without a label</span><small>of 3</small>" in head
    assert "✓ right</span> it has no label" in examples and "✗ not all right</span> it has no label" in examples


def test_data_with_some_of_the_labels_in_another_order_is_scored() -> None:
    task = small(["cat", "dog", "sea bass"])
    data = ImageSet("any", ["0", "1"], torch.zeros(2, 3, 8, 8), Tags(torch.eye(2), ["Sea_Bass", "cat"]))
    metric = task.metric(data)
    metric.update(batch_of([[1, 0], [0, 1]]), torch.tensor([[-1.0, 9, 2], [1.0, 9, -2]]))
    assert metric.compute()["per_class"] == [1.0, None, 1.0]
    with pytest.raises(UserError, match="does not know 'bird'"):
        task.metric(ImageSet("any", ["0"], torch.zeros(1, 3, 8, 8), Tags(torch.ones(1, 1), ["bird"])))


def test_the_loss_is_binary_cross_entropy_with_smoothed_goals() -> None:
    task = small(smoothing=0.2).eval()
    tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    batch = {"image": torch.randn(2, 3, 8, 8), "tags": tags, "sample": torch.arange(2)}
    goals = torch.where(tags == 1, 0.9, 0.1)
    expected = F.binary_cross_entropy_with_logits(task(batch["image"]), goals)
    torch.testing.assert_close(task.loss(batch)["loss"] / 2, expected)


def test_mixup_mixes_the_labels_by_the_images_shares() -> None:
    target = Tags(torch.tensor([[1.0, 1, 0], [0, 1, 0]]), ["a", "b", "c"])
    fields = target.collate([], torch.tensor([0, 1]), training=True)
    mixed = target.mix(fields, torch.tensor([1, 0]), torch.tensor([0.7, 0.25]))
    torch.testing.assert_close(mixed["tags"], torch.tensor([[0.7, 1, 0], [0.75, 1, 0]]))


def test_a_new_head_starts_with_how_frequent_labels_are() -> None:
    train = ImageSet("any", list("abcd"), torch.zeros(4, 3, 8, 8), Tags(torch.eye(4)[:, :2], ["x", "y"]))
    plain = vitrail.create("nano/2", classes=["x"])
    splits = type("Splits", (), {"train": train})()
    task = Tag.create(Tagging(), plain.encoder, splits, plain.preprocess)
    probability = task.eval().probabilities(task(torch.randn(1, 3, 8, 8)))
    torch.testing.assert_close(probability, torch.full((1, 2), 0.25))


def test_answers_list_what_is_above_the_threshold() -> None:
    task = small()
    logits = torch.tensor([[2.0, -1.0, 3.0], [-3.0, -2.0, -1.0]])
    task.forward = lambda images, keep=None: logits  # type: ignore[method-assign]
    first, none = task.answer({"image": torch.zeros(2, 3, 8, 8)})
    assert [label["label"] for label in first.row()["labels"]] == ["c", "a"]
    assert first.text() == "c 95.3%, a 88.1%"
    assert none.row() == {"labels": []} and none.text() == "no label (the most probable: c 26.9%)"
    assert isinstance(none, PredictedLabels) and none.draw(Image.new("RGB", (20, 20))).height > 20
    task.choose({"threshold": 0.1, "top": 2})
    assert [len(answer.row()["labels"]) for answer in task.answer({"image": torch.zeros(2, 3, 8, 8)})] == [2, 2]
    with pytest.raises(UserError, match="threshold must be a fraction"):
        task.choose({"threshold": 1.5})


def pairs_of_digits(folder: Path, count: int = 400) -> Path:
    """Images of two digits side by side, of the digits 0 to 3, whose names are their labels."""
    images, labels = digits().splits["train"]
    images, labels = images[labels < 4], labels[labels < 4]
    draw = torch.Generator().manual_seed(0)
    folder.mkdir()
    lines = ["image,label,split"]
    for i in range(count):
        a, b = torch.randint(len(images), (2,), generator=draw).tolist()
        whole = torch.cat([images[a, 0], images[b, 0]], dim=1)
        Image.fromarray(whole.numpy()).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{labels[a]}|{labels[b]},{'val' if i % 4 == 0 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_two_digits_in_an_image_are_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = pairs_of_digits(tmp_path / "pairs"), tmp_path / "run"
    small = ["--width", "48", "--depth", "2", "--heads", "2", "--patch", "2", "--stem", "16", "--image-size", "8", "16"]
    how = ["--epochs", "30", "--eval-every", "15", "--workers", "0", "--batch-size", "32", "--muon-lr", "8e-3"]
    augment = ["--crop", "shift", "--shift", "1", "--no-flip", "--policy", "none", "--crop-fraction", "1"]
    command = ["train", "tag", "--data", str(data), "--out", str(out), "--json", *small, *how, *augment, *CPU]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["mean_ap"] > 0.85  # by guessing about 0.44, the share of the images that have a label
    assert all(value > 0.7 for value in scores["per_class"])

    model = str(out / "best")
    assert main(["eval", model, "--data", str(data), "--json", *CPU]) == 0
    assert json.loads(capsys.readouterr().out)["mean_ap"] == pytest.approx(scores["mean_ap"])
    assert main(["predict", str(data / "0.png"), "--model", model, "--json", "--threshold", "0", *CPU]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["task"] == "tag" and sorted(label["label"] for label in row["labels"]) == ["0", "1", "2", "3"]
    assert main(["explain", str(data / "0.png"), "--model", model, "--out", str(tmp_path / "seen"), *CPU]) == 0
    assert main(["export", model, str(tmp_path / "exported"), "--to", "pt2", *CPU]) == 0
    assert main(["predict", str(data / "0.png"), "--model", str(tmp_path / "exported"), "--json", *CPU]) == 0
    page = write_report(out).read_text()
    assert "Average precision of each label" in page and "Example predictions" in page
    tuned = ["train", "tag", "--data", str(data), "--init", model, "--out", str(tmp_path / "tuned"), "--fast-dev-run"]
    assert main([*tuned, "--workers", "0", *CPU]) == 0
    assert vitrail.load(tmp_path / "tuned").classes == ["0", "1", "2", "3"]
