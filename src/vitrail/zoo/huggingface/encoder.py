"""Mapping of transformers' configs and names to ours. The same tables serve reading and writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import UserError
from vitrail.variants import VariantConfig
from vitrail.variants.config import Pool
from vitrail.zoo.huggingface.kinds import ACTIVATIONS, Spelling
from vitrail.zoo.renames import joined, linear, reshaped
from vitrail.zoo.source import Weight

MODULES = {
    "classifier.weight": "classes",
    "cls_classifier.weight": "distilled",
    "visual_projection.weight": "projection",
    "pooler.dense.weight": "pooler",
    "pooler.layernorm.weight": "norm",
    "head.probe": "probe",
}
"""weights that only some models of a type have, and a key for each"""


def encoder_config(kind: str, values: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    """The config of a `model_type` with the values of its `config.json`, for a model with those `MODULES`."""
    c = values
    if c["hidden_act"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"hidden_act {c['hidden_act']!r} is not supported: choose a model with one of {known}")
    patch = _sides(c["patch_size"], "patch_size")
    if patch[0] != patch[1]:
        raise UserError(
            f"patches of {patch[0]}x{patch[1]} pixels are not supported: choose a model with square patches"
        )
    # SigLIP 2 gives its size as a number of patches in a square.
    size = c["image_size"] if "num_patches" not in c else math.isqrt(c["num_patches"]) * patch[0]
    image_size = _sides(size, "image_size")
    config = VariantConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        patch=patch[0],
        image_size=image_size,
        channels=c["num_channels"],
        qkv_bias=c["qkv_bias"],
        activation=ACTIVATIONS[c["hidden_act"]],
        norm_eps=c["layer_norm_eps"],
        resampling="bicubic",
        floor_grid=any(side % patch[0] for side in image_size),
    )
    config = with_hidden(config, c["intermediate_size"] or int(c["hidden_size"] * c["mlp_ratio"]))
    family = kind.removesuffix("_vision_model")
    return FAMILIES[family](config, c, modules)


def with_hidden(config: VariantConfig, hidden: int) -> VariantConfig:
    """The config with an MLP of this hidden width."""
    ratio = hidden / config.width
    if config.mlp == "plain" and int(config.width * ratio) == hidden:
        return replace(config, mlp_ratio=ratio, mlp_hidden=None)
    return replace(config, mlp_hidden=hidden)


def _sides(value: int | list[int], name: str) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{name} {value!r} of config.json is not a size in pixels: choose another checkpoint")
    return sides[0], sides[1]


def _vit(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    if "pooler" not in modules or "classes" in modules:
        return config
    activation, width = c.get("pooler_act", "tanh"), c.get("pooler_output_size") or config.width
    if activation not in ("tanh", "linear"):
        raise UserError(f"a pooler with {activation!r} is not supported: choose a model with tanh or none")
    return replace(config, projection=width, projection_bias=True, projection_tanh=activation == "tanh")


def _deit(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    config = replace(config, distillation=True)
    return replace(config, pool="distilled") if "distilled" in modules else _vit(config, c, modules)


def _ijepa(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    return replace(config, class_token=False, pool="average")


def _dinov2(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    config = replace(
        config,
        registers=c.get("num_register_tokens", 0),
        pool="token_average" if "classes" in modules else "token",
        layer_scale=c.get("layerscale_value", 1.0),
    )
    if "num_register_tokens" in c:
        config = replace(config, resampling="antialias")
    if not c["use_swiglu_ffn"]:
        return config
    config = replace(config, activation="silu", mlp="gated")
    # Two thirds, so that three matrices have about as many weights as two, in steps of 8.
    return with_hidden(config, (int(int(config.width * c["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8)


def _dinov3(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    biases = {name for name in ("query", "key", "value") if c[f"{name}_bias"]}
    config = replace(
        config,
        rotary="centred",
        rotary_temperature=float(c["rope_theta"]),
        rotary_pairs="halves",
        # A missing bias besides an existing one is filled with zeros; these two cases are common enough to keep.
        key_bias=biases != {"query", "value"},
        output_bias=c["proj_bias"] or c["mlp_bias"],
        mlp="gated" if c["use_gated_mlp"] else "plain",
        registers=c["num_register_tokens"],
        positions="none",
        qkv_bias=bool(biases),
        layer_scale=c.get("layerscale_value", 1.0),
    )
    return with_hidden(config, c["intermediate_size"])


def _clip(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    classes = "classes" in modules
    projection = c["projection_dim"] if "projection" in modules else None
    return replace(
        config,
        pool="average" if classes else "token",
        norm_before=True,
        norm_after=False,
        norm_pooled=not classes,
        patch_bias=False,
        projection=projection,
    )


def _siglip(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    pool: Pool = "attention" if "probe" in modules and "classes" not in modules else "average"
    return replace(config, class_token=False, pool=pool)


def _siglip2(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    return _siglip(replace(config, resampling="bilinear_antialias"), c, modules)


def _beit(config: VariantConfig, c: Mapping[str, Any], modules: Collection[str]) -> VariantConfig:
    own, shared = c["use_relative_position_bias"], c["use_shared_relative_position_bias"]
    mean = c["use_mean_pooling"]
    return replace(
        config,
        key_bias=False,
        norm_after=not mean,
        norm_pooled=mean and "norm" in modules,
        relative="both" if own and shared else "table" if own else "shared" if shared else "none",
        relative_resampling="bilinear",
        pool="average" if mean else "token",
        positions="learned" if c["use_absolute_position_embeddings"] else "none",
        layer_scale=c["layer_scale_init_value"] if c["layer_scale_init_value"] > 0 else None,
    )


FAMILIES = {
    "vit": _vit,
    "vit_mae": _vit,
    "vit_msn": _vit,
    "deit": _deit,
    "ijepa": _ijepa,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "beit": _beit,
    "data2vec-vision": _beit,
}


def renaming(config: VariantConfig, kind: str, spelling: Spelling, classes: bool) -> dict[str, Weight]:
    """Renaming table from the task's names to transformers' (without the tower's prefix)."""
    s = spelling
    t: dict[str, Weight] = {}
    linear(t, "encoder.patches.projection", s.patches, bias=config.patch_bias)
    if kind.startswith("siglip2"):
        t["encoder.patches.projection.weight"] = Weight((f"{s.patches}.weight",), _filters(config.patch), "reshaped")
    flat = {"clip", "siglip", "siglip2"} & {kind.removesuffix("_vision_model")}
    if config.class_token:
        t["encoder.class_token"] = reshaped(s.class_token, (1, 1, -1)) if flat else Weight((s.class_token,))
    if config.distillation:
        t["encoder.distillation_token"] = Weight((s.distillation,))
    if config.registers:
        t["encoder.registers"] = Weight((s.registers,))
    if config.positions == "learned":
        shape = (1, -1, config.width)
        t["encoder.positions"] = reshaped(s.positions, shape) if flat else Weight((s.positions,))
    if config.relative in ("shared", "both"):
        t["encoder.relative.table"] = Weight((s.shared_table,))
    for own, theirs, there in (
        ("norm_before", s.norm_before, config.norm_before),
        ("norm", s.norm, config.norm_after),
        ("norm_pooled", s.norm_pooled, config.norm_pooled),
    ):
        if there:
            linear(t, f"encoder.{own}", theirs)
    for i in range(config.depth):
        _block(t, f"encoder.blocks.{i}.", s.block.format(i), config, s)
    if config.pool == "attention":
        _attention_pool(t)
    if config.projection is not None:
        name = "pooler.dense" if config.projection_bias else "visual_projection"
        linear(t, "encoder.projection", name, bias=config.projection_bias)
    if config.pool == "distilled":
        linear(t, "head.linear", "cls_classifier")
        linear(t, "head.distillation", "distillation_classifier")
    elif classes:
        linear(t, "head.linear", "classifier")
    return t


def _block(t: dict[str, Weight], own: str, theirs: str, config: VariantConfig, s: Spelling) -> None:
    linear(t, f"{own}norm1", theirs + s.norm1)
    linear(t, f"{own}norm2", theirs + s.norm2)
    qkv = [theirs + name for name in (s.query, s.key, s.value)]
    t[f"{own}attention.qkv.weight"] = joined(f"{name}.weight" for name in qkv)
    if config.qkv_bias and config.key_bias:
        t[f"{own}attention.qkv.bias"] = joined(f"{name}.bias" for name in qkv)
    elif config.qkv_bias:
        t[f"{own}attention.q_bias"] = Weight((f"{qkv[0]}.bias",))
        t[f"{own}attention.v_bias"] = Weight((f"{qkv[2]}.bias",))
    linear(t, f"{own}attention.out", theirs + s.out, bias=config.output_bias)
    if config.relative in ("table", "both"):
        t[f"{own}attention.relative.table"] = Weight((theirs + s.table,))
    up, down = (s.up, s.down) if config.mlp == "plain" or s.gated is None else s.gated
    linear(t, f"{own}mlp.up", theirs + up, bias=config.output_bias)
    if config.mlp == "gated" and s.gate is not None:
        for end in ("weight", "bias")[: 1 + config.output_bias]:
            t[f"{own}mlp.up.{end}"] = joined(f"{theirs}{name}.{end}" for name in (s.gate, up))
    linear(t, f"{own}mlp.down", theirs + down, bias=config.output_bias)
    if config.layer_scale is not None:
        t[f"{own}branch1.0.scale"] = Weight((theirs + s.scale1,))
        t[f"{own}branch2.0.scale"] = Weight((theirs + s.scale2,))


def _attention_pool(t: dict[str, Weight]) -> None:
    """SigLIP's head, whose attention is PyTorch's."""
    t["encoder.pooling.probe"] = Weight(("head.probe",))
    t["encoder.pooling.attention.qkv.weight"] = Weight(("head.attention.in_proj_weight",))
    t["encoder.pooling.attention.qkv.bias"] = Weight(("head.attention.in_proj_bias",))
    linear(t, "encoder.pooling.attention.out", "head.attention.out_proj")
    linear(t, "encoder.pooling.norm", "head.layernorm")
    linear(t, "encoder.pooling.mlp.up", "head.mlp.fc1")
    linear(t, "encoder.pooling.mlp.down", "head.mlp.fc2")


def _filters(patch: int) -> Callable[[Tensor], Tensor]:
    """SigLIP 2's linear map of patches, with rows first and channels last, as filters [D, C, p, p]."""
    return lambda weight: weight.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)


def filled(own: str, weight: Weight, absent: tuple[str, ...], config: VariantConfig) -> Weight:
    """`weight` with zeros for names that end like one of `absent`: biases that the source's config omits."""
    here = [not name.endswith(absent) for name in weight.names]
    if all(here) or not absent:
        return weight
    rows = config.hidden if ".mlp.up." in own else config.width

    def make(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return torch.cat([next(given) if there else torch.zeros(rows) for there in here])

    names = tuple(name for name, there in zip(weight.names, here, strict=True) if there)
    return Weight(names, make, "filled with zeros")
