"""Copies of tensors in host memory, so that a training can continue while they are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copies nested tensors to the CPU, into the same memory each time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, value: Any) -> Any:
        """Nested dicts and lists with a copy of each tensor; tensors that share memory share their copy.

        Copies from a GPU are queued behind its work, into pinned memory: call `wait` before they are read.
        """
        seen: dict[Any, Tensor] = {}
        copy = self._copy(value, (), seen)
        self._copied = torch.cuda.Event() if any(device.type == "cuda" for device, *_ in seen) else None
        if self._copied is not None:
            self._copied.record()
        return copy

    def wait(self) -> None:
        """Wait until the copies are there. Any thread may call it."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, value: Any, place: tuple[Any, ...], seen: dict[Any, Tensor]) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(each, (*place, name), seen) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._copy(each, (*place, i), seen) for i, each in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        same = (value.device, value.dtype, value.data_ptr(), value.shape, value.stride())
        if same not in seen:
            seen[same] = self._buffer(value, place)
            seen[same].copy_(value.detach(), non_blocking=value.is_cuda)
        return seen[same]

    def _buffer(self, value: Tensor, place: tuple[Any, ...]) -> Tensor:
        """Memory for the copy of a tensor: that of the last copy, if the tensor has not changed its shape."""
        old = self._buffers.get(place)
        if old is None or (old.shape, old.dtype) != (value.shape, value.dtype):
            old = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda)
            self._buffers[place] = old
        return old
