"""Which device and which number format to compute with, and memory that is given back."""

from __future__ import annotations

import ctypes
import io
import logging
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import Literal

import torch

from vitrail.errors import UserError


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the best one there is."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{device.type} is none of the kinds that models run on here")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: choose cpu, or leave --device out") from error
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 itself; a CPU that only emulates it is slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # PyTorch has no public name for these two checks.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def autocast(device: torch.device, precision: Literal["auto", "bf16", "fp32"]) -> AbstractContextManager[object]:
    """The context in which the forward pass and the loss are computed."""
    if precision == "fp32" or (precision == "auto" and not native_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def ready_to_compile(device: torch.device) -> None:
    """Raise UserError where torch.compile lacks a compiler, and keep it from a warning that is of no use on a CPU."""
    if device.type != "cpu":
        return
    if not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        raise UserError("compiling needs a C++ compiler on a CPU: install g++, or say --no-compile")
    # Where CUDA's compiler is installed without a GPU, this module says so when it is imported, which compiling does.
    # It is logged; older releases of PyTorch print it.
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda row: "No CUDA runtime" not in row.getMessage())
    with redirect_stderr(io.StringIO()):
        import torch.utils.cpp_extension  # noqa: F401


def release_memory() -> None:
    """Give free memory that lies between what is in use back to the system, where glibc allocates.

    Steps whose tensors differ in size leave gaps of gigabytes within the hour, as captions of many lengths do.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
