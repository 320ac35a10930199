"""Heads whose outputs are values, and heads of one output: the same answers as transformers' pipeline."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checked import checked
from PIL import Image
from safetensors.torch import load_file

import vitrail
from vitrail.cli import main
from vitrail.errors import UserError
from vitrail.tasks.classify import Classes, Classify
from vitrail.tasks.regress import Regress, Values
from vitrail.zoo import convert

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
SMALL |= {"intermediate_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
KINDS = {
    "ViT": SMALL,
    "DeiT": SMALL,
    "Beit": SMALL,
    "Dinov2": {**SMALL, "mlp_ratio": 2},
    "Dinov2WithRegisters": {**SMALL, "mlp_ratio": 2},
    "IJepa": SMALL,
}
HEADS: dict[str, dict[str, Any]] = {
    "one": {"num_labels": 1},
    "one, named": {"id2label": {0: "smiling"}, "label2id": {"smiling": 0}},
    "one of its own": {"num_labels": 1, "problem_type": "multi_label_classification"},
    "value": {"num_labels": 1, "problem_type": "regression"},
    "values": {"id2label": {0: "x", 1: "y", 2: "angle"}, "problem_type": "regression"},
    "several": {"id2label": {0: "x", 1: "y", 2: "z"}, "problem_type": "multi_label_classification"},
    "classes": {"id2label": {0: "x", 1: "y", 2: "z"}},
    "two without names": {"num_labels": 2},
}
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 120 * seed, (40, 40, 3), dtype="u1")) for seed in (1, 2)
]


def saved(folder: Path, kind: str = "ViT", head: str = "value") -> Path:
    """A model of transformers with random weights, and how it has its images prepared."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind], **HEADS[head])
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pipelines(folder: Path) -> list[dict[str, float]]:
    """What transformers' pipeline says of each image, by label."""
    transformers = pytest.importorskip("transformers")
    answers = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    return [{row["label"]: row["score"] for row in answers(image)} for image in IMAGES]


def ours(folder: Path) -> list[dict[str, float]]:
    """The same by vitrail."""
    rows = [answer.row() for answer in vitrail.load(folder).predict(IMAGES)]
    values = [{value["name"]: value["value"] for value in row.get("values", [])} for row in rows]
    labels = [{label["label"]: label["score"] for label in row.get("labels", [])} for row in rows]
    assert all(bool(value) != bool(label) for value, label in zip(values, labels, strict=True))
    return [value or label for value, label in zip(values, labels, strict=True)]


@pytest.mark.parametrize("kind, head", [(k, h) for k in KINDS for h in (HEADS if k == "ViT" else ("one", "values"))])
def test_answers_are_the_pipelines_before_and_after_each_conversion(kind: str, head: str, tmp_path: Path) -> None:
    if head.startswith("value") and version("transformers").startswith("4."):
        pytest.skip("transformers before 5 puts a sigmoid or a softmax on values")
    expected = pipelines(saved(tmp_path / "theirs", kind, head))
    vitrail.load(tmp_path / "theirs").save(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "again", "hf", verify=True)
    answers = [ours(tmp_path / place) for place in ("theirs", "own", "again")] + [pipelines(tmp_path / "again")]
    for found in answers:
        for one, two in zip(found, expected, strict=True):
            # transformers 4 resizes images by Pillow, and 5 by torchvision, which rounds otherwise.
            assert one == pytest.approx(two, rel=1e-2, abs=1e-3)
    before, after = (json.loads((tmp_path / p / "config.json").read_text()) for p in ("theirs", "again"))
    assert after.get("problem_type") in (before.get("problem_type"), "single_label_classification")


def test_what_an_unknown_problem_type_means_is_not_guessed(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": "ranking"}))
    with pytest.raises(UserError, match="problem_type 'ranking'") as caught:
        vitrail.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_one_output_is_a_sigmoid_wherever_it_comes_from(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    given: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "num_heads": 1, "depth": 1, "num_classes": 1}
    model = timm.create_model("vit_tiny_patch16_224", **given).eval()
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.05)
    timm.models.save_for_hf(model, str(tmp_path / "timm"), model_args=given)
    fresh = vitrail.create("nano/2", classes=["dog"])
    torch.nn.init.normal_(fresh.get_parameter("head.linear.weight"), std=0.05)
    fresh.save(tmp_path / "own")
    for place in ("timm", "own"):
        task = vitrail.load(tmp_path / place)
        with torch.inference_mode():
            pixels = torch.stack([task.preprocess(image) for image in IMAGES])
            logits = model(pixels) if place == "timm" else fresh.eval()(pixels)
        scores = [checked(Classes, answer).labels[0]["score"] for answer in task.predict(IMAGES)]
        assert scores == pytest.approx(logits.sigmoid().flatten().tolist(), abs=1e-5) and scores[0] < 1


def test_one_output_learns_as_a_sigmoid() -> None:
    task = vitrail.create("nano/2", classes=["dog"])
    batch = {"image": torch.randn(4, 3, 8, 8), "label": torch.tensor([[1.0], [0.0], [1.0], [0.0]])}
    expected = torch.nn.functional.binary_cross_entropy_with_logits(task(batch["image"]), batch["label"])
    torch.testing.assert_close(task.loss(batch)["loss"] / 4, expected)


def test_values_in_timms_layout_are_declared(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = vitrail.load(saved(tmp_path / "hf", "ViT", "values"))
    convert(tmp_path / "hf", tmp_path / "timm", "timm", verify=True)
    back = vitrail.load(tmp_path / "timm")
    assert isinstance(back, Regress) and back.values == ["x", "y", "angle"]
    pixels = torch.stack([model.preprocess(image) for image in IMAGES])
    with torch.inference_mode():
        peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        torch.testing.assert_close(peer(pixels), model(pixels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back(pixels), model(pixels), rtol=1e-4, atol=1e-4)


def test_a_layout_that_cannot_say_what_outputs_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = vitrail.create("nano/2", classes=["a", "b"], activation="gelu_tanh")
    assert isinstance(model, Classify)
    Regress(model.encoder, ["a", "b"], model.preprocess).save(tmp_path / "values")
    assert main(["convert", str(tmp_path / "values"), str(tmp_path / "v.npz"), "--to", "google"]) == 2
    said = capsys.readouterr().err
    assert "head's outputs are values" in said and said.count("\n") == 1 and not (tmp_path / "v.npz").exists()
    model.loss_kind = "sigmoid"
    model.save(tmp_path / "several")
    convert(tmp_path / "several", tmp_path / "s.npz", "google")
    assert "each class has its own probability" in caplog.text


def test_the_commands_with_a_head_of_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = str(saved(tmp_path / "m", "ViT", "values"))
    for name, drawn in zip(("dark", "light"), IMAGES, strict=True):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            drawn.rotate(15 * i).save(tmp_path / "data" / name / f"{i}.png")
    image = str(tmp_path / "data" / "dark" / "0.png")
    cpu = ["--device", "cpu"]
    assert main(["predict", image, "--model", source, "--json", *cpu]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row.keys() == {"image", "task", "values"} and row["task"] == "regress"
    assert main(["predict", image, "--model", source, *cpu]) == 0
    assert capsys.readouterr().out == f"{image}: {Values(row['values']).text()}\n"
    assert main(["explain", image, "--model", source, "--out", str(tmp_path / "seen"), *cpu]) == 0
    numbers = json.loads((tmp_path / "seen" / "numbers.json").read_text())
    assert numbers["values"] == row["values"]
    assert "angle" in (tmp_path / "seen" / "index.html").read_text()
    capsys.readouterr()

    data = ["--data", str(tmp_path / "data")]
    assert main(["eval", source, *data, *cpu]) == 2
    said = capsys.readouterr().err
    assert "holds no table of numbers" in said and "image and x, y, angle" in said and said.count("\n") == 1
    assert main(["eval", source, *data, "--probe", "--json", *cpu]) == 0
    assert "knn_top1" in json.loads(capsys.readouterr().out)
    out = tmp_path / "run"
    options = ["--epochs", "1", "--workers", "0", "--image-size", "32", "32"]
    assert main(["train", "folder", *data, "--init", source, "--out", str(out), *options, *cpu]) == 0
    tuned = vitrail.load(out)
    assert isinstance(tuned, Classify) and tuned.classes == ["dark", "light"]


def test_a_head_of_values_becomes_a_fresh_one_for_classes(tmp_path: Path) -> None:
    saved(tmp_path, "ViT", "value")
    fresh = vitrail.load(tmp_path, classes=1)
    assert isinstance(fresh, Classify) and not fresh.get_parameter("head.linear.weight").any()
    assert vitrail.load(tmp_path, task="regress").name == "regress"
    weights = load_file(tmp_path / "model.safetensors")
    own = vitrail.load(tmp_path).get_parameter("head.linear.weight")
    torch.testing.assert_close(own, weights["classifier.weight"])
    with pytest.raises(UserError, match="has the task regress and cannot be loaded as classify; classes=N"):
        vitrail.load(tmp_path, task="classify")


@pytest.mark.parametrize(
    "value, words",
    [(31.4, "31.4"), (31.41592, "31.42"), (-0.25, "-0.25"), (1987.4, "1987"), (1234567.8, "1234568"), (0.0, "0")],
)
def test_values_in_words(value: float, words: str) -> None:
    assert Values([{"name": "age", "value": value}]).text() == f"age {words}"
