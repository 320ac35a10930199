"""Weights that do not arrive are an error: each way to fill a model, with the filling broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checked import checked
from tiny_captioners import CAPTIONERS
from torch import Tensor, nn

import vitrail
from vitrail.errors import UserError
from vitrail.vit import ViT, ViTConfig
from vitrail.zoo import captioners, change_drop_path, check_filled
from vitrail.zoo.filled import features, fill

SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "image_size": 8}


def test_a_tensor_that_was_not_assigned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that reports success and does nothing, and one that copies to a place that nobody reads."""
    vitrail.create("nano/2", classes=3, **SMALL).save(tmp_path / "m")
    load = nn.Module.load_state_dict

    def copying(self: nn.Module, weights: dict[str, Tensor], **options: Any) -> Any:
        return load(self, {name: value.clone() for name, value in weights.items()}, **options)

    monkeypatch.setattr(nn.Module, "load_state_dict", copying)
    with pytest.raises(UserError, match="encoder.class_token and .* more did not reach the model"):
        vitrail.load(tmp_path / "m")
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **options: None)
    with pytest.raises(UserError, match="encoder.class_token and .* more did not reach the model"):
        vitrail.load(tmp_path / "m")


def test_a_buffer_that_no_file_has_stays_without_memory() -> None:
    """Such as a table that is computed when a model is made: the file cannot fill it."""

    class Hidden(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("table", torch.ones(2), persistent=False)

    with torch.device("meta"):
        model = Hidden()
    with pytest.raises(UserError, match="table did not reach the model"):
        fill(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "a.pth")


class Deaf(nn.Module):
    """Computes with a copy of its weights, which nobody fills."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ViTConfig(image_size=(8, 8), patch=4)
        self.linear = nn.Linear(3, 4)
        self.copy = [self.linear.weight.detach().clone()]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = images.flatten(2).transpose(1, 2) @ self.copy[0].T
        return tokens[:, :0], tokens


def test_a_filled_model_that_computes_the_same() -> None:
    model = Deaf()
    weights = {name: value + 0.1 for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="weights of a.pth changed nothing"):
        fill(model, weights, "a.pth")
    heard = vitrail.create("nano/2", classes=3, **SMALL)
    same = {name: value.clone() for name, value in heard.state_dict().items()}
    fill(heard, same, "a.pth")  # a file may be as untrained as the model is
    fill(heard, {name: value + 0.1 for name, value in same.items()}, "a.pth")
    with pytest.raises(UserError, match="weights of a.pth give features that are not finite"):
        fill(heard, {name: torch.full_like(value, torch.nan) for name, value in same.items()}, "a.pth")


def test_another_drop_path_moves_no_weights() -> None:
    model = vitrail.create("nano/2", classes=3, **SMALL)
    encoder = checked(ViT, model.get_submodule("encoder"))
    before = features(encoder)
    weights = {name: value.data_ptr() for name, value in model.state_dict().items()}
    change_drop_path(model, 0.3)
    assert model.get_submodule("encoder") is encoder and encoder.config.drop_path == 0.3
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == weights
    assert torch.equal(features(encoder), before)


def test_training_does_not_begin_from_a_new_encoder(tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    trained = vitrail.create("nano/2", classes=3, **SMALL)
    trained.save(path)
    torch.manual_seed(3)
    fresh = vitrail.create("nano/2", classes=3, **SMALL)
    with pytest.raises(UserError, match="weights of .* changed nothing"):
        check_filled(fresh, path, 3)
    with torch.no_grad():  # one tensor alone is named
        for name, value in fresh.named_parameters():
            value.add_(0.1 * (name != "encoder.blocks.1.mlp.up.weight"))
    with pytest.raises(UserError, match=r"m: blocks.1.mlp.up.weight kept the random values"):
        check_filled(fresh, path, 3)
    state = torch.get_rng_state()
    check_filled(fresh, path, 4)
    assert torch.equal(torch.get_rng_state(), state)
    fresh.get_parameter("encoder.norm.weight").data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        check_filled(fresh, path, 4)


def test_training_may_begin_from_untrained_weights_of_the_same_seed(tmp_path: Path) -> None:
    """As after a run of a few steps, whose warm-up has hardly begun."""
    torch.manual_seed(3)
    fresh = vitrail.create("nano/2", classes=3, **SMALL)
    fresh.save(tmp_path / "m")
    check_filled(fresh, str(tmp_path / "m"), 3)


@pytest.mark.parametrize("kind", CAPTIONERS)
def test_a_model_that_transformers_leaves_random(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs pip install 'vitrail[caption]'")
    folder = tmp_path / "captioner"
    CAPTIONERS[kind](folder)
    loaded = vitrail.load(folder)
    again = vitrail.load(folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())
    pretrained = captioners._pretrained

    def forgetful(maker: Any, path: Path) -> Any:
        model = pretrained(maker, path)
        weight = model.get_parameter(next(name for name, value in model.named_parameters() if value.ndim == 2))
        nn.init.normal_(weight.data)
        return model

    monkeypatch.setattr(captioners, "_pretrained", forgetful)
    with pytest.raises(UserError, match="kept the random values of a new model"):
        vitrail.load(folder)
