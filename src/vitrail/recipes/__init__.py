"""Named experiments. A recipe is a function that returns a Run; its docstring gives command, cost and score."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vitrail.baselines import CNNConfig, MLPConfig, ResNetConfig, RNNConfig
from vitrail.data import builtin
from vitrail.errors import UserError
from vitrail.recipes.baselines import cnn_cifar10, gru_digits, lstm_digits, mlp_cifar10, resnet_cifar10, rnn_digits
from vitrail.recipes.caption_zoo import caption_prefix, caption_zoo
from vitrail.recipes.captions import (
    caption_cnn_attention,
    caption_cnn_lstm,
    caption_cnn_rnn,
    caption_coca,
    caption_match,
    caption_rerank,
    caption_scst,
    caption_vit,
    caption_vit_lstm,
    encoder_cifar10,
)
from vitrail.recipes.finetune import finetune
from vitrail.recipes.folder import folder
from vitrail.recipes.imagenet import augreg_s16, deit3_s16, finetune_b16_384, vit_s16_90
from vitrail.recipes.segment import segment, segment_whole
from vitrail.recipes.small import cifar10, cifar10_laptop, cifar10_quick, cifar10_small, digits, mnist
from vitrail.recipes.tables import finetune_regress, finetune_tag, regress, tag
from vitrail.tasks.encoder import EncoderConfig
from vitrail.train.run import Run, changed_fields
from vitrail.variants import as_variant
from vitrail.vit import ViTConfig

Recipe = Callable[[int], Run]
"""a function of the number of training images"""

RECIPES: dict[str, Recipe] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10-quick": cifar10_quick,
    "cifar10-laptop": cifar10_laptop,
    "cifar10": cifar10,
    "cifar10-small": cifar10_small,
    "mlp-cifar10": mlp_cifar10,
    "cnn-cifar10": cnn_cifar10,
    "resnet-cifar10": resnet_cifar10,
    "rnn-digits": rnn_digits,
    "gru-digits": gru_digits,
    "lstm-digits": lstm_digits,
    "segment": segment,
    "segment-whole": segment_whole,
    "caption-cnn-rnn": caption_cnn_rnn,
    "caption-cnn-lstm": caption_cnn_lstm,
    "caption-cnn-attention": caption_cnn_attention,
    "caption-vit-lstm": caption_vit_lstm,
    "caption-vit": caption_vit,
    "caption-match": caption_match,
    "encoder-cifar10": encoder_cifar10,
    "caption-coca": caption_coca,
    "caption-scst": caption_scst,
    "caption-rerank": caption_rerank,
    "caption-zoo": caption_zoo,
    "caption-prefix": caption_prefix,
    "folder": folder,
    "finetune": finetune,
    "tag": tag,
    "finetune-tag": finetune_tag,
    "regress": regress,
    "finetune-regress": finetune_regress,
    "vit-s16-90": vit_s16_90,
    "augreg-s16": augreg_s16,
    "deit3-s16": deit3_s16,
    "finetune-b16-384": finetune_b16_384,
}


TUNED: dict[Recipe, Recipe] = {folder: finetune, tag: finetune_tag, regress: finetune_regress}
"""the recipe that replaces one for training from scratch if initial weights are given"""
CONTINUED = (caption_coca, caption_scst, caption_rerank, segment_whole)
"""recipes that continue training of the same task"""
FROM_WEIGHTS = (finetune_b16_384, *CONTINUED)
"""recipes that need initial weights and have no default for them"""
IN_WORDS: dict[type[EncoderConfig], str] = {
    ViTConfig: "a Vision Transformer",
    CNNConfig: "a CNN",
    ResNetConfig: "a ResNet",
    MLPConfig: "an MLP",
    RNNConfig: "a recurrent network",
}
"""names of encoders in messages"""
FREE = ("image_size", "channels", "drop_path", "merge")
"""model fields that may differ from those of the initial weights"""


def find(name: str) -> Recipe:
    """The recipe of this name. UserError with the closest name if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, not a recipe: vitrail train folder --data {name}")
    near = get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {near[0]}? The recipes are" if near else "choose from"
    raise UserError(f"no recipe {name!r}: {hint} {', '.join(RECIPES)}")


def check_given(recipe: Recipe, data: str | None, init: str | None) -> None:
    """Raise UserError if the recipe has no default for data or weights that a command leaves out."""
    example = recipe(1)
    if init is None and recipe in FROM_WEIGHTS:
        raise UserError(f"{example.recipe} needs pretrained weights: name them with --init")
    if data is None and example.data == "folder":
        raise UserError("no data: give --data a folder with one folder per class, a CSV of labels, or a built-in name")


def check_here(example: Run, data: str | None) -> None:
    """Raise UserError if a command names no data, and the set that the recipe is for is not on this machine."""
    places = [Path(example.data), Path(os.environ.get("VITRAIL_DATA", ".")) / example.data]
    if data is None and example.data not in builtin.NAMES and not any(place.exists() for place in places):
        raise UserError(
            f"no data: {example.recipe} is for {example.data}, which vitrail does not download: give --data its "
            "folder, or another set"
        )


def from_weights(run: Run, init: str, config: EncoderConfig) -> Run:
    """The run that starts from the weights `init` of a model `config`: with its architecture and a suitable image size.

    Images have the checkpoint's size, or at most twice that if the recipe's are larger; for convolutional networks the
    recipe's size. A recipe for captions or segmentation takes any kind of encoder, with that encoder's preprocessing
    (but for segmentation not its resizing); a classification recipe takes only its own kind.
    """
    kind = next(kind for kind in IN_WORDS if isinstance(config, kind))
    if not isinstance(run.model, kind) and not run.task.any_encoder:
        raise UserError(f"{init} is {IN_WORDS[kind]}, which {run.recipe} does not train: remove --init")
    if run.task.any_encoder:
        run = replace(run, mean=None, std=None, interpolation=None)
    if run.task.any_encoder and not run.task.resizes:
        run = replace(run, resize=None, crop_fraction=None)
    if run.tune.frozen:  # a frozen encoder cannot adapt to another size
        return replace(run, init=init, model=config, early_size=None)
    if isinstance(config, CNNConfig | ResNetConfig):
        return replace(run, init=init, model=replace(config, image_size=run.model.image_size))
    if not isinstance(config, ViTConfig):
        return replace(run, init=init, model=config, early_size=None)
    height, width = (
        min(2 * own, max(own, wanted // config.patch * config.patch))
        for own, wanted in zip(config.image_size, run.model.image_size, strict=True)
    )
    drop_path = run.model.drop_path if isinstance(run.model, ViTConfig) else 0.0
    model = replace(config, image_size=(height, width), drop_path=drop_path)
    early = (run.early_size or 0) // config.patch * config.patch
    return replace(run, init=init, model=model, early_size=early if 0 < early < min(height, width) else None)


def replaced_by(init: str, own: EncoderConfig, new: EncoderConfig, changes: Container[str]) -> str | None:
    """One line on what the weights `init` replace of a recipe's `own` model, but for `changes`; None: nothing."""
    if not isinstance(new, ViTConfig if isinstance(own, ViTConfig) else type(own)):
        kind = next(kind for kind in IN_WORDS if isinstance(new, kind))
        return f"the weights of {init} replace the recipe's model by {IN_WORDS[kind]}"
    names = [name for name in changed_fields(own, new) if name not in changes]
    old, new = (as_variant(config) if isinstance(config, ViTConfig) else config for config in (own, new))
    values = {name: (_shown(getattr(new, name)), _shown(getattr(old, name))) for name in names}
    listed = [f"{name.replace('_', ' ')} {now} (not {before})" for name, (now, before) in values.items()]
    return f"the weights of {init} fix the model: {', '.join(listed)}" if listed else None


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def check_fixed(init: str, wanted: Any, own: Any, free: Sequence[str]) -> None:
    """Refuse a field whose `wanted` value differs from its `own` value in the weights `init`."""
    if isinstance(wanted, ViTConfig) and isinstance(own, ViTConfig):
        wanted, own = as_variant(wanted), as_variant(own)
    for entry in fields(own):
        if entry.name not in free and getattr(wanted, entry.name) != getattr(own, entry.name):
            raise fixed(init, entry.name, off=getattr(wanted, entry.name) is False)


def fixed(init: str, name: str, off: bool = False) -> UserError:
    """The error for a field that the weights `init` fix, which a flag sets, or turns `off`."""
    option = f"--{'no-' * off}{name.replace('_', '-')}"
    return UserError(f"{option} is fixed by the weights of {init}: remove {option}, or train from scratch")
