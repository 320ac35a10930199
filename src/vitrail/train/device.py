"""Device, number format, and releasing memory."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import Literal

import torch

from vitrail.errors import UserError
from vitrail.process import cores

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the best one available. PyTorch gets no more threads than there are cores for it."""
    limit_threads()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{device.type} is not a device type that can run models here")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: choose cpu, or leave --device out") from error
    return device


def limit_threads() -> None:
    """Lower PyTorch's threads to the cores of this process, unless OMP_NUM_THREADS sets them.

    In a container it would start one per core of the machine, and they would wait for each other.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())


def native_bf16(device: torch.device) -> bool:
    """Whether the device supports bf16 natively; a CPU that only emulates it is slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # PyTorch has no public API for these two checks.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def number_format(device: torch.device, precision: Precision) -> torch.dtype:
    """The format in which products are computed; auto: the fastest that the device supports natively.

    That is bf16, or fp16 on the NVIDIA GPUs with tensor cores that lack bf16 (such as V100 and T4), else float32.
    """
    if precision != "auto":
        return FORMATS[precision]
    if native_bf16(device):
        return torch.bfloat16
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if tensor_cores else torch.float32


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which the forward pass and the loss are computed."""
    chosen = number_format(device, precision)
    return nullcontext() if chosen == torch.float32 else torch.autocast(device.type, chosen)


def choose_attention(device: torch.device) -> None:
    """The kernels of fused attention that training on a CUDA device may use: all of PyTorch's but cuDNN's.

    cuDNN's is PyTorch's first choice on an H100 from 2.11 on. At some lengths, 64 tokens among them, its backward pass
    gives NaN though every value of the forward pass is finite (pytorch/pytorch#196678, NVIDIA/cudnn-frontend#160).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def compiles_norms(device: torch.device) -> bool:
    """Whether PyTorch can compile the step of an optimizer that needs the norm of a matrix.

    On a CPU, torch 2.6 crashes in it (seen here); 2.9, the first release with Muon, is the first that may.
    """
    return device.type != "cpu" or hasattr(torch.optim, "Muon")


def ready_to_compile(device: torch.device) -> None:
    """Raise UserError if torch.compile has no compiler, and silence a warning that is irrelevant on a CPU."""
    if device.type != "cpu":
        return
    if not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        raise UserError("compiling on a CPU needs a C++ compiler: install g++, or add --no-compile")
    # If CUDA's compiler is installed without a GPU, importing this module warns, and compiling imports it. Newer
    # releases of PyTorch log the warning; older ones print it.
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda row: "No CUDA runtime" not in row.getMessage())
    with redirect_stderr(io.StringIO()):
        import torch.utils.cpp_extension  # noqa: F401


def release_memory() -> None:
    """Return free heap memory to the system, if glibc allocates it.

    Tensors whose sizes change each step, as with captions, fragment the heap by gigabytes within an hour.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
