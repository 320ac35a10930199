"""Named experiments. A recipe is a function that returns a Run; its docstring gives command, cost and score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches

from vitrail.errors import UserError
from vitrail.recipes.baselines import cnn_cifar10, gru_digits, lstm_digits, mlp_cifar10, resnet_cifar10, rnn_digits
from vitrail.recipes.captions import (
    caption_cnn_attention,
    caption_cnn_lstm,
    caption_cnn_rnn,
    caption_coca,
    caption_critic,
    caption_vit,
    caption_vit_lstm,
)
from vitrail.recipes.finetune import finetune
from vitrail.recipes.folder import folder
from vitrail.recipes.imagenet import augreg_s16, deit3_s16, finetune_b16_384, vit_s16_90
from vitrail.recipes.small import cifar10, cifar10_laptop, cifar10_quick, digits, mnist
from vitrail.train.run import Run
from vitrail.vit import ViTConfig

Recipe = Callable[[int], Run]
"""takes the number of training pictures"""

RECIPES: dict[str, Recipe] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10-quick": cifar10_quick,
    "cifar10-laptop": cifar10_laptop,
    "cifar10": cifar10,
    "mlp-cifar10": mlp_cifar10,
    "cnn-cifar10": cnn_cifar10,
    "resnet-cifar10": resnet_cifar10,
    "rnn-digits": rnn_digits,
    "gru-digits": gru_digits,
    "lstm-digits": lstm_digits,
    "caption-cnn-rnn": caption_cnn_rnn,
    "caption-cnn-lstm": caption_cnn_lstm,
    "caption-cnn-attention": caption_cnn_attention,
    "caption-vit-lstm": caption_vit_lstm,
    "caption-vit": caption_vit,
    "caption-coca": caption_coca,
    "caption-critic": caption_critic,
    "folder": folder,
    "finetune": finetune,
    "vit-s16-90": vit_s16_90,
    "augreg-s16": augreg_s16,
    "deit3-s16": deit3_s16,
    "finetune-b16-384": finetune_b16_384,
}


def find(name: str) -> Recipe:
    """The recipe of a name; UserError with the nearest one if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    near = get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(RECIPES)}"
    raise UserError(f"no recipe {name!r}: {hint}")


def from_weights(run: Run, init: str, config: ViTConfig) -> Run:
    """The run, started from the weights `init` of a model `config`: its architecture, at the size that suits both.

    Pictures keep the checkpoint's size, or at most twice that where the recipe's are larger.
    """
    if not isinstance(run.model, ViTConfig):
        raise UserError(f"{init} is a Vision Transformer, which {run.recipe} does not train: leave --init out")
    height, width = (
        min(2 * own, max(own, wanted // config.patch * config.patch))
        for own, wanted in zip(config.image_size, run.model.image_size, strict=True)
    )
    model = replace(config, image_size=(height, width), drop_path=run.model.drop_path)
    return replace(run, init=init, model=model)
