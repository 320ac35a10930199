"""int8 with NNCF: calibrated on images, and the layers that lose most kept in float32.

Linear layers, convolutions and the products of attention become integers; norms, softmax and the residual path stay
floats (NNCF's scheme for Transformers), and so do products that no image enters, such as those that interpolate
positions: NNCF takes the tables in them for weights, and cannot restore them. SmoothQuant (arXiv 2211.10438) between
activations and weights halves the error of some graphs and ruins others, depending on the engine: it is used where the
outputs show that it helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import RunError, UserError, first_line
from vitrail.export.onnx import quiet
from vitrail.zoo.exports import KEY, Meta
from vitrail.zoo.exports.engines import library, one_openvino_core, openvino_core

ERROR = 0.05
"""largest mean relative error of the outputs; beyond it, layers go back to float32, those that lose most first"""
REFUSED = 0.25
"""the same for an export that is not kept: answers change then"""
CHECKED = 32
"""images that this error is measured on"""
REVERTED = 12
"""most layers that go back"""
FOLDED = 1 << 26
"""values of the largest table that is computed when the file is written"""

Array = np.ndarray[Any, Any]
Run = Callable[[Any, Array], list[Array]]
"""a model in some representation and images [1, C, H, W] to its outputs"""


class _Latest:
    """What runs the latest model, which is kept: another one in its place in memory would be taken for it."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make, self.model, self.made = make, None, None

    def of(self, model: Any) -> Any:
        if model is not self.model:
            self.model, self.made = model, self.make(model)
        return self.made


def quantise_onnx(file: Path, images: Sequence[Tensor], meta: Meta) -> None:
    """Replace the float32 graph in a file by one in int8."""
    onnx = library("onnx")
    sessions = _Latest(session_of)

    def run(model: Any, x: Array) -> list[Array]:
        found: list[Array] = sessions.of(model).run(None, {"images": x})
        return found

    # A table that the graph turns around first becomes one that is stored so: NNCF finds no weights in other places.
    with quiet("onnxscript"):
        limits = {"input_size_limit": FOLDED, "output_size_limit": FOLDED}
        model = library("onnxscript").optimizer.optimize(onnx.load(file), **limits)
    nodes = [(node.name, node.op_type == "Shape", node.input, node.output) for node in model.graph.node]
    found = _quantised(model, images, run, apart_from_images(nodes, "images"))
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

    core = openvino_core()
    compiled = _Latest(lambda found: core.compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))

    def run(found: Any, x: Array) -> list[Array]:
        outputs = (compiled.of(found) if isinstance(found, openvino.Model) else found)([x])
        return [outputs[i].copy() for i in range(len(outputs))]

    nodes = []
    for node in model.get_ordered_ops():
        read = [source.get_source_output().get_node().get_friendly_name() for source in node.inputs()]
        name = node.get_friendly_name()
        nodes.append((name, node.get_type_name() == "ShapeOf", read, [name]))
    return _quantised(model, images, run, apart_from_images(nodes, model.get_parameters()[0].get_friendly_name()))


Node = tuple[str, bool, Sequence[str], Sequence[str]]
"""of a graph: its name, whether it reads the shape alone, and the names of what it reads and of what it gives"""


def apart_from_images(nodes: Iterable[Node], images: str) -> list[str]:
    """The names of the nodes that no pixel enters: what they give depends on the size of `images` at most.

    The nodes are in the order in which they run.
    """
    from_images, apart = {images}, []
    for name, shape_alone, read, given in nodes:
        if not shape_alone and not from_images.isdisjoint(read):
            from_images.update(given)
        elif name != images:
            apart.append(name)
    return apart


def _quantised(model: Any, images: Sequence[Tensor], run: Run, floats: Sequence[str] = ()) -> Any:
    """The model in int8, but for the nodes `floats`. RunError if its outputs differ too much, whatever is tried."""
    with quiet("torch.utils.cpp_extension"):  # which NNCF imports, and which warns where CUDA is but no GPU
        nncf = library("nncf")
    arrays = [image.numpy() for image in images]
    checked = arrays[:: max(1, len(arrays) // CHECKED)][:CHECKED]
    expected = [run(model, x) for x in checked]

    def agreement(found: Any, data: Any) -> tuple[float, list[float]]:
        """One minus the relative error, as a mean and for each image."""
        each = [1 - error(run(found, x), expected[place]) for place, x in data]
        return float(np.mean(each)), each

    numbered = list(enumerate(checked))
    common = {
        "calibration_dataset": nncf.Dataset(arrays, lambda x: {"images": x}),
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": len(arrays),
        "ignored_scope": nncf.IgnoredScope(names=list(floats), validate=False),
    }
    best: tuple[float, Any, Any] | None = None
    reason = ""
    with quiet("nncf"), one_openvino_core():
        for how in (nncf.AdvancedQuantizationParameters(), without_smoothing(nncf)):
            try:
                found = nncf.quantize(deepcopy(model), **common, advanced_parameters=how)
            except Exception as failed:  # SmoothQuant on weights that NNCF does not find in a graph
                reason = first_line(failed)[:200]
                continue
            apart = 1 - agreement(found, numbered)[0]
            if best is None or apart < best[0]:
                best = apart, found, how
            if best[0] <= ERROR:
                return best[1]
        if best is None:
            raise UserError(f"NNCF cannot write this model in int8 ({reason}): use --precision fp32 or bf16")
        found = nncf.quantize_with_accuracy_control(
            deepcopy(model),
            validation_dataset=nncf.Dataset(numbered, lambda item: {"images": item[1]}),
            validation_fn=agreement,
            max_drop=ERROR,
            advanced_quantization_parameters=best[2],
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                max_num_iterations=REVERTED, ranking_subset_size=len(checked)
            ),
            **common,
        )
        apart = 1 - agreement(found, numbered)[0]
    if apart > REFUSED:
        raise RunError(
            f"in int8 the outputs differ by {apart:.0%} on the calibration images: nothing is kept; use --precision "
            "fp32 or bf16"
        )
    return found


def error(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The relative error: the mean over outputs that have values, which an empty cache of words has not."""
    each = [
        float(np.linalg.norm(one - other)) / max(float(np.linalg.norm(other)), 1e-12)
        for one, other in zip(found, expected, strict=True)
        if other.size
    ]
    return float(np.mean(each))


def without_smoothing(nncf: Any) -> Any:
    """Settings of NNCF without SmoothQuant."""
    off = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    return nncf.AdvancedQuantizationParameters(smooth_quant_alphas=off)
