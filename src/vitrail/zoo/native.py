"""vitrail's own checkpoints: a folder with `model.safetensors` and `config.json`, data and never code."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save as to_safetensors
from torch import Tensor

from vitrail.data.decode import Preprocess
from vitrail.data.text import Tokenizer
from vitrail.errors import UserError, first_line
from vitrail.files import whole_folder, write_whole
from vitrail.plain import described, rebuild
from vitrail.tasks.caption import Caption, Captioning
from vitrail.tasks.classify import Classify
from vitrail.tasks.consensus import Consensus
from vitrail.tasks.embed import Embed
from vitrail.tasks.encoder import KINDS, encoder_for
from vitrail.tasks.knn import KNN
from vitrail.tasks.regress import Regress
from vitrail.tasks.task import Task
from vitrail.zoo import captioners
from vitrail.zoo.source import Files, Found, Weight

NAME = "vitrail"
FORMAT = 1
Words = TypeVar("Words", bound=Tokenizer)


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
        for name, text in task.files().items():
            write_whole(folder / name, text)
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")


def recognise(files: Files) -> bool:
    """A config with vitrail's mark, whichever version's, and names of its models."""
    config = files.json.get("config.json", {})
    starts = ("encoder.", "model.") if "transformers" in config else ("encoder.",)
    return "vitrail" in config and any(name.startswith(starts) for name in files.weights)


def read(files: Files) -> Found:
    """Every weight under its own name."""
    config = files.json["config.json"]
    if config["vitrail"] != FORMAT:
        raise UserError(f"{files.path} has another format than vitrail's {FORMAT}: upgrade vitrail, or save it again")
    return Found(
        source=f"vitrail's {config.get('task')}",
        encoder=None,
        classes=config.get("classes"),
        preprocess=Preprocess.from_dict(config["preprocess"]),
        weights={name: Weight((name,)) for name in files.weights},
        left={},
        task=lambda: build(config, files),
    )


def write(task: Task, folder: Path) -> None:
    """`model.safetensors` and `config.json`."""
    save(task, folder)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: it is missing or damaged, and the captions need it") from error


def _tokenizer(config: dict[str, Any], files: Files, read: Callable[[str], Words]) -> Words:
    """The checkpoint's own: another one would turn its captions into nonsense."""
    path = files.path / "tokenizer.json"
    text = _text(path)
    try:
        tokenizer = read(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    rows = files.shapes.get("decoder.bias", (tokenizer.size,))[0]
    if tokenizer.size != rows:
        raise UserError(f"{path} has {tokenizer.size} entries where the weights have {rows}: put its own file back")
    if config.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{path} belongs to another checkpoint, with other words: put its own file back")
    return tokenizer


def build(config: dict[str, Any], files: Files) -> Task:
    """The task of a config, with fresh weights."""
    path = files.path
    try:
        if "transformers" in config or "language" in config:
            theirs = _tokenizer(config, files, partial(captioners.words_of, config))
            return captioners.rebuilt(config, theirs, files.shapes)
        encoder = encoder_for(described(config["encoder"], KINDS, "vit"))
        preprocess = Preprocess.from_dict(config["preprocess"])
        if config["task"] == "classify":
            return Classify(encoder, config["classes"], preprocess, hidden=config["hidden"], loss=config["loss"])
        if config["task"] == "regress":
            return Regress(encoder, config["values"], preprocess, hidden=config["hidden"])
        if config["task"] == "knn":
            return KNN(encoder, config["classes"], preprocess, config["images"])
        if config["task"] == "caption":
            words = _tokenizer(config, files, Tokenizer.from_json)
            task = Caption(encoder, rebuild(Captioning, config["captioning"]), words, preprocess)
            if "remembered" in config:
                task.consensus = Consensus(**config["remembered"])
            return task
        if config["task"] == "embed":
            return Embed(encoder, preprocess)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'config.json'} does not describe a model ({first_line(error)}): choose another checkpoint"
        ) from error
    raise UserError(
        f"{path} holds the task {config['task']!r}, which this version of vitrail does not know: upgrade it"
    )
