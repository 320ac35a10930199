"""int8 with NNCF: calibrated on images, and the layers that lose most kept in float32.

Linear layers, convolutions and the products of attention become integers; norms, softmax and the residual path stay
floats (NNCF's scheme for Transformers), with SmoothQuant (arXiv 2211.10438) between activations and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.export.onnx import quiet
from vitrail.zoo.exports import KEY, Meta
from vitrail.zoo.exports.engines import library

ERROR = 0.05
"""largest mean relative error of the outputs; beyond it, layers go back to float32, those that lose most first"""
CHECKED = 32
"""images that this error is measured on"""
REVERTED = 12
"""most layers that go back"""

Run = Callable[[Any, np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""a model in some representation and images [1, C, H, W] to its first output"""


def quantise_onnx(file: Path, images: Sequence[Tensor], meta: Meta) -> None:
    """Replace the float32 graph in a file by one in int8."""
    onnx = library("onnx")
    sessions: dict[int, Any] = {}

    def run(model: Any, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if id(model) not in sessions:
            sessions.clear()
            sessions[id(model)] = session_of(model)
        return sessions[id(model)].run(None, {"images": x})[0]

    found = _quantised(onnx.load(file), images, run)
    del found.metadata_props[:]
    onnx.helper.set_model_props(found, {KEY: meta.as_json(), "author": f"vitrail {meta.version}"})
    onnx.save(found, file)


def session_of(model: Any) -> Any:
    """A session of a model in memory."""
    onnxruntime = library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def quantise_openvino(model: Any, images: Sequence[Tensor]) -> Any:
    """The same for a model of OpenVINO."""
    openvino = library("openvino")

    def run(found: Any, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if isinstance(found, openvino.Model):
            found = openvino.compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return found([x])[0]

    return _quantised(model, images, run)


def _quantised(model: Any, images: Sequence[Tensor], run: Run) -> Any:
    nncf = library("nncf")
    arrays = [image.numpy() for image in images]
    checked = arrays[:: max(1, len(arrays) // CHECKED)][:CHECKED]
    expected = [run(model, x) for x in checked]

    def agreement(found: Any, data: Any) -> tuple[float, list[float]]:
        """One minus the relative error, as a mean and for each image."""
        each = []
        for place, x in data:
            apart = np.linalg.norm(run(found, x) - expected[place])
            each.append(1 - float(apart / max(float(np.linalg.norm(expected[place])), 1e-12)))
        return float(np.mean(each)), each

    with quiet("nncf"):
        return nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset(arrays, lambda x: {"images": x}),
            validation_dataset=nncf.Dataset(list(enumerate(checked)), lambda item: {"images": item[1]}),
            validation_fn=agreement,
            max_drop=ERROR,
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(arrays),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                max_num_iterations=REVERTED, ranking_subset_size=len(checked)
            ),
        )
