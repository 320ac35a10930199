"""int8: which settings are chosen, which layers stay in float32, and what is not kept. A stand-in is for NNCF."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.errors import RunError, UserError
from vitrail.export import onnx, quantise
from vitrail.export.scores import calibration_images
from vitrail.zoo.exports.engines import openvino_core

IMAGES = [torch.full((1, 1, 2, 2), float(i + 1)) for i in range(40)]


class Smoothing:
    def __init__(self, convolution: float = -1, matmul: float = 0.95) -> None:
        self.used = matmul > 0


class Settings:
    def __init__(self, smooth_quant_alphas: Smoothing | None = None) -> None:
        self.smooth = smooth_quant_alphas is None or smooth_quant_alphas.used


def stand_in(smooth: float | None, plain: float | None, restored: float, calls: list[str]) -> Any:
    """An NNCF whose models are numbers: by how much they scale one of two outputs too much. None: it cannot."""

    def quantize(model: float, advanced_parameters: Settings, **_: Any) -> float:
        calls.append("smooth" if advanced_parameters.smooth else "plain")
        found = smooth if advanced_parameters.smooth else plain
        if found is None:
            raise AttributeError("no weights")
        return found

    def controlled(model: float, advanced_quantization_parameters: Settings, **how: Any) -> float:
        calls.append(f"restored {'smooth' if advanced_quantization_parameters.smooth else 'plain'}")
        score, each = how["validation_fn"](restored, how["validation_dataset"])
        assert len(each) == quantise.CHECKED and score == pytest.approx(1 - restored / 2)
        return restored

    return SimpleNamespace(
        Dataset=lambda items, transform: list(items),
        ModelType=SimpleNamespace(TRANSFORMER="transformer"),
        QuantizationPreset=SimpleNamespace(MIXED="mixed"),
        IgnoredScope=lambda **_: None,
        AdvancedQuantizationParameters=Settings,
        AdvancedSmoothQuantParameters=Smoothing,
        AdvancedAccuracyRestorerParameters=lambda **_: None,
        quantize=quantize,
        quantize_with_accuracy_control=controlled,
    )


def quantised(monkeypatch: pytest.MonkeyPatch, *errors: Any) -> tuple[float, list[str]]:
    calls: list[str] = []
    smooth, plain, restored = errors
    monkeypatch.setattr(quantise, "library", lambda name: stand_in(smooth, plain, restored, calls))
    return quantise._quantised(0.0, IMAGES, lambda model, x: [(1 + model) * x, x]), calls


@pytest.mark.parametrize(
    "errors, found, calls",
    [
        ((0.03, 0.0, 0.0), 0.03, ["smooth"]),
        ((0.9, 0.08, 0.0), 0.08, ["smooth", "plain"]),
        ((None, 0.03, 0.0), 0.03, ["smooth", "plain"]),
        ((0.9, 0.2, 0.1), 0.1, ["smooth", "plain", "restored plain"]),
        ((0.2, 0.9, 0.1), 0.1, ["smooth", "plain", "restored smooth"]),
    ],
)
def test_what_loses_least_is_chosen(
    errors: Any, found: float, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantised(monkeypatch, *errors) == (found, calls)


def test_an_unreadable_image_does_not_stop_the_calibration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = vitrail.create("nano/2", classes=["a", "b"])
    for name in task.classes:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "broken.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="int8 is calibrated on images, and none of .* can be read"):
        calibration_images(task, str(tmp_path))
    Image.new("RGB", (9, 8)).save(tmp_path / "train" / "a" / "whole.png")
    caplog.clear()
    assert [image.shape for image in calibration_images(task, str(tmp_path))] == [(1, 3, 8, 8)]
    assert caplog.text.count("broken.png") == 2 and "int8 is calibrated without it" in caplog.text


def test_products_that_no_pixel_enters_stay_floats() -> None:
    """Here positions are interpolated for the size of the images, and added to patches."""
    nodes = [
        ("images", False, [], ["images"]),
        ("size", True, ["images"], ["h"]),
        ("table", False, ["positions"], ["t"]),
        ("interpolate", False, ["h", "t"], ["p"]),
        ("patches", False, ["images", "filters"], ["x"]),
        ("add", False, ["x", "p"], ["y"]),
        ("size of tokens", True, ["y"], ["n"]),
    ]
    assert quantise.apart_from_images(nodes, "images") == ["size", "table", "interpolate", "size of tokens"]


def test_outputs_without_values_count_nothing() -> None:
    empty, one = np.zeros((1, 0)), np.ones((1, 4))
    assert quantise.error([empty, 1.1 * one], [empty, one]) == pytest.approx(0.1)


def test_cores_that_nncf_makes_are_the_one_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its accuracy control ended in an order after which the next signal was the end of the process."""
    openvino = pytest.importorskip("openvino", reason="needs pip install 'vitrail[export]'")
    nncf, made = stand_in(0.0, 0.0, 0.0, []), []
    plain = nncf.quantize

    def quantize(model: float, **how: Any) -> float:
        made.append(openvino.Core())
        return float(plain(model, **how))

    nncf.quantize = quantize
    monkeypatch.setattr(quantise, "library", lambda name: nncf)
    quantise._quantised(0.0, IMAGES, lambda model, x: [x, x])
    assert len(made) == 1 and made[0] is openvino_core() and openvino.Core() is not openvino_core()


def test_a_model_that_cannot_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"NNCF cannot write this model in int8 \(no weights\): use --precision fp32"):
        quantised(monkeypatch, None, None, 0.0)


def test_a_model_too_large_for_one_message_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LARGEST", 10)
    exported: Any = SimpleNamespace(state_dict={"weight": torch.zeros(4)})
    program: Any = SimpleNamespace(inputs={"images": IMAGES[0]})
    with pytest.raises(UserError, match=r"for models below 10 bytes, not of 16: choose --to openvino"):
        onnx.write(tmp_path / "model", program, exported, None, lambda: IMAGES)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_pytorch_warns_of_when_nncf_is_imported_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def imported(name: str) -> Any:
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
        return stand_in(0.03, 0.0, 0.0, [])

    monkeypatch.setattr(quantise, "library", imported)
    quantise._quantised(0.0, IMAGES, lambda model, x: [(1 + model) * x, x])
    assert "CUDA" not in caplog.text


def test_outputs_that_differ_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="in int8 the outputs differ by 30% on the calibration images: nothing is kept"):
        quantised(monkeypatch, 0.9, 0.8, 0.6)
