"""The engines that run exports. Each is imported only when a file needs it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import UserError, first_line
from vitrail.process import environment
from vitrail.tasks.exported import Engine
from vitrail.zoo.exports.programs import check_program

Names = Mapping[str, list[str]]
"""names of a program's `inputs` and `outputs`"""


class Format(NamedTuple):
    """A kind of file: how to read its metadata, and what runs it."""

    name: str
    suffix: str
    metadata: Callable[[Path], str | None]
    """None if the file has none. UserError for a damaged file"""
    engine: Callable[[Path, Names, str, Any], Engine]
    """file, names, precision and device to the engine"""


def library(name: str) -> Any:
    """A module of the extra `export`."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"this needs the package {name.partition('.')[0]}: pip install 'vitrail[export]'") from None


def reason_of(error: Exception) -> str:
    """The first line of an engine's error that is not a place in its own sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not re.match(r"Exception from |Check '.*' failed at ", line)]
    return (told or [first_line(error)])[0][:200]


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Any error of an engine with a file, which comes from outside, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{file} cannot be read ({reason_of(error)}): it is truncated or damaged, export the model again"
        ) from error


@contextlib.contextmanager
def running(file: Path, inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """An error of an engine in one line, such as inputs that the program was not written for."""
    try:
        yield
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs[:3])
        raise UserError(f"{file} cannot run inputs {shapes} ({reason_of(error)}): export it for these") from error


# torch.export


def pt2_metadata(file: Path) -> str | None:
    with _readable(file), zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if re.search(r"/extra(_files)?/vitrail\.json$", name)]
        return archive.read(names[0]).decode() if names else None


_ENVIRONMENT = threading.Lock()


def pt2_engine(file: Path, names: Names, precision: str, device: Any) -> Engine:
    """PyTorch, on any device. The program is checked before anything of it is run."""
    with _readable(file):
        check_program(file)
        # Without this variable of PyTorch's it may fall back to unpickling anything.
        with _ENVIRONMENT, environment("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"):
            program = torch.export.load(file)
        if device is not None and torch.device(device).type != "cpu":
            passes = import_module("torch.export.passes")
            program = passes.move_to_device_pass(program, torch.device(device))
        module = module_of(program)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with running(file, inputs), torch.inference_mode():
            return tuple(module(*inputs))

    return run


def module_of(program: Any) -> Any:
    """The module of a program. Its guards are text that would be executed, and `exports` has checked the sizes."""
    try:
        return program.module(check_guards=False)
    except TypeError:  # PyTorch before 2.9 has none
        return program.module()


# ONNX Runtime


def onnx_session(file: Path) -> Any:
    """A session on the CPU with as many threads as PyTorch has."""
    onnxruntime = library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with _readable(file):
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def onnx_metadata(file: Path) -> str | None:
    onnxruntime = library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with _readable(file):
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return session.get_modelmeta().custom_metadata_map.get("vitrail")


def onnx_engine(file: Path, names: Names, precision: str, device: Any) -> Engine:
    session = onnx_session(file)
    given = {entry.name for entry in session.get_inputs()}

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # An input that the program does not read, as of a decoder without attention, is not in the file.
        arrays = {k: _array(tensor) for k, tensor in zip(names["inputs"], inputs, strict=True) if k in given}
        with running(file, inputs):
            found = session.run(names["outputs"], arrays)
        return tuple(torch.from_numpy(array).to(inputs[0].device) for array in found)

    return run


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


# OpenVINO


WEIGHTS = "vitrail_weights"
"""name in `rt_info` of what `digest_of` gives for the file of weights"""


def openvino_metadata(file: Path) -> str | None:
    return _rt_info(file, "vitrail")


def _rt_info(file: Path, name: str) -> str | None:
    with _readable(file):
        tree = ElementTree.parse(file)  # the graph alone: weights are in the file beside it
    found = tree.find(f"./rt_info/{name}")
    return None if found is None else found.get("value")


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_weights(file: Path) -> None:
    """UserError if the weights beside a graph are missing, damaged or those of another export."""
    weights = file.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"{weights} is missing, which belongs to {file.name}: copy the whole folder")
    if digest_of(weights) != _rt_info(file, WEIGHTS):
        raise UserError(f"{weights} is damaged, or belongs to another export than {file.name}: copy the folder again")


@cache
def openvino_core() -> Any:
    """The one core of this process, which lasts as long as it does.

    Each core gives its thread another stack for signals and takes it back when it ends. If two end in the order in
    which they began, freed memory stays behind as that stack (OpenVINO 2026.4), and the next signal is the end of the
    process: Ctrl-C, or the exit of a worker that loads images.
    """
    return library("openvino").Core()


@contextlib.contextmanager
def one_openvino_core() -> Iterator[None]:
    """Within the block, a library that makes cores of its own, as NNCF does, gets the one of this process."""
    if find_spec("openvino") is None:
        yield
        return
    openvino, core = library("openvino"), openvino_core()
    inside: Any = import_module(openvino.compile_model.__module__)  # this function makes a core too
    kept = openvino.Core, inside.Core
    openvino.Core = inside.Core = lambda: core
    try:
        yield
    finally:
        openvino.Core, inside.Core = kept


def openvino_floats(precision: str, quantised: bool) -> dict[str, str]:
    """The option of OpenVINO for the floats of a program; `quantised` if those of int8 are integers beside them.

    Then it is left to the engine, which takes bf16 where the processor has it and is faster so.
    """
    if precision == "int8" and quantised:
        return {}
    return {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}


OWN_GRAPHS = 2
"""batch sizes, the first ones, for which a graph is compiled apart"""


def openvino_engine(file: Path, names: Names, precision: str, device: Any) -> Engine:
    """A graph is compiled when it is first run, for `OWN_GRAPHS` batch sizes apart where the images' size is fixed.

    Without a free side the engine plans ahead, which saves a few per cent of the time.
    """
    _check_weights(file)
    core = openvino_core()
    how: dict[str, Any] = openvino_floats(precision, quantised="images" in names["inputs"])
    how |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    with _readable(file):
        graph = core.read_model(file)
    free = any(side.is_dynamic for entry in graph.inputs for side in list(entry.partial_shape)[1:])
    if free:
        how["SNIPPETS_MODE"] = "DISABLE"  # code that OpenVINO 2026.4 reuses for a length of other needs: wrong numbers
    given = {name for entry in graph.inputs for name in entry.names}
    fixed: set[int] = set()

    @cache
    def compiled(batch: int | None) -> Any:
        own = graph.clone()
        if batch is not None:
            own.reshape([batch, *list(own.input().partial_shape)[1:]])
        with _readable(file):
            return core.compile_model(own, "CPU", how)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = {k: _array(tensor) for k, tensor in zip(names["inputs"], inputs, strict=True) if k in given}
        if not free and len(arrays) == 1 and len(fixed) < OWN_GRAPHS:
            fixed.add(len(inputs[0]))
        model = compiled(len(inputs[0]) if len(inputs[0]) in fixed else None)
        with running(file, inputs):
            found = model(arrays)
            # Copies: the engine writes its next outputs to the same memory.
            return tuple(torch.from_numpy(found[name].copy()).to(inputs[0].device) for name in names["outputs"])

    return run


FORMATS = {
    found.suffix: found
    for found in (
        Format("pt2", ".pt2", pt2_metadata, pt2_engine),
        Format("onnx", ".onnx", onnx_metadata, onnx_engine),
        Format("openvino", ".xml", openvino_metadata, openvino_engine),
    )
}
"""formats by the ending of their files"""
