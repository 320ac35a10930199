"""Hugging Face's folders (transformers): `config.json` with `model_type`, weights, `preprocessor_config.json`.

The pooled vector of an encoder without classes is transformers' pooled output:

    vit, deit with a pooler          tanh of a linear map of the class token
    without one; dinov2, dinov3,     the class token after the final norm
    mae, msn, beit without mean
    beit, data2vec (mean pooling)    the mean of the patches, and the pooler's norm if the file has it
    ijepa                            the mean of the patches after the final norm
    clip                             the class token after its own norm, and the projection if there is one
    siglip, siglip2                  attention pooling; without that head the mean of the patches

Tokens are transformers' `last_hidden_state`. Of a model with a text tower only the image tower is read. SigLIP 2 with
flexible resolution is read with the fixed resolution of its positions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from vitrail.zoo.huggingface.encoder import MODULES, encoder_config, filled, renaming
from vitrail.zoo.huggingface.kinds import KINDS, LEFT, Kind, Spelling
from vitrail.zoo.huggingface.library import reference
from vitrail.zoo.huggingface.processor import default_settings, preprocess, settings
from vitrail.zoo.huggingface.writing import write
from vitrail.zoo.problem import problem_of
from vitrail.zoo.source import Files, Found

__all__ = ["NAME", "read", "recognise", "reference", "write"]

NAME = "hf"


OPTIONAL_BIASES = {
    "query_bias": ("q_proj.bias",),
    "key_bias": ("k_proj.bias",),
    "value_bias": ("v_proj.bias",),
    "proj_bias": ("o_proj.bias",),
    "mlp_bias": ("gate_proj.bias", "up_proj.bias", "down_proj.bias"),
}
"""flags of DINOv3's config, and the names that are missing if one is false"""


def recognise(files: Files) -> bool:
    """Whether `config.json` names one of the types here, and the weights have its names."""
    kind = KINDS.get(files.json.get("config.json", {}).get("model_type"))
    return kind is not None and any(
        f"{prefix}{_first(spelling)}" in files.weights for prefix in kind.prefixes for spelling in kind.spellings
    )


def read(files: Files) -> Found:
    """The image tower, its classes if it has any, and its preprocessing."""
    text = files.json["config.json"]
    name = text["model_type"]
    kind, notes = KINDS[name], list[str]()
    values = {**kind.defaults, **_tower(text)}
    names = _Names(files.weights, kind)
    modules = {module for weight, module in MODULES.items() if names.find(weight)}
    if "projection" in modules:
        values["projection_dim"] = files.shapes[names["visual_projection.weight"]][0]
    if (
        "pooler" in modules
        and values.get("pooler_act") == "linear"
        and _is_identity(files, names["pooler.dense.weight"])
    ):
        modules.remove("pooler")
    config = encoder_config(name, values, modules)
    classes = names.find("classifier.weight") or names.find("cls_classifier.weight")
    absent = tuple(end for flag, ends in OPTIONAL_BIASES.items() if values.get(flag) is False for end in ends)
    weights = {
        own: filled(own, weight, absent, config)
        for own, weight in renaming(config, name, names.spelling, classes is not None).items()
    }
    weights = {own: weight._replace(names=tuple(names[n] for n in weight.names)) for own, weight in weights.items()}
    used = {n for weight in weights.values() for n in weight.names}
    pixels = settings(files.json)
    if pixels is None:
        notes.append(f"no preprocessor_config.json: using the preprocessing of published {name} checkpoints")
        pixels = default_settings(kind, config.image_size)
    return Found(
        source=f"Hugging Face {name}" + (f" ({text['architectures'][0]})" if text.get("architectures") else ""),
        encoder=config,
        classes=_classes(text, files.shapes[classes][0], notes) if classes else None,
        preprocess=preprocess(pixels, kind, config.image_size, config.channels),
        weights=weights,
        left=_left(files.weights.keys() - used),
        problem=problem_of(text if classes else {}, files.path),
        notes=notes,
    )


class _Names:
    """transformers' names in the files, without the tower's prefix."""

    def __init__(self, there: Collection[str], kind: Kind) -> None:
        self.there, self.prefixes = set(there), kind.prefixes
        self.spelling = next((s for s in kind.spellings if self.find(_first(s))), kind.spellings[0])

    def find(self, name: str) -> str | None:
        return next((prefix + name for prefix in self.prefixes if prefix + name in self.there), None)

    def __getitem__(self, name: str) -> str:
        """The name in the files; for a missing one, the expected name."""
        prefixed = any(there.startswith(self.prefixes[0]) for there in self.there)
        return self.find(name) or (self.prefixes[0] if prefixed else "") + name


def _first(spelling: Spelling) -> str:
    """A name that distinguishes one spelling from the others."""
    return f"{spelling.block.format(0)}{spelling.query}.weight"


def _tower(text: Mapping[str, Any]) -> dict[str, Any]:
    """The image tower's section of a config."""
    return {k: v for k, v in (text.get("vision_config") or text).items() if v is not None}


def _is_identity(files: Files, weight: str) -> bool:
    """Whether a pooler is the identity: `write` adds one if transformers' model requires a pooler."""
    rows, columns = files.shapes[weight]
    bias = files.weights[weight.removesuffix("weight") + "bias"]
    return rows == columns and torch.equal(files.weights[weight], torch.eye(rows)) and not bias.any()


def _classes(text: Mapping[str, Any], count: int, notes: list[str]) -> list[str]:
    """The names of `id2label`, which transformers omits if they are its defaults; numbers if it does not fit."""
    if text.get("id2label") is None:
        return [f"LABEL_{i}" for i in range(count)]
    labels = {int(number): str(label) for number, label in text["id2label"].items()}
    if sorted(labels) == list(range(count)):
        return [labels[i] for i in range(count)]
    notes.append(f"config.json has no names for the {count} classes: using numbers")
    return [str(i) for i in range(count)]


def _left(names: Collection[str]) -> dict[str, str]:
    """Names that may be left out, with the reason."""
    reasons = {name: next((why for start, why in LEFT.items() if re.match(start, name)), None) for name in names}
    return {name: why for name, why in reasons.items() if why}
