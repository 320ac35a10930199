"""transformers, where it is installed: the library itself, and models of its configs. No file is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from typing import Any, TypeVar

import torch
from torch import nn

from vitrail.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def library() -> Any:
    """transformers, or how to get it."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "captioners of the Hub and language models need transformers: pip install 'vitrail[caption]'"
        ) from None
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters is said by us, in one line."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def fresh(values: Mapping[str, Any], maker: str) -> Any:
    """A model with fresh weights from transformers' config as plain data; `maker` is its class."""
    transformers = library()
    given = deepcopy(dict(values))  # some releases take entries out of the configs inside
    with quiet():
        config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
        if maker == "AutoModelForCausalLM":
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return getattr(transformers, maker)(config)


def with_memory(make: Callable[[], Model], shapes: Mapping[str, tuple[int, ...]]) -> Model:
    """A model whose tensors are on the CPU also where others are made without memory: transformers' models hold tables
    that no checkpoint has. UserError, before any memory is taken, where it needs other weights than those of `shapes`.
    """
    with torch.device("meta"):
        asked = sum(value.numel() for value in make().state_dict().values())
    there = sum(map(prod, shapes.values()))
    if asked != there:
        raise UserError(
            f"its config asks for {asked:,} weights and its file holds {there:,}: choose another checkpoint"
        )
    with torch.device("cpu"):
        return make()
