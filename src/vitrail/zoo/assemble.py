"""From files to a model: find their source, check that every name fits, and load the weights without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitrail.data.preprocess import MAX_CHANNELS, Preprocess
from vitrail.errors import UserError, first_line
from vitrail.tasks.classify import Classify
from vitrail.tasks.embed import Embed
from vitrail.tasks.encoder import Encoder, encoder_for
from vitrail.tasks.regress import Regress
from vitrail.tasks.task import Task
from vitrail.tasks.values import Problem
from vitrail.variants import simplest
from vitrail.zoo.entries import choose
from vitrail.zoo.files import open_files
from vitrail.zoo.filled import fill, made_twice
from vitrail.zoo.foreign import refuse_unready, what_else
from vitrail.zoo.meta import without_memory
from vitrail.zoo.source import Files, Found, Lazy, Source

SOURCES = ("native", "captioners", "google", "sam", "originals", "timm", "huggingface", "torchvision")
"""modules of this folder, in the order in which they are tried on a checkpoint"""
MAX_PIXELS = 1 << 14
"""maximum image side of a config; a malicious config could request positions that exhaust memory"""
BLOCKS = ("depth", "num_hidden_layers", "num_layers", "layers")
CHANNELS = ("channels", "num_channels", "in_chans")
"""their names in configs"""


def source_named(name: str) -> Source:
    """The module of a source."""
    return import_module(f"vitrail.zoo.{name}")


@cache
def _source_there(name: str) -> Source | None:
    return source_named(name) if find_spec(f"vitrail.zoo.{name}") else None


def recognise(path: Path) -> tuple[Files, Source, Found]:
    """The files at `path`, their source, and their content."""
    found = open_files(path)
    _check_counts(found)
    refuse_unready(found)

    def source_of(files: Files) -> Source | None:
        for name in SOURCES:  # imported one by one, because importing is slow
            if (source := _source_there(name)) is None:
                continue
            with _one_line(_contradiction(path, source)):
                if source.recognise(files):
                    return source
        return None

    files = choose(found, lambda files: source_of(files) is not None)
    source = source_of(files)
    if source is None:
        raise UserError(f"{path} {what_else(files)}")
    with _one_line(_contradiction(path, source)):
        return files, source, source.read(files)


def _contradiction(path: Path, source: Source) -> str:
    return f"{path} looks like a checkpoint of {source.NAME}, but does not describe a model"


@contextmanager
def _one_line(message: str) -> Iterator[None]:
    """Report errors of a config, which is an untrusted file: any value may have a wrong type or size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes without elements, whose weights are refused later
            yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason = f"{type(error).__name__}: {first_line(error)[:120]}"
        raise UserError(f"{message} ({reason}): choose another checkpoint") from error


def _check_counts(files: Files) -> None:
    """Refuse a config with more blocks than the weights have, or with an impossible number of channels.

    Renaming tables have one row per block, and statistics one number per channel: a billion of them would take minutes.
    """
    values = [files.json.get("config.json")]
    limits = {**dict.fromkeys(BLOCKS, len(files.weights)), **dict.fromkeys(CHANNELS, MAX_CHANNELS)}
    while values:
        value = values.pop()
        if isinstance(value, dict):
            for name in limits.keys() & value.keys():
                if isinstance(value[name], int) and value[name] > limits[name]:
                    wanted = str(value[name])[:20]
                    raise UserError(
                        f"{files.path}: its config and its weights contradict each other at {name} {wanted}"
                    )
            values += value.values()


def assemble(files: Files, found: Found, dtype: torch.dtype | None = None) -> Task:
    """The model, in `dtype` (default float32). A weight that is used unchanged stays memory-mapped."""
    if found.ready is not None:
        return made_twice(found.ready, files.path).to(dtype or torch.float32).eval()
    _check_names(files, found)
    with _one_line(f"{files.path} does not describe a model"), without_memory():
        task = _build(files, found)
    own = task.state_dict()
    if wrong := sorted(own.keys() ^ found.weights.keys()):
        raise UserError(
            f"{files.path}: the config and the weights contradict each other at {wrong[0]}, "
            f"which {'the weights lack' if wrong[0] in own else 'is not in the config'}"
        )
    state = {name: _weight(files, found, name, target, dtype or torch.float32) for name, target in own.items()}
    fill(task, state, files.path)
    return task.eval()


def _build(files: Files, found: Found) -> Task:
    if found.task is not None:
        return found.task()
    assert found.encoder is not None
    config = found.encoder
    if config.depth > len(found.weights) or max(config.image_size) > MAX_PIXELS:
        raise UserError(
            f"{files.path}: its config asks for {config.depth} blocks at {config.image_size}, its weights do not"
        )
    return task_around(
        encoder_for(simplest(config)), found.preprocess, found.classes, hidden=found.hidden, problem=found.problem
    )


def task_around(
    encoder: Encoder,
    preprocess: Preprocess,
    outputs: list[str] | None,
    *,
    hidden: int | None = None,
    problem: Problem | None = None,
) -> Task:
    """The task of an encoder and a head with named `outputs`, or of an encoder alone where these are None."""
    if outputs is None:
        return Embed(encoder, preprocess)
    if problem == "regression":
        return Regress(encoder, outputs, preprocess, hidden=hidden)
    loss: Literal["softmax", "sigmoid"] = "sigmoid" if problem == "multi_label_classification" else "softmax"
    return Classify(encoder, outputs, preprocess, hidden=hidden, loss=loss)


def _check_names(files: Files, found: Found) -> None:
    """Check that every name in the files is used or left out on purpose, and that every used name exists."""
    used = {name for weight in found.weights.values() for name in weight.names}
    there = files.weights.keys()
    if missing := sorted(used - there):
        raise UserError(
            f"{files.path} lacks {missing[0]}{_and_more(missing)}, which {found.source} has: "
            "it is incomplete, or its config contradicts its weights"
        )
    if unknown := sorted(there - used - found.left.keys()):
        raise UserError(
            f"{files.path} holds {unknown[0]}{_and_more(unknown)}, which {found.source} does not have: "
            "it is another model, or its config contradicts its weights"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _weight(files: Files, found: Found, name: str, target: Tensor, dtype: torch.dtype) -> Tensor:
    names, make, _ = found.weights[name]
    wanted = dtype if target.is_floating_point() else target.dtype
    tensors = [files.weights[n] for n in names]
    for n, tensor in zip(names, tensors, strict=True):
        if tensor.is_floating_point() != target.is_floating_point():
            raise UserError(f"{files.path}: {n} holds {tensor.dtype}: give weights that are not quantised")
    if isinstance(files.weights, Lazy) and (make is not None or tensors[0].dtype != wanted):
        tensors = [files.weights.passing(n) for n in names]  # copied, so that the source can be freed
    if make is None:
        value = tensors[0]
    else:
        shapes = ", ".join(str(list(files.shapes[n])) for n in names)
        with _one_line(f"{files.path}: {names[0]} has a shape {shapes} that its config contradicts"):
            value = make(*tensors).contiguous()
    _check_shape(files, names, tuple(value.shape), target)
    value = value.to(wanted)
    # A zip archive does not align arrays; PyTorch needs alignment to the element size.
    return value.clone() if value.data_ptr() % value.element_size() else value


def _check_shape(files: Files, names: tuple[str, ...], shape: tuple[int, ...], target: Tensor) -> None:
    if shape != target.shape:
        raise UserError(
            f"{files.path}: {' and '.join(names)} gives {list(shape)} where its config asks for {list(target.shape)}: "
            "the two contradict each other"
        )
