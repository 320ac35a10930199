"""Models by name, checkpoints in and out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.tasks.classify import Classify
from vitrail.tasks.embed import Embed
from vitrail.tasks.task import Task
from vitrail.vit import Head, ViT, ViTConfig, config_for, resize_positions
from vitrail.zoo import native

CARRIED = Path(__file__).parent / "weights"


def create(
    size: str | ViTConfig,
    classes: int | Sequence[str] | None = None,
    *,
    hidden: int | None = None,
    preprocess: Preprocess | None = None,
    **changes: Any,
) -> Task:
    """A fresh model: `create("S/16", classes=5, channels=4, image_size=(96, 128))`.

    `size` names one of `vitrail.vit.SIZES`; `changes` are fields of `ViTConfig`. `classes` is a number or the names;
    without it the model is an encoder that gives pooled vectors [B, D]. `hidden` makes the paper's pre-training head.
    """
    config = config_for(size, **changes)
    encoder = ViT(config)
    if preprocess is None:
        half = (0.5,) * config.channels
        preprocess = Preprocess(size=config.image_size, mean=half, std=half, channels=config.channels)
    if classes is None:
        return Embed(encoder, preprocess)
    return Classify(encoder, _names(classes), preprocess, hidden=hidden)


def load(
    source: str | Path,
    classes: int | Sequence[str] | None = None,
    channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Task:
    """The model of a run folder, a checkpoint folder, or the name of weights in the package; in eval mode.

    Another number of `classes` gets a fresh head (0: none, pooled vectors come out); other `channels` spread the
    patch filters; another `image_size`, a number or (height, width), interpolates the positions.
    """
    path = find(source)
    config, weights = native.read(path)
    task = native.build(config, path)
    native.fill(task, weights, path)
    if channels is not None:
        change_channels(task, channels)
    if image_size is not None:
        change_size(task, (image_size, image_size) if isinstance(image_size, int) else image_size)
    if classes is not None:
        task = change_classes(task, classes)
    return task.to(device=device, dtype=dtype).eval()


def find(source: str | Path) -> Path:
    """The checkpoint folder that a source means. A path that exists wins over a name."""
    path = Path(source)
    for folder in (path, path / "best", path / "last"):
        if (folder / "config.json").is_file():
            return folder
    if path.name == "model.safetensors" and path.is_file():
        return path.parent
    if path.exists():
        raise UserError(f"{source} holds no checkpoint: choose a run folder, or a folder with config.json and weights")
    names = carried()
    if str(source) in names:
        return CARRIED / str(source)
    near = get_close_matches(str(source), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"give a folder, or one of {', '.join(names) or 'no names yet'}"
    raise UserError(f"no model {str(source)!r}: {hint}")


def carried() -> list[str]:
    """Names of the weights in the package."""
    return sorted(folder.parent.name for folder in CARRIED.glob("*/config.json"))


def change_classes(task: Task, classes: int | Sequence[str]) -> Task:
    """The same encoder for other classes: a fresh head, unless the names are the checkpoint's own. 0 leaves it out."""
    encoder = encoder_of(task)
    if classes == 0:
        return Embed(encoder, task.preprocess)
    names = _names(classes)
    if isinstance(task, Classify) and (names == task.classes or classes == len(task.classes)):
        return task
    if isinstance(task, Classify):
        task.head, task.classes, task.hidden = Head(encoder.config.width, len(names)), names, None
        return task
    return Classify(encoder, names, task.preprocess)


def change_channels(task: Task, channels: int) -> None:
    """Let the first filters read another number of channels: repeated in turn, scaled so that sums keep their size."""
    encoder = encoder_of(task)
    old = encoder.config.channels
    if channels == old:
        return
    first = next(module for module in encoder.patches.modules() if isinstance(module, nn.Conv2d))
    places = torch.arange(channels) % old
    # To one channel the filters are summed: a grey picture then looks as it did with its channel repeated.
    weight = first.weight.sum(1, keepdim=True) if channels == 1 else first.weight[:, places] * old / channels
    first.weight = nn.Parameter(weight.detach().clone())
    first.in_channels = channels
    encoder.config = replace(encoder.config, channels=channels)
    preprocess = task.preprocess
    mean, std = ([statistics[i % old] for i in range(channels)] for statistics in (preprocess.mean, preprocess.std))
    if channels == 1:
        mean, std = [math.fsum(preprocess.mean) / old], [math.fsum(preprocess.std) / old]
    task.preprocess = replace(preprocess, channels=channels, mean=tuple(mean), std=tuple(std))


def change_size(task: Task, size: tuple[int, int]) -> None:
    """Interpolate the learned positions for pictures of `size` (height, width), and prepare pictures to that size."""
    encoder = encoder_of(task)
    old = encoder.config
    encoder.config = new = replace(old, image_size=size)
    if old.positions == "learned" and new.grid != old.grid:
        positions = resize_positions(encoder.positions.detach(), old.grid, new.grid, int(old.class_token))
        encoder.positions = nn.Parameter(positions)
    task.preprocess = replace(task.preprocess, size=size)


def encoder_of(task: Task) -> ViT:
    """The task's Vision Transformer."""
    encoder = getattr(task, "encoder", None)
    if not isinstance(encoder, ViT):
        raise UserError(f"the model of task {task.name} has no Vision Transformer to change")
    return encoder


def _names(classes: int | Sequence[str]) -> list[str]:
    if isinstance(classes, int):
        if classes < 1:
            raise UserError(f"a classifier needs at least one class, got {classes}")
        return [str(i) for i in range(classes)]
    return list(classes)
