"""timm's networks in the engines that vitrail exports to, without vitrail: as each engine's documentation shows it.

Every graph has fixed shapes, which no engine is slower with.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nncf
import onnxruntime
import openvino
import torch
from torch import Tensor, nn

from vitrail.zoo.exports.engines import openvino_core

Step = Callable[[], Any]

PRECISIONS = ("fp32", "bf16", "int8")


def steps(network: nn.Module, x: Tensor, images: Sequence[Tensor]) -> Iterator[tuple[str, Step]]:
    """The name of each engine and what answers `x` [B, C, H, W]; int8 is calibrated on `images`, [1, C, H, W] each."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.onnx"
        torch.onnx.export(network, (x,), file, input_names=["images"], dynamo=True, external_data=False)
        yield "timm in ONNX Runtime fp32", onnxruntime_step(file, x)
    core, graph = openvino_core(), openvino.convert_model(network, example_input=x[:1])
    for precision in PRECISIONS:
        yield f"timm in OpenVINO {precision}", openvino_step(core, graph, x, precision, images)


def onnxruntime_step(file: Path, x: Tensor) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: session.run(None, {"images": array})


def openvino_step(core: Any, graph: Any, x: Tensor, precision: str, images: Sequence[Tensor]) -> Step:
    """int8 leaves the layers that are not quantised to the engine's own choice, bf16 on processors that have it."""
    if precision == "int8":
        logging.getLogger("nncf").setLevel(logging.ERROR)
        calibration = nncf.Dataset([image.numpy() for image in images])
        kind = nncf.ModelType.TRANSFORMER
        graph = nncf.quantize(graph, calibration, model_type=kind, subset_size=len(images))
    how: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision != "int8":
        how["INFERENCE_PRECISION_HINT"] = "f32" if precision == "fp32" else precision
    graph = graph.clone()
    graph.reshape(list(x.shape))
    model = core.compile_model(graph, "CPU", how)
    array = x.numpy()
    return lambda: model(array)
