"""Write timm's folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors.torch import save as to_safetensors

from vitrail.errors import UserError
from vitrail.files import atomic_folder, write_atomic
from vitrail.tasks.task import Task
from vitrail.variants import as_variant
from vitrail.vit import ViT
from vitrail.zoo.problem import problem_in
from vitrail.zoo.refusals import no_hidden_layer
from vitrail.zoo.timm.arguments import Arguments, table
from vitrail.zoo.timm.closest import closest_architecture
from vitrail.zoo.timm.names import spelling, written

log = logging.getLogger("vitrail")


def write(task: Task, folder: Path) -> None:
    """`config.json` and `model.safetensors`, for `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub.

    Raises:
        UserError: the model has a module that no architecture of timm has; the message names it.
    """
    encoder, head = task.encoder, task.portable
    if head is None or not isinstance(encoder, ViT):
        raise UserError(f"timm has no model for the task {task.name}: convert a classifier or an encoder")
    if head.hidden is not None:
        raise no_hidden_layer("timm", head.hidden)
    own = as_variant(encoder.config)
    name, given = closest_architecture(own)
    if own.positions == "learned" and own.resampling != "antialias":
        log.warning("%s: for images of another size, timm interpolates positions differently", folder)
    values = table()[name] | given
    kind = values["class"]
    entries = spelling(own, kind, _apart(values), len(head.outputs))
    state = task.portable_state()
    weights = {key: value.contiguous().cpu() for key, value in written(entries, state).items()}
    preprocess = task.preprocess
    config = {
        "architecture": name,
        "num_classes": len(head.outputs),
        "num_features": own.token_width,
        "model_args": given,
        "pretrained_cfg": {
            "input_size": [own.channels, *own.image_size],
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_fraction,
            "crop_mode": "center" if preprocess.resize == "crop" else "squash",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": len(head.outputs),
            "classifier": "head.fc" if kind == "VisionTransformerSAM" else "head",
        },
        **({"label_names": head.outputs} if head.outputs else {}),
        **problem_in(head),
    }
    with atomic_folder(folder) as place:
        write_atomic(place / "model.safetensors", to_safetensors(weights, metadata={"format": "pt"}))
        write_atomic(place / "config.json", json.dumps(config, indent=2) + "\n")


def _apart(values: Arguments) -> set[str]:
    """Names of weights that timm's class stores separately, for these arguments."""
    blocks = range(values.get("depth", 12))
    mlp, kind = values.get("mlp_layer"), values["class"]
    names = set[str]()
    if values.get("qkv_fused") is False:
        names |= {
            f"blocks.{i}.attn.{letter}_proj.{end}" for i in blocks for letter in "qkv" for end in ("weight", "bias")
        }
    split = mlp == "SwiGLU" or (isinstance(mlp, dict) and mlp["name"] == "SwiGLU")
    eva = values.get("scale_mlp") or values.get("swiglu_align_to")
    if split or (values.get("swiglu_mlp") and (kind == "Beit" or eva)):
        names |= {f"blocks.{i}.mlp.fc1_g.{end}" for i in blocks for end in ("weight", "bias")}
    return names
