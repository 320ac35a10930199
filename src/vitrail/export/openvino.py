"""OpenVINO: the graph in an .xml file, its weights in a .bin file beside it."""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vitrail.errors import UserError
from vitrail.export import onnx
from vitrail.tasks.exported import Program
from vitrail.zoo.exports import KEY, Meta
from vitrail.zoo.exports.engines import WEIGHTS, digest_of, library, openvino_core, reason_of

SCOPES = "pkg.torch.onnx.name_scopes"
"""under which PyTorch notes the modules around a node, outermost first, and at the end its own name"""


def check() -> None:
    """UserError if a package is missing. The graph is written as ONNX first, which covers more operators."""
    onnx.check()
    library("openvino")


def write(
    path: Path,
    program: Program,
    exported: torch.export.ExportedProgram,
    meta: Meta,
    calibration: Callable[[], list[Tensor]] | None,
) -> None:
    """`path` with the endings .xml and .bin, the metadata in `rt_info`.

    For bf16 the weights stay in float32: the engine converts them when it loads, on processors that have it.
    """
    openvino = library("openvino")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "model.onnx"
        onnx.write_graph(file, program, exported, meta)
        try:
            model = openvino_core().read_model(file)  # `convert_model` takes a comma in a path for the end of it
        except Exception as error:
            raise UserError(f"OpenVINO cannot express {unsupported(error, file)}: choose --to onnx") from error
        if calibration is not None and "images" in program.inputs:
            from vitrail.export.quantise import quantise_openvino

            model = quantise_openvino(model, calibration())
        model.set_rt_info(meta.as_json(), KEY)
        graph, weights = (path.with_name(f"{path.name}{suffix}") for suffix in (".xml", ".bin"))
        openvino.save_model(model, graph, compress_to_fp16=False)
        # Again with the digest of the weights, which is known only now: the engine itself would run any others.
        model.set_rt_info(digest_of(weights), WEIGHTS)
        openvino.save_model(model, graph, compress_to_fp16=False)


def unsupported(error: Exception, file: Path) -> str:
    """The operator of an ONNX graph that OpenVINO does not know, and the module that calls it; else its error."""
    if not (found := re.search(r"operations: (\w+)", str(error))):
        return f"this model ({reason_of(error)})"
    nodes = [
        node for node in library("onnx").load(file, load_external_data=False).graph.node if node.op_type == found[1]
    ]
    scopes = [entry.value for node in nodes for entry in node.metadata_props if entry.key == SCOPES]
    names = [name for name in ast.literal_eval(scopes[0])[:-1] if name] if scopes else []
    return f"{found[1]} of {names[-1].removeprefix('task.') if names else 'the model'}"
