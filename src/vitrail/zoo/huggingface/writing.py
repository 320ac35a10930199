"""A model of ours as a folder that transformers loads."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vitrail.errors import UserError
from vitrail.files import atomic_folder, write_atomic
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig, as_variant
from vitrail.vit import ViT
from vitrail.zoo.huggingface.encoder import encoder_config, renaming, with_hidden
from vitrail.zoo.huggingface.kinds import ACTIVATIONS, KINDS
from vitrail.zoo.huggingface.processor import settings_of
from vitrail.zoo.problem import problem_in
from vitrail.zoo.refusals import KEPT, no_hidden_layer, no_place

log = logging.getLogger("vitrail")

# The class without and with classes; None if transformers has none.
ARCHITECTURES: dict[str, tuple[str | None, str | None]] = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", None),
    "clip": (None, "CLIPForImageClassification"),
    "clip_vision_model": ("CLIPVisionModel", None),
    "siglip_vision_model": ("SiglipVisionModel", None),
    "ijepa": ("IJepaModel", "IJepaForImageClassification"),
    "beit": ("BeitModel", "BeitForImageClassification"),
    "data2vec-vision": ("Data2VecVisionModel", None),
}
ANY_SHAPE = ("vit", "deit", "ijepa", "dinov3_vit")
"""types that support non-square sizes in transformers"""


def write(task: Task, path: Path) -> None:
    """Write the folder `path`: config.json, preprocessor_config.json and model.safetensors, whole or not at all.

    A model that no type of transformers can express is refused, with the unsupported module.
    """
    if path.is_file() or (path.exists() and any(path.iterdir()) and not (path / "config.json").exists()):
        raise UserError(f"{path} exists and is not a checkpoint: choose another path to write to")
    encoder, head = task.encoder, task.portable
    if head is None or not isinstance(encoder, ViT):
        raise UserError(f"transformers cannot store the task {task.name!r} without a Vision Transformer")
    classes = list(head.outputs) or None
    if head.hidden is not None:
        raise no_hidden_layer("transformers", head.hidden)
    config = as_variant(encoder.config)
    name = _type_for(config, classes is not None)
    modules = _modules(config, classes is not None)
    values = _values(name, config)
    plain = _checked(name, values, modules, config)
    text = {**_text(name, values, modules, classes), **problem_in(head)}
    weights = _weights(task, encoder, plain, name, classes is not None)
    with atomic_folder(path) as folder:
        write_atomic(folder / "model.safetensors", to_safetensors(weights, metadata={"format": "pt"}))
        write_atomic(folder / "config.json", json.dumps(text, indent=2) + "\n")
        write_atomic(folder / "preprocessor_config.json", json.dumps(settings_of(task.preprocess), indent=2) + "\n")


def _type_for(c: VariantConfig, classes: bool) -> str:
    """The closest type; whether it fits is checked afterwards."""
    if c.rotary != "none":
        return "dinov3_vit"
    if c.norm_before:
        return "clip" if classes else "clip_vision_model"
    if c.pool == "attention":
        return "siglip_vision_model"
    if c.distillation:
        return "deit"
    if c.relative != "none" or not c.key_bias or c.norm_pooled:
        return "beit" if c.norm_pooled or c.norm_after else "data2vec-vision"
    if c.registers:
        return "dinov2_with_registers"
    if c.layer_scale is not None or c.mlp == "gated":
        return "dinov2"
    return "vit" if c.class_token else "ijepa"


def _modules(c: VariantConfig, classes: bool) -> set[str]:
    """The `MODULES` of the model, for `encoder_config`."""
    modules = {
        "classes": classes and c.pool != "distilled",
        "distilled": c.pool == "distilled",
        "projection": c.projection is not None and not c.projection_bias,
        "pooler": c.projection is not None and c.projection_bias,
        "norm": c.norm_pooled,
        "probe": c.pool == "attention",
    }
    return {module for module, there in modules.items() if there}


def _values(name: str, c: VariantConfig) -> dict[str, Any]:
    """The entries of `config.json` that say how the model is built."""
    square = c.image_size[0] == c.image_size[1] or name not in ANY_SHAPE
    values: dict[str, Any] = {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation),
        "layer_norm_eps": c.norm_eps,
        "image_size": min(c.image_size) if square else list(c.image_size),
        "patch_size": c.patch,
        "num_channels": c.channels,
        "qkv_bias": c.qkv_bias,
    }
    if name in ("vit", "deit"):
        if c.projection is None:  # an identity as pooler, because transformers always has one
            return {**values, "pooler_output_size": c.width, "pooler_act": "linear"}
        return {**values, "pooler_output_size": c.projection, "pooler_act": "tanh" if c.projection_tanh else "linear"}
    if name.startswith("dinov2"):
        values["use_swiglu_ffn"] = c.mlp == "gated"
        values["mlp_ratio"] = _dinov2_ratio(c)
        values["layerscale_value"] = c.layer_scale
        del values["intermediate_size"]
        values.update({"use_mask_token": False} if name == "dinov2" else {"num_register_tokens": c.registers})
    if name == "dinov3_vit":
        key = c.qkv_bias and c.key_bias
        values.update(query_bias=c.qkv_bias, key_bias=key, value_bias=c.qkv_bias)
        values.update(proj_bias=c.output_bias, mlp_bias=c.output_bias, use_gated_mlp=c.mlp == "gated")
        values.update(num_register_tokens=c.registers, rope_theta=c.rotary_temperature, layerscale_value=c.layer_scale)
    if name in ("beit", "data2vec-vision"):
        values["use_absolute_position_embeddings"] = c.positions != "none"
        values["use_relative_position_bias"] = c.relative in ("table", "both")
        values["use_shared_relative_position_bias"] = c.relative in ("shared", "both")
        values["use_mean_pooling"] = c.pool == "average"
        values["layer_scale_init_value"] = c.layer_scale or 0.0
    if name.startswith("clip") and c.projection is not None:
        values["projection_dim"] = c.projection
    if name.startswith("siglip"):
        values["vision_use_head"] = True
    return values


def _dinov2_ratio(c: VariantConfig) -> int:
    """DINOv2's config has a ratio, a whole number; a gated MLP has two thirds of that width."""
    hidden = c.hidden
    return round(hidden * 1.5 / c.width) if c.mlp == "gated" else round(hidden / c.width)


def _checked(name: str, values: dict[str, Any], modules: Collection[str], config: VariantConfig) -> VariantConfig:
    """The config that the written files will be read as; refuses a module for which it differs from the model."""
    if values.get("pooler_act") == "linear" and config.projection is None:
        modules = {*modules} - {"pooler"}
    given = {entry: value for entry, value in values.items() if value is not None}  # null is transformers' default
    back = encoder_config(name, {**KINDS[name].defaults, **given}, modules)
    ours = with_hidden(config, config.hidden)
    ours = replace(
        ours,
        # At its own size nothing is interpolated.
        resampling=back.resampling,
        relative_resampling=back.relative_resampling,
        norm_after_eps=None if ours.norm_after_eps == ours.norm_eps else ours.norm_after_eps,
        # Fields for training only, and fixed positions that a learned table can store.
        dropout=0.0,
        drop_path=0.0,
        stem_blocks=back.stem_blocks,  # only about a stem, which is compared itself
        positions=back.positions if back.positions == "learned" else ours.positions,
    )
    wanted, there = asdict(ours), asdict(back)
    wrong = {field: (own, there[field]) for field, own in wanted.items() if own != there[field]}
    if wrong:
        raise no_place("transformers", f"its type {name}", wrong)
    if config.positions == "learned" and config.resampling != back.resampling:
        log.warning(
            "at other image sizes transformers interpolates positions differently: outputs agree only at this size"
        )
    return back


def _text(name: str, values: dict[str, Any], modules: Collection[str], classes: list[str] | None) -> dict[str, Any]:
    """config.json."""
    architecture = ARCHITECTURES[name][classes is not None]
    if architecture is None:
        raise UserError(
            f"transformers cannot store {'a classifier' if classes else 'an encoder without classes'} "
            f"in its type {name}: {KEPT}"
        )
    if "distilled" in modules:
        architecture = "DeiTForImageClassificationWithTeacher"
    elif "projection" in modules:
        architecture = "CLIPVisionModelWithProjection"
    text: dict[str, Any] = {"architectures": [architecture], "model_type": name, "dtype": "float32"}
    text.update({"vision_config": {"model_type": "clip_vision_model", **values}} if name == "clip" else values)
    if classes is not None:
        text["id2label"] = {str(i): label for i, label in enumerate(classes)}
        text["label2id"] = {label: i for i, label in enumerate(classes)}
    return text


def _weights(task: Task, encoder: ViT, config: VariantConfig, name: str, classes: bool) -> dict[str, Tensor]:
    """The weights under transformers' names, as in files on the Hub."""
    own = {key: value.detach().cpu() for key, value in task.portable_state().items()}
    c = as_variant(encoder.config)
    if config.positions == "learned" and c.positions != "learned":
        positions = encoder.positions_for(c.grid)
        shape = (1, c.prefix_tokens - c.registers + c.grid[0] * c.grid[1], c.width)
        own["encoder.positions"] = torch.zeros(shape) if c.positions == "none" else positions.detach().cpu()
    kind = KINDS[name]
    theirs: dict[str, Tensor] = {}
    for key, (names, _, change) in renaming(config, name, kind.spellings[0], classes).items():
        value = own[key]
        if change == "reshaped":  # CLIP's class token is [D], its positions [N, D]
            value = value.flatten() if key.endswith("class_token") else value.flatten(0, 1)
        theirs.update(zip(names, value.chunk(len(names)), strict=True))
    theirs.update(_stand_ins(name, c, theirs.keys()))
    # transformers 4 needs the prefix of a two-tower model also for the image tower alone.
    prefix = kind.prefixes[0] if classes or name.startswith(("clip", "siglip")) else ""
    heads = ("classifier.", "cls_classifier.", "distillation_classifier.", "visual_projection.")
    return {(key if key.startswith(heads) else prefix + key): value.contiguous() for key, value in theirs.items()}


def _stand_ins(name: str, c: VariantConfig, there: Collection[str]) -> dict[str, Tensor]:
    """Weights that transformers' models have and ours does not, with values that have no effect."""
    if name in ("vit", "deit") and not {"pooler.dense.weight", "classifier.weight", "cls_classifier.weight"} & {*there}:
        return {"pooler.dense.weight": torch.eye(c.width), "pooler.dense.bias": torch.zeros(c.width)}
    if name == "clip":
        return {"post_layernorm.weight": torch.ones(c.width), "post_layernorm.bias": torch.zeros(c.width)}
    if name == "dinov2_with_registers":
        return {"embeddings.mask_token": torch.zeros(1, c.width)}
    if name == "dinov3_vit":
        tokens = {} if c.registers else {"embeddings.register_tokens": torch.zeros(1, 0, c.width)}
        return {"embeddings.mask_token": torch.zeros(1, 1, c.width), **tokens}
    return {}
