"""What the writers advise for a model that another library cannot express works when it is followed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitrail
from vitrail import recipes
from vitrail.cli import main
from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.options import parse_fields
from vitrail.train.run import Run, with_fields
from vitrail.variants import VariantConfig, simplest
from vitrail.vit import ViTConfig
from vitrail.zoo import convert

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "patch": 4, "image_size": (16, 16)}
MODELS: dict[str, dict[str, Any]] = {
    "registers": {"registers": 2},
    "norm of queries and keys": {"qk_norm": True},
    "rms norm": {"norm": "rms"},
    "attention pooling": {"pool": "attention", "class_token": False},
    "average beside a class token": {"pool": "average"},
    "class token and average": {"pool": "token_average"},
    "sine positions": {"positions": "sine"},
    "two sides": {"image_size": (16, 32)},
    "two sides and layer scales": {"image_size": (16, 32), "layer_scale": 0.1},
    "convolutional stem": {"stem": (4, 8), "stem_blocks": 1},
    "ResNet": {"backbone": "resnet", "backbone_layers": (1, 1), "patch": 8},
    "projection": {"projection": 8},
}
RECIPES = ("digits", "mnist", "cifar10-quick", "cifar10-laptop", "folder")
TARGETS = ("timm", "hf", "google")


def write(model: ViTConfig, place: Path, to: str) -> str | None:
    """The line that a classifier with this encoder is refused with; None where it was written and read again."""
    vitrail.create(model, classes=3).save(place / "own")
    try:
        convert(place / "own", place / ("out.npz" if to == "google" else "out"), to, verify=True)
    except UserError as error:
        return str(error)
    return None


def advised(line: str) -> list[str]:
    """The options in a line's advice."""
    assert "\n" not in line and "--to vitrail" in line
    found = re.search(r"train one that can be written with `vitrail train RECIPE (--[^`]+)`", line)
    assert found is not None, line
    return shlex.split(found[1])


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", [*RECIPES, *MODELS])
def test_the_advice_leads_to_a_model_that_can_be_written(name: str, to: str, tmp_path: Path) -> None:
    run = recipes.RECIPES[name if name in RECIPES else "mnist"](100)
    if name in MODELS:
        run = Run(recipe="mnist", data="mnist", model=simplest(VariantConfig(**{**SMALL, **MODELS[name]})))
    assert isinstance(run.model, ViTConfig)
    line = write(run.model, tmp_path / "first", to)
    if line is not None:
        changed = with_fields(run, parse_fields(run, advised(line))).model
        assert isinstance(changed, ViTConfig)
        assert write(changed, tmp_path / "second", to) is None
    assert line is not None or (name, to) not in (("digits", "timm"), ("digits", "hf"), ("cifar10-quick", "timm"))


def outputs(to: str, place: Path, images: Tensor) -> Tensor:
    """What the target library's own model gives; Google's file is read by vitrail, since its code needs JAX."""
    if to == "timm":
        timm = pytest.importorskip("timm")
        return timm.create_model(f"local-dir:{place}", pretrained=True).eval()(images)
    if to == "hf":
        transformers = pytest.importorskip("transformers")
        return transformers.AutoModelForImageClassification.from_pretrained(place).eval()(images).logits
    return vitrail.load(place)(images)


@torch.inference_mode()
@pytest.mark.parametrize("to", TARGETS)
def test_digits_trained_as_advised_answers_the_same_there(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the refusal of the recipe's own model to the logits of the one that its line leads to."""
    short = ["--epochs", "1", "--depth", "2", "--device", "cpu"]
    place = tmp_path / ("out.npz" if to == "google" else "out")
    with torch.inference_mode(False):
        assert main(["train", "digits", "--out", str(tmp_path / "stem"), *short]) == 0
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "stem"), str(place), "--to", to]) == 2
    line = capsys.readouterr().err.strip()
    assert "stem=(32,)" in line and "no value after --stem" in line and not place.exists()
    with torch.inference_mode(False):
        assert main(["train", "digits", "--out", str(tmp_path / "plain"), *short, *advised(line)]) == 0
    assert main(["convert", str(tmp_path / "plain"), str(place), "--to", to, "--verify"]) == 0
    model = vitrail.load(tmp_path / "plain")
    test = open_data("digits").test
    assert test is not None
    images = torch.stack([model.preprocess(test.image(i, 1)) for i in range(20)])
    torch.testing.assert_close(outputs(to, place, images), model(images), rtol=1e-4, atol=1e-5)
    assert model(images).std(dim=0).min() > 0.01  # it tells the digits apart


def test_a_hidden_layer_of_the_head_can_be_left_out_as_advised(tmp_path: Path) -> None:
    vitrail.create(ViTConfig(**SMALL), classes=3, hidden=8).save(tmp_path / "own")
    for to in ("timm", "hf"):
        with pytest.raises(UserError, match=r"\(hidden=8\).*classes=0.*train without --hidden"):
            convert(tmp_path / "own", tmp_path / to, to)
        vitrail.load(tmp_path / "own", classes=0).save(tmp_path / f"{to}-encoder")
        assert convert(tmp_path / f"{to}-encoder", tmp_path / to, to, verify=True).task == "embed"
