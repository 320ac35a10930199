"""What runs a model: the fastest engine of this machine whose outputs agree with PyTorch's, by a short measurement.

Candidates are PyTorch itself (`eager`), `torch.compile`, and on a CPU the engines of exports that are installed. They
run the same task in every answer; a lower precision is never chosen unless it was requested.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.data.prepare import Sample
from vitrail.errors import RunError, UserError, first_line
from vitrail.export import TOLERANCE
from vitrail.export.proof import Proof, normalised_noise
from vitrail.serve.settings import Settings
from vitrail.tasks.exported import Exported
from vitrail.tasks.task import Task
from vitrail.train.device import Precision, autocast, ready_to_compile

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
"""what writing and running an export needs"""
REPEATS = 3
SATURATED_BATCH = 8
"""images of a batch; on a CPU larger ones are no faster per image"""
MAX_BATCH_SECONDS = 0.5
"""seconds of a batch that is measured"""


@dataclass
class Engine:
    """A way to run a model."""

    name: str
    task: Task
    """whose answers it gives"""
    precision: Precision = "fp32"
    rate: float = 0.0
    """images per second in batches"""
    tried: list[str] = field(default_factory=list)
    """the other candidates: their rates, or why they were left out"""

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which it answers: mixed precision, or none for an export."""
        if isinstance(self.task, Exported):  # its programs have a number format of their own
            return nullcontext()
        return autocast(next(self.task.parameters()).device, self.precision)

    @property
    def number_format(self) -> str:
        """For people."""
        return "as exported" if self.name == "export" else self.precision

    def line(self) -> str:
        """What was chosen, in one line."""
        tried = f" ({'; '.join(self.tried)})" if self.tried else ""
        return f"{self.name}, {self.number_format}, {self.rate:.3g} images per second{tried}"


def choose(source: str, task: Task, settings: Settings, deadline: float, cleanup: ExitStack) -> Engine:
    """The engine for a model.

    Args:
        source: what the model was loaded from.
        deadline: the time (`time.monotonic`) after which no other candidate is tried.
        cleanup: removes the files of exports when the server stops.

    Raises:
        UserError: the engine that `settings` names cannot run the model.
    """
    if isinstance(task, Exported):
        if settings.engine != "auto" or settings.precision != "fp32":
            raise UserError(f"{source} is an export, which has its own engine and precision: leave both flags out")
        return measure_rate(Engine("export", task), settings)
    eager = Engine("eager", task, settings.precision)
    if settings.engine == "eager":
        return measure_rate(eager, settings)
    if settings.engine != "auto":
        try:
            return measure_rate(make_engine(settings.engine, source, task, settings, cleanup), settings)
        except (UserError, RunError) as error:
            raise UserError(f"--engine {settings.engine} cannot run {source}: {first_line(error)}") from error
    found = [measure_rate(eager, settings)]
    notes: list[str] = []
    late: list[str] = []
    for name in candidates(task, settings.precision):
        if time.monotonic() > deadline:
            late.append(name)
            continue
        try:
            found.append(measure_rate(make_engine(name, source, task, settings, cleanup), settings))
        except (UserError, RunError) as error:
            notes.append(f"{name} left out: {first_line(error)[:150]}")
    best = max(found, key=lambda engine: engine.rate)
    best.tried = [*(f"{engine.name} {engine.rate:.3g}" for engine in found if engine is not best), *notes]
    best.tried += [f"not tried, since the time was up: {', '.join(late)}"] * bool(late)
    return best


def candidates(task: Task, precision: str) -> list[str]:
    """The engines beside eager that this machine has, those that start sooner first."""
    device = next(task.parameters()).device
    names = []
    if device.type == "cpu" and precision == "fp32":
        names += [name for name in ("openvino", "onnx") if all(map(find_spec, PACKAGES[name]))]
    # Frames of any size would be compiled again and again while clients wait. On a CPU compiling takes the longest, and
    # is left to machines without the other engines.
    if device.type != "mps" and not names and task.preparation(train=False) is None:
        names.append("compile")
    return names


def make_engine(name: str, source: str, task: Task, settings: Settings, cleanup: ExitStack) -> Engine:
    """An engine whose outputs agree with eager's. UserError or RunError where it cannot be made."""
    if name == "compile":
        return Engine("compile", compile_task(task), settings.precision)
    from vitrail.export import export
    from vitrail.zoo.exports import read

    if settings.precision == "fp16" or (settings.precision == "bf16" and name == "onnx"):
        raise UserError(f"the engine {name} has no {settings.precision}: choose eager or compile")
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="vitrail-"))) / name
    export(source, folder, name, settings.precision)  # compares with eager, and refuses what differs
    return Engine(name, read(folder, "cpu"), settings.precision)


def compile_task(task: Task) -> Task:
    """The task with its encoder compiled, beside the task itself, which keeps its own for figures. UserError."""
    ready_to_compile(next(task.parameters()).device)
    fast = copy.copy(task)
    encoder: Any = torch.compile(task.encoder, dynamic=True)
    fast._modules = {**task._modules, "encoder": encoder}
    proof = Proof()
    try:
        for count in (1, 3):
            images = normalised_noise(task, count, task.preprocess.size).to(next(task.parameters()).device)
            for expected, found in zip(program_outputs(task, images), program_outputs(fast, images), strict=True):
                proof.add(expected, found, f"{count} images")
            proof.compared += 1
    except Exception as error:  # a compiler's
        raise UserError(f"it cannot be compiled ({first_line(error)[:150]})") from error
    if proof.share > TOLERANCE:
        raise UserError(f"its outputs differ from eager's by more than {TOLERANCE:g}: {proof.text()}")
    return fast


@torch.inference_mode()
def program_outputs(task: Task, images: Tensor) -> list[Tensor]:
    """What the programs of a task give for normalised images."""
    return [
        output.float()
        for program in task.programs({"image": images}).values()
        for output in program.module(*program.inputs.values())
    ]


def noise_samples(task: Task, count: int) -> list[Sample]:
    """Prepared images of noise."""
    generator = torch.Generator().manual_seed(0)
    shape = (task.preprocess.channels, *task.preprocess.size)
    return [task.prepare(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)) for _ in range(count)]


def measure_rate(engine: Engine, settings: Settings) -> Engine:
    """The engine, with its `rate` in batches of at most `MAX_BATCH_SECONDS` seconds."""
    on_cpu = next(engine.task.parameters()).device.type == "cpu"
    most = min(settings.max_batch, SATURATED_BATCH) if on_cpu else settings.max_batch
    seconds_per_batch(engine, 1, 1)  # warms up
    one = seconds_per_batch(engine, 1, 1)
    count = max(1, min(most, int(MAX_BATCH_SECONDS / one)))
    engine.rate = 1 / one if count == 1 else count / seconds_per_batch(engine, count, REPEATS)
    return engine


def seconds_per_batch(
    engine: Engine, count: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The shortest time of some batches."""
    batch, spent = noise_samples(engine.task, count), []
    with engine.autocast():
        for _ in range(repeats):
            began = clock()
            engine.task.answers(batch)
            spent.append(clock() - began)
    return max(min(spent), 1e-9)
