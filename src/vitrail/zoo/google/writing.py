"""Write Google's `.npz` files."""

from __future__ import annotations

import io
import logging
from dataclasses import fields
from pathlib import Path

import numpy as np

from vitrail.errors import UserError
from vitrail.files import write_atomic
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig, as_variant
from vitrail.vit import ViT, ViTConfig
from vitrail.zoo.google.table import BIG_VISION, PAPER, Names, renaming_table, split
from vitrail.zoo.refusals import KEPT, no_place

log = logging.getLogger("vitrail")


def write(task: Task, path: Path) -> None:
    """Write the file `path`, or `model.npz` in the folder `path`. UserError for models that Google's code lacks."""
    encoder, head = task.encoder, task.portable
    if not isinstance(encoder, ViT) or head is None:
        raise UserError(f"Google's .npz cannot store the task {task.name}: it holds a ViT with a head or without")
    if head.problem == "regression":
        raise UserError(
            f"Google's .npz cannot store that a head's outputs are values, and would be read as a classifier: {KEPT}"
        )
    if head.problem == "multi_label_classification":
        log.warning("an .npz cannot store that each class has its own probability: it will be read as single-label")
    config = as_variant(encoder.config)
    names = _names_for(config, bool(head.outputs))
    table = renaming_table(config, names, {}, head.hidden, bool(head.outputs))
    state = task.portable_state()
    arrays: dict[str, np.ndarray] = {}
    prefix = "" if names is PAPER else "params/img/" if config.projection else "params/"
    for name, weight in table.items():
        for theirs, value in zip(weight.names, split(weight, state[name], config, name), strict=True):
            arrays[prefix + theirs] = np.ascontiguousarray(value.detach().cpu().float().numpy())
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    write_atomic(path if path.suffix == ".npz" else path / "model.npz", packed.getvalue())


def _names_for(config: VariantConfig, head: bool) -> Names:
    """The code base with such a model; UserError names a module that neither has."""
    hybrid, projection = config.backbone == "resnetv2", None if head else config.projection  # both are called `head`
    newer = config.pool == "attention" or config.positions == "sine" or projection is not None
    newer = newer or (config.class_token and config.prefix_positions == "none")
    if hybrid and newer:
        raise UserError(
            "Google's .npz cannot store a hybrid with attention pooling, a projection, or other positions than "
            f"learned ones on all tokens: {KEPT}"
        )
    names = BIG_VISION if newer else PAPER
    wants: dict[str, object] = {
        "activation": "gelu_tanh",
        "norm_eps": 1e-6,
        "qkv_bias": True,
        "layer_scale": None,
        "registers": 0,
        "stem": (),
        "image_size": (min(config.image_size),) * 2,
        "pool": config.pool if config.pool in ("token", "average", "attention") else "average",
        "positions": "learned" if config.positions == "none" else config.positions,
    }
    wants["class_token"] = wants["pool"] == "token"
    differ = {name: (own, want) for name, want in wants.items() if (own := getattr(config, name)) != want}
    free = {entry.name for entry in fields(ViTConfig)} | {
        "mlp_hidden",
        "resampling",
        "pool_heads",
        "pool_hidden",
        "stem_blocks",  # only about a stem, which is compared itself
    }
    same: dict[str, object] = {
        "projection": projection,
        "projection_bias": projection is not None,
        "prefix_positions": "none" if newer and config.class_token else "class",
    }
    if hybrid:
        free |= {"backbone", "backbone_layers"}
        same |= {"backbone_eps": 1e-6, "backbone_weight": "deviation", "backbone_weight_eps": 1e-5}
    for entry in fields(VariantConfig):
        want, own = same.get(entry.name, entry.default), getattr(config, entry.name)
        if entry.name not in free | wants.keys() and own != want:
            differ[entry.name] = (own, want)
    if differ:
        raise no_place("Google's .npz", names.title + " code", differ)
    return names
