"""Models without memory for their weights: made to know names and shapes, or to be filled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside have their weights on the meta device, and no values are drawn for them."""
    with torch.device("meta"), _Untouched():
        yield


class _Untouched(TorchFunctionMode):
    """Skips the initialisation of weights: on the meta device they have no memory, so initial values are useless.

    Initialising them there works too, but makes PyTorch import its compiler, which takes seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensor = args[0] if args else kwargs.get("tensor")
        changes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if changes and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)
