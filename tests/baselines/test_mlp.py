"""The plain network: its equation, and what it does not know of images."""

from __future__ import annotations

import pytest
import torch
from checked import checked
from torch import nn

from vitrail.baselines import MLP, MLPConfig
from vitrail.errors import UserError

TINY = MLPConfig(width=16, depth=2, image_size=(5, 3), channels=2)


def test_forward_is_the_equation() -> None:
    torch.manual_seed(0)
    model = MLP(TINY)
    images = torch.randn(4, 2, 5, 3)
    a = images.reshape(4, 30)
    for layer in model.layers:
        layer = checked(nn.Linear, layer)
        a = (a @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(model.pool(model(images)), a)


def test_the_order_of_pixels_means_nothing() -> None:
    torch.manual_seed(0)
    model, shuffled = MLP(TINY), MLP(TINY)
    shuffled.load_state_dict(model.state_dict())
    order = torch.randperm(30)
    shuffled.get_parameter("layers.0.weight").data = model.get_parameter("layers.0.weight")[:, order]
    images = torch.randn(4, 2, 5, 3)
    other = images.flatten(1)[:, order].view_as(images)
    torch.testing.assert_close(shuffled(other).patches, model(images).patches)


def test_the_signal_keeps_its_size_in_a_deep_network() -> None:
    torch.manual_seed(0)
    model = MLP(MLPConfig(width=512, depth=20))
    assert 0.3 < model(torch.randn(64, 3, 32, 32)).patches.square().mean().sqrt() < 3


def test_images_of_another_size_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="images of 3x5 do not fit an MLP for images of 5x3") as caught:
        MLP(TINY)(torch.zeros(1, 2, 3, 5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 0}, "at least one hidden layer"),
        ({"width": 0}, "must be at least 1, got 0"),
        ({"channels": 0}, "must be at least 1, got 0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    ],
)
def test_bad_configs_are_refused_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        MLPConfig(**changes)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
