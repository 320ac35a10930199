"""Shared by the tests of exports: small models with weights that give something, and their exports."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from images import smooth
from PIL import Image

from vitrail.export import Result, export
from vitrail.tasks.task import Task

NEEDS = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
FORMATS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not all(map(find_spec, needs)), reason=f"{name} needs the extra: pip install 'vitrail[export]'"
        ),
    )
    for name, needs in NEEDS.items()
]


def filled(task: Task) -> Task:
    """The task with random weights everywhere: a head that starts at zero would make every export right."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            if not parameter.any() or parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in task.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
    return task.eval()


def exported(task: Task, folder: Path, to: str, **how: object) -> tuple[Path, Result]:
    """The folder of an export of this task, and what `export` returned."""
    source, out = folder / "source", folder / f"out-{to}"
    task.save(source)
    return out, export(source, out, to, **how)  # type: ignore[arg-type]


def an_image(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    """A smooth image of this height and width."""
    return Image.fromarray(smooth(*size, seed))
