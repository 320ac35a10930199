"""vitrail's own checkpoints: a folder with `model.safetensors` and `config.json`, data and never code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.files import whole_folder, write_whole
from vitrail.tasks.classify import Classify
from vitrail.tasks.embed import Embed
from vitrail.tasks.task import Task
from vitrail.vit import ViT, ViTConfig

FORMAT = 1


def save(task: Task, path: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write `task` to the folder `path`, with `weights` in place of its own where given."""
    path = Path(path)
    if path.exists() and not (path / "config.json").exists():
        raise UserError(f"{path} exists and is no checkpoint: choose another place to save to")
    config = {
        "vitrail": FORMAT,
        "task": task.name,
        "classes": task.classes,
        "preprocess": task.preprocess.as_dict(),
        **task.config(),
    }
    weights = {name: value.detach().contiguous().cpu() for name, value in (weights or task.state_dict()).items()}
    with whole_folder(path) as folder:
        write_whole(folder / "model.safetensors", to_safetensors(weights, metadata={"format": "pt"}))
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights (memory-mapped) of the checkpoint folder `path`."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / 'config.json'} cannot be read ({_first_line(error)}): choose another checkpoint"
        ) from error
    if not isinstance(config, dict) or config.get("vitrail") != FORMAT:
        raise UserError(f"{path} is no checkpoint of vitrail's format {FORMAT}: choose a folder that vitrail saved")
    try:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path / 'model.safetensors'} cannot be read ({_first_line(error)}): it is missing, cut off or damaged"
        ) from error
    return config, weights


def build(config: dict[str, Any], path: Path) -> Task:
    """The task of a config, with fresh weights."""
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["encoder"].items()}
        encoder = ViT(ViTConfig(**values))
        preprocess = Preprocess.from_dict(config["preprocess"])
        if config["task"] == "classify":
            return Classify(encoder, config["classes"], preprocess, hidden=config["hidden"], loss=config["loss"])
        if config["task"] == "embed":
            return Embed(encoder, preprocess)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'config.json'} does not describe a model ({error}): choose another checkpoint"
        ) from error
    raise UserError(
        f"{path} holds the task {config['task']!r}, which this version of vitrail does not know: upgrade it"
    )


def fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights into a module; every key must fit."""
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(weights)) or [
        name for name, value in own.items() if value.shape != weights[name].shape
    ]
    if wrong:
        raise UserError(f"{path}: config.json and model.safetensors contradict each other at {wrong[0]}")
    module.load_state_dict(weights)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
