"""The architecture of timm and its arguments that express one of our configs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from vitrail.errors import UserError
from vitrail.variants import VariantConfig
from vitrail.zoo.refusals import no_place
from vitrail.zoo.timm.arguments import POOLS, Arguments, encoder_config, plainness, table

IGNORED: dict[str, Any] = {"drop_path": 0.0, "dropout": 0.0, "stem_blocks": 0}
"""fields for training only, and the field of a stem, which is compared itself"""

OTHER_SIZES: dict[str, Any] = {"resampling": "antialias", "resizing": None, "relative_resampling": "geometric"}
OTHER_SIZES |= {"floor_grid": True}
"""fields for other sizes than the model's own, where timm differs"""


def closest_architecture(config: VariantConfig) -> tuple[str, Arguments]:
    """An architecture that can express this config with few arguments, and those arguments."""
    wanted = _canonical(config)
    found: dict[str, Arguments] = {}
    near: list[tuple[int, str, dict[str, tuple[Any, Any]]]] = []
    for name in sorted(table(), key=lambda name: _unlike(name, config)):
        values = table()[name]
        given = arguments(config, values["class"])
        built = _config(values | given, config)
        if built == wanted:
            found[name] = _needed(values, given, config)
        elif built is not None:
            differ = _differences(built, wanted)
            near.append((len(differ), name, differ))
        if len(found) == LIKELY:
            break
    if found:
        return min(found.items(), key=lambda item: (_unlike(item[0], config)[0], len(item[1])))
    _, name, differ = min(near, key=lambda item: item[:2])
    raise no_place("timm", name, differ)


LIKELY = 4
"""number of candidate architectures, those with the fewest arguments first"""


def _unlike(name: str, config: VariantConfig) -> tuple[bool, int, bool, tuple[bool, int, str]]:
    """Sort key: how few arguments an architecture has."""
    values = table()[name]
    given = arguments(config, values["class"])
    equal = sum(1 if values[key] == given[key] else -1 for key in values.keys() & given.keys() - {"img_size"})
    size = tuple(values["images"]["input_size"][-2:])
    return values.get("resizing") != config.resizing, -equal, size != config.image_size, plainness(name)


def _needed(values: Arguments, given: Arguments, config: VariantConfig) -> Arguments:
    """Those of `given` that differ from the defaults of an architecture with `values`; always with the size."""
    wanted = _canonical(config)
    for key in list(given):
        fewer = {k: v for k, v in given.items() if k != key}
        if key not in ("img_size", "init_values") and _config(values | fewer, config) == wanted:
            given = fewer
    return given


def _config(values: Arguments, like: VariantConfig) -> VariantConfig | None:
    try:
        return _canonical(encoder_config(values, like.image_size))
    except UserError:
        return None


def _canonical(config: VariantConfig) -> VariantConfig:
    """The same model in a canonical form."""
    added: dict[str, Any] = {**OTHER_SIZES, "mlp_hidden": config.hidden}
    if config.positions == "none" or not config.prefix_tokens:
        added["prefix_positions"] = "class"
    elif config.prefix_positions == "class" and not config.registers:
        added["prefix_positions"] = "all"
    if config.pool == "attention":
        added |= {"pool_heads": config.pool_heads or config.heads, "pool_hidden": config.pool_hidden or config.hidden}
        added["pool_activation"] = config.pool_activation or config.activation
    if config.rotary == "none":
        names = ("temperature", "reference", "offset", "first", "pairs")
        added |= {f"rotary_{name}": getattr(VariantConfig, f"rotary_{name}") for name in names}
    elif config.rotary == "mixed":
        added["rotary_temperature"] = VariantConfig.rotary_temperature
    layer_scale = config.layer_scale and 1.0
    fields: dict[str, Any] = IGNORED | {"mlp_ratio": 4.0, "layer_scale": layer_scale}
    return replace(config, **fields, **added)


def _differences(found: VariantConfig, wanted: VariantConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, each with the wanted and the found value."""
    one, two = asdict(wanted), asdict(found)
    return {key: (one[key], two[key]) for key in one if one[key] != two[key]}


def arguments(config: VariantConfig, kind: str) -> Arguments:
    """The arguments of timm's class `kind` for this config, as far as JSON and the class can express it."""
    c = config
    pools = {pool: name for name, pool in POOLS.items()} | {"distilled": "token"}
    values: Arguments = {
        "img_size": list(c.image_size),
        "in_chans": c.channels,
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.heads,
        "mlp_ratio": _ratio(c.hidden, c.width),
        "qkv_bias": c.qkv_bias,
        "init_values": c.layer_scale,
        "global_pool": pools.get(c.pool, "avg"),
    }
    if c.backbone == "none":
        values["patch_size"] = c.patch
    if kind in ("VisionTransformer", "VisionTransformerDistilled"):
        values |= _vision_transformer_arguments(c)
    elif kind == "Eva":
        values |= _eva_arguments(c)
    elif kind == "Beit":
        values |= {
            "use_fc_norm": c.norm_pooled,
            "use_rel_pos_bias": c.relative in ("table", "both"),
            "use_shared_rel_pos_bias": c.relative in ("shared", "both"),
            "use_abs_pos_emb": c.positions == "learned",
            "swiglu_mlp": c.mlp == "gated",
            "scale_mlp": c.mlp_norm,
        }
    else:
        values |= {
            "use_abs_pos": c.positions == "learned",
            "use_rel_pos": c.relative == "decomposed",
            "window_size": c.window,
            "global_attn_indexes": list(c.global_blocks),
            "neck_chans": c.neck,
            "pre_norm": c.norm_before,
            "qk_norm": c.qk_norm,
        }
    return values


def _vision_transformer_arguments(c: VariantConfig) -> Arguments:
    values: Arguments = {
        "class_token": c.class_token,
        "reg_tokens": c.registers,
        "pos_embed": "learn" if c.positions == "learned" else "none",
        "no_embed_class": c.prefix_positions == "none",
        "pre_norm": c.norm_before,
        "final_norm": c.norm_after or c.norm_pooled,
        "fc_norm": c.norm_pooled,
        "act_layer": c.activation,
        "qk_norm": c.qk_norm,
        "scale_attn_norm": c.attention_norm,
        "scale_mlp_norm": c.mlp_norm,
        "proj_bias": c.output_bias,
        "pool_include_prefix": c.pool_prefix,
        "attn_layer": "diff" if c.differential else "attn",
    }
    if c.mlp == "gated":
        # In timm's packed gated MLP the width after the gate is half of the ratio's; in the other it is all of it.
        values["mlp_ratio"] = _ratio(c.hidden * (2 if c.output_bias else 1), c.width)
    return values


def _eva_arguments(c: VariantConfig) -> Arguments:
    kinds = {"axial": "cat", "centred": "dinov3", "mixed": "mixed", "none": "cat"}
    return {
        "class_token": c.class_token,
        "num_reg_tokens": c.registers,
        "no_embed_class": c.prefix_positions == "none",
        "use_abs_pos_emb": c.positions == "learned",
        "use_pre_transformer_norm": c.norm_before,
        "use_post_transformer_norm": c.norm_after,
        "use_fc_norm": c.norm_pooled,
        "use_post_norm": c.arrangement == "post",
        "attn_only_layer_scale": c.layer_scale_on == "attention",
        "attn_type": "rope" if c.key_bias and c.qkv_bias else "eva",
        "qkv_fused": not c.kv_heads,
        "num_kv_heads": list(c.kv_heads) or None,
        "qk_norm": c.qk_norm,
        "scale_attn_inner": c.attention_norm,
        "swiglu_mlp": c.mlp == "gated",
        "swiglu_align_to": 0,
        "scale_mlp": c.mlp_norm,
        "use_rot_pos_emb": c.rotary != "none",
        "rope_type": kinds[c.rotary],
        "rope_temperature": c.rotary_temperature,
        "rope_grid_offset": c.rotary_offset,
        "rope_grid_indexing": "xy" if c.rotary_first == "columns" else "ij",
        "rope_rotate_half": c.rotary_pairs == "halves",
        "ref_feat_shape": list(c.rotary_reference) if c.rotary_reference else None,
        "attn_pool_num_heads": c.pool_heads,
        "attn_pool_mlp_ratio": _ratio(c.pool_hidden, c.width) if c.pool_hidden else None,
    }


def _ratio(hidden: int, width: int) -> float:
    """A ratio with which timm's int(width * ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
