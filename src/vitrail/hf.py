"""transformers, if installed: the library itself, and models from its configs. No file is read here."""

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

CAPTIONERS = {
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
    "blip": "BlipForConditionalGeneration",
    "git": "GitForCausalLM",
}
"""transformers' model types and their classes"""


def library() -> Any:
    """The module transformers. UserError with the remedy if it is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "captioners of the Hub and language models need transformers: pip install 'vitrail[caption]'"
        ) from None
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports: vitrail reports what matters, in one line."""
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
    """A model with new weights from transformers' config as plain data; `maker` is its class."""
    transformers = library()
    given = deepcopy(dict(values))  # some releases remove entries from nested configs
    with quiet():
        config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
        if maker == "AutoModelForCausalLM":
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return getattr(transformers, maker)(config)


def with_memory(make: Callable[[], Model], shapes: Mapping[str, tuple[int, ...]]) -> Model:
    """A model on the CPU even under the meta device, because transformers' models have tables that are in no
    checkpoint.

    UserError, before any memory is allocated, if its weights differ from `shapes`.
    """
    with torch.device("meta"):
        needed = sum(value.numel() for value in make().state_dict().values())
    there = sum(map(prod, shapes.values()))
    if needed != there:
        raise UserError(f"its config needs {needed:,} weights but its file has {there:,}: choose another checkpoint")
    with torch.device("cpu"):
        return make()
