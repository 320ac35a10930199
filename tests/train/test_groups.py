"""What modules declare of their parameters (weight decay, layers, what Muon takes) against a rule by names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_captioners
import torch
from torch import nn

from vitrail.data.preprocess import Preprocess
from vitrail.data.text import Tokenizer
from vitrail.recipes import RECIPES
from vitrail.tasks.caption import Caption, Captioning
from vitrail.tasks.caption.prefix import PrefixDecoder
from vitrail.tasks.caption.settings import LanguageSettings
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for, layers
from vitrail.tasks.task import Task
from vitrail.train.lora import add_lora
from vitrail.train.optim import Optim, groups
from vitrail.train.tune import Tune, tune
from vitrail.variants import VariantConfig, as_variant
from vitrail.vit import ViTConfig
from vitrail.zoo import captioners
from vitrail.zoo.timm.arguments import encoder_config, table

TABLES = (
    *("positions", "_token", "registers", "pooling.probe", "rotary.frequencies", "join.queries"),
    *("relative.table", "relative.rows", "relative.columns"),
)
"""ends of names of all that has axes as matrices have and does not decay"""
AFTER = re.compile(r"encoder\.(norm|neck|pooling|norm_pooled|projection)\.")


def by_name(task: nn.Module, optim: Optim, depth: int) -> list[list[tuple[str, float, float]]]:
    """What `groups` gives, as (name, learning rate, weight decay), from the parameters' names alone."""
    chosen: tuple[dict[Any, list[str]], dict[Any, list[str]]] = ({}, {})
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        match = re.match(r"encoder\.blocks\.(\d+)\.", name)
        after = not name.startswith("encoder.") or AFTER.match(name)
        layer = int(match.group(1)) + 1 if match else depth + 1 if after else 0
        decays = parameter.ndim >= 2 and not name.endswith(TABLES)
        matrix = decays and (parameter.ndim == 4 or (parameter.ndim == 2 and ".blocks." in name))
        chosen[optim.optimizer == "muon" and matrix].setdefault((layer, decays), []).append(name)
    found = []
    for rows, lr in zip(chosen, (optim.lr, optim.muon_lr), strict=True):
        merged: dict[Any, list[str]] = {}
        for (layer, decays), names in rows.items():
            merged.setdefault((layer if optim.layer_decay != 1 else depth + 1, decays), []).extend(names)
        found.append(
            [
                (name, lr * optim.layer_decay ** (depth + 1 - layer), optim.weight_decay * decays)
                for (layer, decays), names in merged.items()
                for name in names
            ]
        )
    return found


def check(task: Task, depth: int | None = None) -> None:
    """Equal groups, in the same order, for AdamW and Muon, with one learning rate and with one for each layer."""
    names = {parameter: name for name, parameter in task.named_parameters()}
    depth = len(getattr(task.encoder, "blocks", ())) if depth is None else depth
    for optim in (Optim(), Optim(optimizer="muon"), Optim(optimizer="muon", layer_decay=0.7)):
        found = [
            [(names[p], group["lr"], group["weight_decay"]) for group in group for p in group["params"]]
            for group in groups(task, optim)
        ]
        assert found == by_name(task, optim, depth)


def classifier(encoder: Encoder, **choices: Any) -> Classify:
    return Classify(encoder, ["a", "b", "c"], Preprocess(), **choices)


def small(config: VariantConfig) -> VariantConfig:
    """The same architecture with two blocks, or as many as it takes to have one in windows and one that is global."""
    most = min(config.depth, 1 + min(config.global_blocks, default=1))
    return replace(
        config,
        depth=most,
        global_blocks=tuple(i for i in config.global_blocks if i < most),
        kv_heads=config.kv_heads[:most] if config.kv_heads else config.kv_heads,
    )


def test_every_architecture_of_timm_has_the_groups_of_its_names() -> None:
    assert len(table()) >= 269
    seen = set()
    for values in table().values():
        size = values["images"]["input_size"][1:]
        config = small(encoder_config(values, (size[0], size[1])))
        if config in seen:
            continue
        seen.add(config)
        with torch.device("meta"):
            check(classifier(encoder_for(config)), config.depth)
    assert len(seen) > 50


VARIANTS: dict[str, dict[str, Any]] = {
    "distilled": {"pool": "distilled", "distillation": True},
    "attention pool": {"pool": "attention", "registers": 2, "layer_scale": 0.1, "norm_before": True},
    "mixed": {"rotary": "mixed", "qk_norm": True},
    "tables": {"relative": "both"},
    "decomposed": {"relative": "decomposed", "class_token": False, "pool": "average", "neck": 8, "window": 2},
    "projected": {"projection": 8, "norm_pooled": True, "arrangement": "parallel", "stem": (4,)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_so_has_every_module_of_a_variant(name: str) -> None:
    config = VariantConfig(32, 2, 2, 4, image_size=(8, 8), **VARIANTS[name])
    task = classifier(encoder_for(config), hidden=8)
    check(task)
    add_lora(task.encoder.blocks, 2, 4.0)
    check(task)


@pytest.mark.parametrize("name", RECIPES)
def test_so_has_the_model_of_every_recipe(name: str) -> None:
    run = RECIPES[name](5000)
    model, settings = run.model, run.task
    if isinstance(settings, Captioning) and settings.decoder == "language_model":
        pytest.skip("starts from a language model: tested below, with a tiny one")
    words = Tokenizer.train(["a dog runs", "a cat sits"], "words", 50)
    with torch.device("meta"):
        encoder = encoder_for(model)
        if isinstance(settings, Captioning):
            check(Caption(encoder, settings, words, Preprocess()))
        else:
            check(classifier(encoder))


@pytest.mark.parametrize("kind", KINDS)
def test_so_has_every_kind_of_encoder(kind: str) -> None:
    check(classifier(encoder_for(KINDS[kind]())))


def prefixed(folder: Path, **changes: Any) -> Caption:
    """A captioner with a tiny language model."""
    pytest.importorskip("transformers", reason="needs pip install 'vitrail[caption]'")
    tiny_captioners.language_model(folder)
    model, vocabulary, words = captioners.language_model(str(folder))
    language = LanguageSettings(language_model=str(folder), prefix_length=3, join_depth=2, **changes)
    settings = Captioning(decoder="language_model", smoothing=0.0, lower=False, language=language)
    encoder = encoder_for(ViTConfig(24, 2, 2, 8, (16, 16)))
    decoder = PrefixDecoder(model, vocabulary, language, encoder.config)
    return Caption(encoder, settings, words, Preprocess(), decoder)


@pytest.mark.parametrize("join", ["mlp", "transformer", "projection"])
def test_so_has_a_language_model_behind_a_prefix(join: str, tmp_path: Path) -> None:
    check(prefixed(tmp_path / "lm", join=join, tune_language=join == "mlp"))


def test_the_queries_of_a_joining_transformer_do_not_decay(tmp_path: Path) -> None:
    task = prefixed(tmp_path / "lm")
    adamw, muon = groups(task, Optim(optimizer="muon", weight_decay=0.3))
    decaying = {p for group in adamw + muon if group["weight_decay"] for p in group["params"]}
    assert task.get_parameter("decoder.join.queries") not in decaying
    assert task.get_parameter("decoder.join.project.weight") in decaying


def test_what_is_declared_exists() -> None:
    """A name that nothing has any more would let its parameter decay in silence."""
    declared: set[tuple[type, str]] = set()
    found: set[tuple[type, str]] = set()
    configs = [as_variant(ViTConfig(32, 2, 2, 4, (8, 8)))]
    configs += [VariantConfig(32, 2, 2, 4, image_size=(8, 8), **changes) for changes in VARIANTS.values()]
    for config in configs:
        for module in encoder_for(config).modules():
            names = (*getattr(module, "no_decay", ()), *getattr(module, "after_blocks", ()))
            declared |= {(type(module), name) for name in names}
            found |= {(type(module), name) for name in names if getattr(module, name, None) is not None}
    assert declared == found


def test_layers_go_from_the_patches_up() -> None:
    task = classifier(encoder_for(ViTConfig(16, 3, 2, 4, (8, 8))))
    encoder = task.encoder
    below, *blocks, after = layers(encoder)
    assert {id(p) for p in below} == {
        id(p) for p in (encoder.class_token, encoder.positions, *encoder.patches.parameters())
    }
    assert [[id(p) for p in layer] for layer in blocks] == [[id(p) for p in b.parameters()] for b in encoder.blocks]
    assert [id(p) for p in after] == [id(p) for p in encoder.norm.parameters()]


def test_last_blocks_trains_them_and_what_follows() -> None:
    task = classifier(encoder_for(ViTConfig(16, 3, 2, 4, (8, 8))))
    tune(task, Tune(method="last-blocks", last_blocks=2))
    learning = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert learning == {
        name
        for name, _ in task.named_parameters()
        if name.startswith(("encoder.blocks.1.", "encoder.blocks.2.", "encoder.norm.", "head."))
    }
    task.train()
    assert [block.training for block in task.encoder.blocks] == [False, True, True]
