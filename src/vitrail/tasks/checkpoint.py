"""Write a task's checkpoint: `model.safetensors` and `config.json`, data and never code; take weights of another."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vitrail.errors import UserError
from vitrail.files import atomic_folder, write_atomic

if TYPE_CHECKING:
    from vitrail.tasks.task import Task

log = logging.getLogger("vitrail")

FORMAT = 1
"""of `config.json`"""


def write(task: Task, path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the folder `path`, whole or not at all. UserError if something that is no checkpoint is there."""
    if path.exists() and not (path / "config.json").exists():
        raise UserError(f"{path} exists and is not a checkpoint: choose another path to save to")
    config = {
        "vitrail": FORMAT,
        "task": task.name,
        "classes": task.classes,
        "preprocess": task.preprocess.as_dict(),
        **task.config(),
    }
    tensors = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    with atomic_folder(path) as folder:
        write_atomic(folder / "model.safetensors", to_safetensors(tensors, metadata={"format": "pt"}))
        for name, text in task.files().items():
            write_atomic(folder / name, text)
        write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


def digest(task: Task) -> str:
    """SHA-256 of the names and the bytes of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(task.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def take_fitting(task: Task, given: Mapping[str, Tensor]) -> None:
    """Give a task every weight that has the name and the shape of one of its own; a line names one that it lacks."""
    own = task.state_dict()
    fitting = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    task.load_state_dict(fitting, strict=False)
    if new := sorted(own.keys() - fitting.keys()):
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        log.warning(f"{new[0]}{more} start with new values: the weights to start from have none of that shape")
