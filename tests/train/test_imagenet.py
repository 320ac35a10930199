"""A model of ImageNet's classes on a set that has some of them, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.data import imagenet

GIVEN: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "depth": 1, "img_size": 32, "num_classes": 1000}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """timm's folder with random weights that tell images apart, and the model."""
    torch.manual_seed(1)
    made = timm.create_model("vit_tiny_patch16_224", **GIVEN).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name and "cls_token" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("timm")
    timm.models.save_for_hf(made, str(folder), model_args=GIVEN)
    return folder, made


def images(count: int = 24) -> list[Image.Image]:
    """Of one colour each, with some noise."""
    random = np.random.default_rng(0)
    return [
        Image.fromarray((random.uniform(0, 255, 3) + random.uniform(-60, 60, (32, 32, 3))).clip(0, 255).astype("u1"))
        for _ in range(count)
    ]


def answers(folder: Path, made: Any) -> list[int]:
    """timm's own answer for each image."""
    task = vitrail.load(folder)
    with torch.inference_mode():
        return made(torch.stack([task.preprocess(image) for image in images()])).argmax(1).tolist()


@pytest.mark.parametrize("by", ["wnid", "name", "synonyms"])
def test_eval_of_a_subset_scores_what_predict_answers(
    by: str, model: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two thirds of the images are filed under timm's answer and the rest under another class of the set."""
    guesses = answers(*model)
    others = sorted(set(guesses))
    synsets = imagenet.synsets()
    names: dict[str, Callable[[int], str]] = {
        "wnid": lambda i: synsets[i].wnid,
        "name": lambda i: synsets[i].name.upper().replace(" ", "_"),
        "synonyms": lambda i: ", ".join(synsets[i].synonyms),
    }
    called = names[by]
    truth = [g if i % 3 else others[(others.index(g) + 1) % len(others)] for i, g in enumerate(guesses)]
    for i, (image, number) in enumerate(zip(images(), truth, strict=True)):
        (tmp_path / called(number)).mkdir(exist_ok=True)
        image.save(tmp_path / called(number) / f"{i}.png")
    source = str(model[0])
    assert main(["eval", source, "--data", str(tmp_path), "--split", "train", "--json", "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["classes"] == [synset.name for synset in synsets] and scores["count"] == 24
    expected = np.zeros((1000, 1000), int)
    for true, guess in zip(truth, guesses, strict=True):
        expected[true, guess] += 1
    assert scores["confusion"] == expected.tolist()
    assert scores["top1"] == pytest.approx(np.trace(expected) / 24) and 0.5 < scores["top1"] < 0.8

    assert main(["predict", str(tmp_path), "--model", source, "--json", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first = {int(Path(row["image"]).stem): row["labels"][0]["label"] for row in rows}
    assert [first[i] for i in range(24)] == [synsets[guess].name for guess in guesses]


def test_that_all_outputs_stay_in_the_race_is_logged(
    model: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tench", "church"):
        (tmp_path / name).mkdir()
        images(1)[0].save(tmp_path / name / "a.png")
    assert main(["eval", str(model[0]), "--data", str(tmp_path), "--device", "cpu"]) == 0
    assert "the data has 2 of the model's 1,000 classes: a prediction is one of all 1,000" in caplog.text
    capsys.readouterr()
    (tmp_path / "church").rename(tmp_path / "crane")
    assert main(["eval", str(model[0]), "--data", str(tmp_path), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "'crane' may be the model's 'crane bird' (n02012849) or 'crane' (n03126707)" in said
    assert said.count("\n") == 1
