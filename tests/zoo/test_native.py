"""vitrail's checkpoints: back to the same numbers, changed on the way in, refused in one line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitrail
from vitrail.errors import UserError
from vitrail.files import atomic_folder
from vitrail.recommended import bundled


def saved(path: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = vitrail.create("nano/2", classes=["cat", "dog"], stem=(4,), **changes)
    torch.nn.init.normal_(model.get_parameter("head.linear.weight"))
    model.save(path)
    return path


def test_a_saved_model_gives_the_same_answers(tmp_path: Path) -> None:
    model = vitrail.create("nano/2", classes=["cat", "dog"], stem=(4,), hidden=8, registers=2).eval()
    model.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), again(images))
    assert again.classes == ["cat", "dog"] and again.preprocess == model.preprocess and not again.training
    assert torch.equal(vitrail.load(tmp_path / "m" / "model.safetensors")(images), model(images))


def test_other_classes_channels_and_sizes(tmp_path: Path) -> None:
    path = saved(tmp_path / "m")
    model = vitrail.load(path)
    images = torch.randn(2, 3, 8, 8)
    assert vitrail.load(path, classes=5)(images).shape == (2, 5)
    assert vitrail.load(path, classes=["cat", "dog"])(images).equal(model(images))
    assert vitrail.load(path, classes=0)(images).shape == (2, 64)
    grey = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(vitrail.load(path, channels=1)(grey), model(grey.expand(-1, 3, -1, -1)))
    six = vitrail.load(path, channels=6)
    torch.testing.assert_close(six(torch.cat([images, images], 1)), model(images), rtol=1e-4, atol=1e-5)
    assert six.preprocess.channels == 6
    wide = vitrail.load(path, image_size=(8, 16))
    assert wide.preprocess.size == (8, 16) and wide(torch.randn(1, 3, 8, 16)).shape == (1, 2)
    torch.testing.assert_close(
        wide.get_parameter("encoder.positions"),
        model.get_submodule("encoder").positions_for((4, 8)),  # type: ignore[operator]
    )


def test_what_stands_in_the_place_of_a_checkpoint_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError), atomic_folder(file):
        pass
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "mine"
    path = saved(tmp_path / "model")
    before, replace = load_file(path / "model.safetensors"), os.replace

    def once(source: Path, target: Path) -> None:
        if target == path and ".old." not in source.name:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(OSError, match="Input/output"):
        saved(path)
    assert sorted(tmp_path.iterdir()) == [file, path]
    assert all(torch.equal(value, before[name]) for name, value in load_file(path / "model.safetensors").items())


def _damage(path: Path, how: str) -> None:
    weights, config = path / "model.safetensors", path / "config.json"
    values = json.loads(config.read_text())
    if how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "bad json":
        config.write_text("{")
    elif how == "different format":
        config.write_text(json.dumps({"architecture": "swin_tiny"}))
    elif how == "contradiction":
        values["encoder"]["depth"] = 3
        config.write_text(json.dumps(values))
    elif how == "unknown field":
        values["encoder"]["colour"] = 3
        config.write_text(json.dumps(values))
    elif how == "unknown task":
        config.write_text(json.dumps({**values, "task": "dream"}))
    elif how == "wrong shape":
        tensors = load_file(weights)
        tensors["encoder.norm.weight"] = torch.zeros(3)
        save_file(tensors, weights)


@pytest.mark.parametrize(
    "how",
    [
        "cut weights",
        "no weights",
        "bad json",
        "different format",
        "contradiction",
        "unknown field",
        "unknown task",
        "wrong shape",
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path, how: str) -> None:
    path = saved(tmp_path / "m")
    _damage(path, how)
    with pytest.raises(UserError) as caught:
        vitrail.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_names_and_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model 'nothing-here'"):
        vitrail.load("nothing-here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        vitrail.load(tmp_path / "empty")
    (tmp_path / "empty" / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="is a run that holds no checkpoint yet.*vitrail train --resume"):
        vitrail.load(tmp_path / "empty")
    with pytest.raises(UserError, match="exists and is not a checkpoint"):
        vitrail.create("nano/2").save(tmp_path / "empty")
    assert bundled() == ["caption", "classify", "segment"]
