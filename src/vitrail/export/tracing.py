"""Programs through `torch.export`: with free axes, and with errors that name the module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import first_line
from vitrail.tasks.exported import Program

MAX_LENGTH = 1 << 20
"""of a free axis that has no limit of its own"""
MAX_SIDE = 1 << 14
"""pixels of an image's side"""


class NotTraceable(Exception):
    """A model that PyTorch or an engine's writer cannot express, in one line."""


class _InDtype(nn.Module):
    """A program that computes in another floating-point type, and takes and gives float32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.module(*(x.to(self.dtype) if x.is_floating_point() else x for x in inputs))
        return tuple(x.float() if x.is_floating_point() else x for x in found)


def trace(
    program: Program, multiple: int, any_size: bool, dtype: torch.dtype = torch.float32
) -> torch.export.ExportedProgram:
    """The exported program, free in every axis that the program names; in height and width only for `any_size`."""
    inputs = tuple(program.inputs.values())
    dims: dict[str, Any] = {}
    shapes = tuple(
        {
            axis: _dim(name, dims, program, multiple)
            for axis, name in program.free.get(key, {}).items()
            if any_size or name not in ("height", "width")
        }
        for key in program.inputs
    )
    module = program.module if dtype == torch.float32 else _InDtype(deepcopy(program.module), dtype)
    with warnings.catch_warnings(), _located(module) as stack:
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(module, inputs, dynamic_shapes=_spread(module, shapes), strict=False)
        except Exception as error:
            raise NotTraceable(f"{_place(stack)} cannot be exported: {_reason(error)}") from error


def _spread(module: nn.Module, shapes: tuple[Any, ...]) -> Any:
    """The shapes of inputs as `torch.export` wants them: those of `*inputs` are one tuple."""
    parameters = list(signature(module.forward).parameters.values())
    if parameters[-1].kind is not Parameter.VAR_POSITIONAL:
        return shapes
    plain = len(parameters) - 1
    return (*shapes[:plain], shapes[plain:])


def _dim(name: str, dims: dict[str, Any], program: Program, multiple: int) -> Any:
    """One `Dim` per name: `height` and `width` are multiples of a patch, two at least."""
    if name not in dims:
        if name in ("height", "width"):
            dims[name] = multiple * torch.export.Dim(f"{name}_patches", min=2, max=MAX_SIDE // multiple)
        else:
            low, high = program.limits.get(name, (1, MAX_LENGTH))
            dims[name] = torch.export.Dim(name, min=low, max=high)
    return dims[name]


@contextmanager
def _located(module: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that are being called, outermost first; after an error, of those that it left."""
    stack: list[str] = []
    hooks = []
    for name, inner in module.named_modules():

        def enter(*_: Any, called: str = name) -> None:
            stack.append(called)

        def leave(*_: Any) -> None:
            stack.pop()

        hooks += [inner.register_forward_pre_hook(enter), inner.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def _place(stack: list[str]) -> str:
    return stack[-1].removeprefix("task.") or "the model" if stack else "the model"


def _reason(error: Exception) -> str:
    """The first line, and of a constraint on a free axis the one that names it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line.removeprefix("- ") for line in lines[1:] if line.startswith("- ") and "TORCH_LOGS" in lines[0]]
    return (named or lines or [first_line(error)])[0][:300]


def modules_of(program: torch.export.ExportedProgram, operator: str) -> str:
    """The module that calls an operator such as `aten.nonzero.default`, for errors."""
    for node in program.graph.nodes:
        if node.op == "call_function" and operator in (str(node.target), getattr(node.target, "__name__", "")):
            stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
            names = [name for name, _ in stack.values() if name]
            if names:
                return names[-1].removeprefix("task.")
    return "the model"
