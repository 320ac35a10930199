"""Warn of options that have no effect, because of the method of fine-tuning or of the value of another option."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from vitrail.data.augment import BOXES, Augment
from vitrail.plain import flat_fields
from vitrail.tasks import task_of
from vitrail.tasks.values import UsedWith
from vitrail.train.optim import Optim
from vitrail.train.run import Run, changed_fields
from vitrail.train.tune import FROZEN
from vitrail.variants import as_variant
from vitrail.vit import ViTConfig

log = logging.getLogger("vitrail")

IDLE = frozenset(
    [
        *("epochs", "max_steps", "accumulate", "early_size", "early", "eval_every", "patience", "compile", "drop_path"),
        *(entry.name for config in (Optim, Augment) for entry in fields(config)),
    ]
)
"""options without effect if the encoder is frozen: it reads each image once, without augmentation"""
OF_METHODS = {"lora": ("lora_rank", "lora_alpha"), "last-blocks": ("last_blocks",)}
"""the options of one method of fine-tuning"""
TABLES = ("table", "shared", "both")
USED_WITH: UsedWith = {
    "early": ("early_size", ()),
    "cuda_graphs": ("compile", ()),
    "muon_lr": ("optimizer", ("muon",)),
    "beta2": ("optimizer", ("adamw", "muon", "lamb")),
    "cooldown": ("schedule", ("constant",)),
    "shift": ("crop", ("shift",)),
    "scale": ("crop", BOXES),
    "jitter": ("crop", ("jitter",)),
    "policy_strength": ("policy", ("randaugment", "big-vision")),
    "policy_count": ("policy", ("randaugment", "big-vision")),
    "layer_scale_on": ("layer_scale", ()),
    "norm_after_eps": ("norm_after", ()),
    "key_bias": ("qkv_bias", ()),
    "resampling": ("positions", ("learned",)),
    "relative_resampling": ("relative", TABLES),
    "rotary_temperature": ("rotary", ()),
    "rotary_reference": ("rotary", ("axial",)),
    "rotary_offset": ("rotary", ("axial",)),
    "rotary_first": ("rotary", ()),
    "rotary_pairs": ("rotary", ()),
    "stem_blocks": ("stem", ()),
    "backbone_layers": ("backbone", ()),
    "backbone_eps": ("backbone", ()),
    "backbone_weight": ("backbone", ("resnetv2",)),
    "backbone_weight_eps": ("backbone", ("resnetv2",)),
    "pool_prefix": ("pool", ("average", "attention")),
    "pool_heads": ("pool", ("attention",)),
    "pool_hidden": ("pool", ("attention",)),
    "pool_activation": ("pool", ("attention",)),
}
"""those of every task; a task's own are in its `used_with`"""
REPLACED_BY = {"epochs": "max_steps", "mlp_ratio": "mlp_hidden"}
"""options in whose place another one is used, where it is set"""


def warn_unused(recipe: Run, requested: Run, method: str) -> None:
    """Warn of options that `requested` changes from the recipe's values, and that have no effect in it."""
    changed = changed_fields(recipe, requested)
    idle = {name for other, names in OF_METHODS.items() if other != method for name in names}
    idle |= {*IDLE, *task_of(requested.task).unused_when_frozen} if method in FROZEN else set()
    if names := [_flag(name) for name in changed if name in idle]:
        log.warning("method %s does not use %s", method, ", ".join(names))
    used_with = {**USED_WITH, **task_of(requested.task).used_with}
    values = _values(requested)
    for name in changed:
        if name in used_with and name not in idle and not _used(values, *used_with[name]):
            other, among = used_with[name]
            wanted = " ".join([_flag(other), " or ".join(map(str, among))]).rstrip()
            log.warning("%s has no effect without %s", _flag(name), wanted)
        if name in REPLACED_BY and name not in idle and values.get(REPLACED_BY[name]):
            log.warning("%s has no effect beside %s", _flag(name), _flag(REPLACED_BY[name]))


def _values(run: Run) -> Mapping[str, Any]:
    """Every field of a run and of its components, by name."""
    whole = replace(run, model=as_variant(run.model)) if isinstance(run.model, ViTConfig) else run
    return {name: entry.value for name, entry in flat_fields(whole).items()}


def _used(values: Mapping[str, Any], other: str, among: tuple[Any, ...]) -> bool:
    """Whether `other` has one of the values that use an option; True for a model without this field."""
    if other not in values:
        return True
    return values[other] in among if among else bool(values[other]) and values[other] != "none"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
