"""What all baselines share: shapes at any size, gradients everywhere, configs that survive JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.baselines import CNN, MLP, RNN, CNNConfig, MLPConfig, ResNet, ResNetConfig, RNNConfig
from vitrail.errors import UserError
from vitrail.plain import describe, from_description
from vitrail.tasks.encoder import KINDS, Encoder

ENCODERS: dict[str, tuple[Callable[[Any], Encoder], Any]] = {
    "mlp": (MLP, MLPConfig(width=12, depth=2)),
    "cnn": (CNN, CNNConfig(widths=(4, 6), strides=(2, 3), depth=1)),
    "cnn-stem": (CNN, CNNConfig(widths=(4, 6), strides=(1, 2), depth=2, stem_stride=2)),
    "resnet": (ResNet, ResNetConfig(widths=(4, 4, 6), strides=(1, 2, 3), depth=1, stem_stride=2)),
    "rnn": (RNN, RNNConfig(cell="rnn", width=10)),
    "gru": (RNN, RNNConfig(cell="gru", width=10, depth=2)),
    "lstm": (RNN, RNNConfig(cell="lstm", width=10, depth=2, dropout=0.1)),
}


def expected_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    if isinstance(config, MLPConfig):
        return 1, 1
    if isinstance(config, RNNConfig):
        return height, 1
    stride = config.stem_stride * math.prod(config.strides)  # one that does not divide the side counts as a whole one
    return -(-height // stride), -(-width // stride)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(ENCODERS)),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    channels=st.integers(1, 5),
    batch=st.integers(1, 3),
)
def test_any_size_and_channel_count(name: str, height: int, width: int, channels: int, batch: int) -> None:
    make, config = ENCODERS[name]
    config = replace(config, image_size=(height, width), channels=channels)
    model = make(config).eval()
    tokens = model(torch.randn(batch, channels, height, width))
    rows, columns = expected_grid(config, height, width)
    assert tokens.grid == (rows, columns)
    assert tokens.patches.shape == (batch, rows * columns, config.width)
    assert tokens.prefix.shape == (batch, 0, config.width)
    pooled = model.pool(tokens)
    assert pooled.shape == (batch, config.width) and pooled.isfinite().all()


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_reach_every_weight_and_pixel_at_odd_sizes(name: str) -> None:
    torch.manual_seed(0)
    make, config = ENCODERS[name]
    model = make(replace(config, image_size=(11, 7), channels=2, **({"width": 64} if name == "mlp" else {})))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases start at zero
    images = torch.randn(8, 2, 11, 7, requires_grad=True)
    pooled = model.pool(model(images))
    (pooled * torch.randn_like(pooled)).sum().backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label
    assert images.grad is not None and (images.grad.abs().sum(dim=(0, 1)) > 0).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_config_survives_json_and_does_not_change(name: str) -> None:
    make, config = ENCODERS[name]
    values = json.loads(json.dumps(asdict(config)))
    again = type(config)(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    assert again == config and from_description(describe(config, KINDS), KINDS, "vit") == config
    make(again).load_state_dict(make(config).state_dict())
    with pytest.raises(FrozenInstanceError):
        config.channels = 4


def test_kinds_are_told_apart() -> None:
    configs = [config for _, config in ENCODERS.values()]
    assert len({type(config) for config in configs}) == len({describe(config, KINDS)["kind"] for config in configs})


@pytest.mark.parametrize("name", ENCODERS)
def test_wrong_channels_are_refused_in_one_line(name: str) -> None:
    make, config = ENCODERS[name]
    model = make(config)
    for images in (torch.zeros(1, config.channels + 1, *config.image_size), torch.zeros(config.image_size)):
        with pytest.raises(UserError, match="check the number of channels") as caught:
            model(images)
        assert "\n" not in str(caught.value)
