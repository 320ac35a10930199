"""timm's folders (`config.json` with `architecture`, and weights) and bare state dicts. timm is not needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vitrail.data import imagenet
from vitrail.data.preprocess import Preprocess
from vitrail.variants import VariantConfig
from vitrail.zoo.problem import problem_of
from vitrail.zoo.renames import class_names
from vitrail.zoo.source import Files, Found
from vitrail.zoo.timm.arguments import Arguments, encoder_config, table
from vitrail.zoo.timm.guess import guess_architecture
from vitrail.zoo.timm.names import skeleton, spelling
from vitrail.zoo.timm.shapes import FIRST, LEFT, OWN, channels_of, fitted_size, input_size, outputs_of, used_names
from vitrail.zoo.timm.writing import write

__all__ = ["NAME", "read", "recognise", "reference", "write"]

NAME = "timm"


def recognise(files: Files) -> bool:
    """A config that names one of the architectures, and weights with a stem; or timm's names without a config.

    Unknown names inside blocks or stem mean another model. Elsewhere they are additions, which are refused by name.
    """
    if "config.json" in files.json:
        return files.json["config.json"].get("architecture") in table() and any(n in files.weights for n in FIRST)
    stem = any(name.startswith(("patch_embed.proj.", "patch_embed.backbone.")) for name in files.weights)
    blocks = any(name.startswith("blocks.0.") for name in files.weights)
    if not (stem and blocks) or "blocks.0.mlp.lin1.weight" in files.weights:
        return False
    return all(OWN.match(name) or not name.startswith(("blocks.", "patch_embed.")) for name in used_names(files))


def read(files: Files) -> Found:
    """The model, its classes, and its preprocessing."""
    notes: list[str] = []
    name, given, settings = _named(files, notes)
    values: Arguments = table()[name] | {"in_chans": channels_of(files)} | given
    if "config.json" not in files.json:
        # timm interpolates FlexiViT's and RADIO's positions specially when it creates them as pretrained, but never for
        # a bare state dict, which may be of another model.
        values = values | {"resizing": None}
    images = values["images"] | {k: v for k, v in settings.items() if v is not None and k in values["images"]}
    size = input_size(values, given, images)
    encoder = encoder_config(values, fitted_size(files, values, size, notes))
    classes = _classes(files, settings, notes)
    entries = spelling(encoder, values["class"], files.weights.keys(), len(classes or []))
    own = skeleton(encoder, len(classes or [])).state_dict()
    return Found(
        source=f"timm {name}",
        encoder=encoder,
        classes=classes,
        preprocess=_preprocess(images, encoder, notes),
        weights={key: entry.weight(own[key].shape) for key, entry in entries.items()},
        left={key: why for key in files.weights for pattern, why in LEFT if re.search(pattern, key)},
        problem=problem_of(settings if classes else {}, files.path),
        notes=notes,
    )


def _named(files: Files, notes: list[str]) -> tuple[str, Arguments, dict[str, Any]]:
    """Architecture, arguments, and the other entries of the config."""
    config = files.json.get("config.json")
    if config is None:
        return *guess_architecture(files, notes), {}
    # Older folders have no nested level.
    labels = {key: config[key] for key in ("label_names", "label_descriptions", "problem_type") if key in config}
    return config["architecture"], config.get("model_args") or {}, (config.get("pretrained_cfg") or config) | labels


def _classes(files: Files, settings: dict[str, Any], notes: list[str]) -> list[str] | None:
    count = outputs_of(files)
    if count is None:
        return None
    names = settings.get("label_names") or settings.get("labels")
    told = settings.get("label_descriptions") or {}
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or len(names) != count:
        known = "in1k" in re.split(r"[._-]", str(settings.get("tag") or settings.get("hf_hub_id")))
        return class_names(count, [] if known else notes)
    if not told and all(name in imagenet.numbers() for name in names):
        return [imagenet.names()[imagenet.numbers()[name]] for name in names]
    return [str(told.get(name, name)) if isinstance(told, dict) else str(name) for name in names]


def _preprocess(images: Arguments, encoder: VariantConfig, notes: list[str]) -> Preprocess:
    mode, interpolation = images["crop_mode"], images["interpolation"]
    if mode not in ("center", "squash"):
        notes.append(f"timm's crop_mode {mode!r} is read as a crop of the centre")
    if interpolation not in ("bicubic", "bilinear", "nearest"):
        notes.append(f"timm's interpolation {interpolation!r} is read as bicubic")
        interpolation = "bicubic"
    mean, std = (
        tuple(images[name][i % len(images[name])] for i in range(encoder.channels)) for name in ("mean", "std")
    )
    return Preprocess(
        size=encoder.image_size,
        resize="squash" if mode == "squash" else "crop",
        crop_fraction=min(1.0, images["crop_pct"] or 1.0),
        interpolation=interpolation,
        mean=mean,
        std=std,
        channels=encoder.channels,
    )


def reference(files: Files) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """timm's own model with these weights: normalised images to logits (or the pooled vector) and tokens."""
    if find_spec("timm") is None:
        return None
    import timm

    found = read(files)
    name, given, _ = _named(files, [])
    assert found.encoder is not None
    size = {"img_size": found.encoder.image_size, "in_chans": found.encoder.channels}
    build = timm.model_entrypoint(name)  # `create_model` would drop arguments that are None
    model: Any = build(**{**given, **size, "num_classes": len(found.classes or [])}).eval()
    weights = {key: value.float() for key, value in files.weights.items() if key not in found.left}
    model.load_state_dict(weights)

    @torch.inference_mode()
    def answer(images: Tensor) -> dict[str, Tensor]:
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
        return {"logits": logits, "tokens": flat(tokens)}

    return answer


def flat(tokens: Tensor) -> Tensor:
    """SAM's final map [B, C, h, w] as tokens [B, N, C]; others unchanged."""
    return tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
