"""ONNX, for ONNX Runtime and others."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vitrail.errors import UserError, first_line
from vitrail.export.tracing import modules_of
from vitrail.tasks.exported import Program
from vitrail.zoo.exports import KEY, Meta
from vitrail.zoo.exports.engines import library

OPSET = 20
"""version of ONNX's operators: the newest that has no operators which engines do not know yet"""
LARGEST = 1_900_000_000
"""bytes of a file that protobuf takes: larger weights go beside it"""


def check() -> None:
    """UserError if a package is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        library(name)


def write(
    path: Path,
    program: Program,
    exported: torch.export.ExportedProgram,
    meta: Meta,
    calibration: Callable[[], list[Tensor]] | None,
) -> None:
    """`path` with the ending .onnx, the metadata in `metadata_props`."""
    file = path.with_name(f"{path.name}.onnx")
    quantised = calibration is not None and "images" in program.inputs
    if quantised and (size := _bytes(exported)) > LARGEST:  # NNCF and ONNX Runtime pass the graph on in one piece
        raise UserError(f"ONNX in int8 is for models below {LARGEST:,} bytes, not of {size:,}: choose --to openvino")
    write_graph(file, program, exported, meta)
    if calibration is not None and quantised:
        from vitrail.export.quantise import quantise_onnx

        quantise_onnx(file, calibration(), meta)


def write_graph(file: Path, program: Program, exported: torch.export.ExportedProgram, meta: Meta) -> None:
    """The program in float32."""
    try:
        with quiet():
            made = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                opset_version=OPSET,
            )
    except Exception as error:
        raise UserError(f"ONNX cannot express {_operator(error, exported)}: choose --to pt2") from error
    assert made is not None
    made.model.metadata_props[KEY] = meta.as_json()
    made.model.metadata_props["author"] = f"vitrail {meta.version}"
    with quiet():
        made.save(file, external_data=_bytes(exported) > LARGEST)


def _bytes(exported: torch.export.ExportedProgram) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())


def _operator(error: BaseException, exported: torch.export.ExportedProgram) -> str:
    """The operator that an error of the exporter names, and the module that calls it."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    for text in reversed(chain):
        if found := re.search(r"(?:aten|prims|higher_order|torchvision)[.:]+\w+(?:\.\w+)?", text):
            name = found[0].replace("::", ".")
            return f"{name} of {modules_of(exported, name)}"
    return f"this model ({first_line(chain[-1])[:200]})"


@contextlib.contextmanager
def quiet(library: str = "torch.onnx") -> Iterator[None]:
    """Without a library's own lines and progress bars: standard output is for results."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
