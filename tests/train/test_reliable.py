"""bf16 is not used where the processor computes a convolution wrongly in it."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.recipes import RECIPES
from vitrail.train import device, reliable
from vitrail.train.reliable import with_reliable_format

CPU = torch.device("cpu")


class WrongInBf16(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        found: Any = super().forward(images)
        return found.flip(1) if torch.is_autocast_enabled("cpu") else found


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "native_bf16", lambda device: True)


def test_a_wrong_convolution_is_named_and_the_run_is_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    run = replace(RECIPES["digits"](100), precision="auto")
    model = nn.Sequential(nn.Linear(2, 2), WrongInBf16(3, 8, 4, stride=4))
    with caplog.at_level(logging.WARNING, "vitrail"):
        assert with_reliable_format(run, model, CPU).precision == "fp32"
    assert "the convolution 1 wrongly in bf16" in caplog.text
    with pytest.raises(UserError, match="remove --precision"):
        with_reliable_format(replace(run, precision="bf16"), model, CPU)
    assert with_reliable_format(replace(run, precision="fp32"), model, CPU).precision == "fp32"


def test_right_convolutions_keep_the_format() -> None:
    """Three channels in patches and 3x3 kernels are right in bf16 on every processor that was tried."""
    run = replace(RECIPES["digits"](100), precision="auto")
    model = nn.Sequential(nn.Conv2d(3, 48, 4, stride=4), nn.Conv2d(48, 32, 3, padding=1), nn.Conv2d(3, 32, 16, 16))
    assert with_reliable_format(run, model, CPU) is run
    assert all(reliable._error(module) < 0.01 for module in model if isinstance(module, nn.Conv2d))
