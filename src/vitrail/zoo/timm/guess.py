"""The architecture of a bare state dict of timm's, from names and shapes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

from vitrail.errors import UserError
from vitrail.variants import VariantConfig
from vitrail.zoo.source import Files
from vitrail.zoo.timm.arguments import Arguments, encoder_config, plainness, table
from vitrail.zoo.timm.names import skeleton, spelling
from vitrail.zoo.timm.shapes import OWN, channels_of, depth_of, fitted_size, input_size, outputs_of, used_names


def guess_architecture(files: Files, notes: list[str]) -> tuple[str, Arguments]:
    """The architecture whose weights have these names and shapes, or a plain one inferred from the shapes."""
    fitting: dict[str, VariantConfig] = {}
    fits = cache(lambda config, kind: _fits(files, config, kind))  # many names are the same architecture
    for name in sorted(table(), key=plainness):
        config = _candidate(files, table()[name])
        if config is not None and fits(config, table()[name]["class"]):
            fitting[name] = config
    if fitting:
        first, *others = fitting
        differ = [name for name in others if fitting[name] != fitting[first]]
        notes.append(
            f"no config.json: the weights fit timm's {first}, and are loaded with its settings and preprocessing"
            + (f"; they also fit {differ[0]}, which computes different outputs" if differ else "")
        )
        return first, {}
    width, _, patch, _ = (*files.shapes.get("patch_embed.proj.weight", ()), 0, 0, 0, 0)[:4]
    depth = depth_of(files)
    up = files.shapes.get("blocks.0.mlp.fc1.weight", (0,))[0]
    if not (width and patch and depth and up):
        raise UserError(f"{files.path} has the names of timm's ViTs but fits none of them: give its config.json too")
    for needed in (("norm.weight", "fc_norm.weight"), ("pos_embed",)):
        if not files.weights.keys() & {*needed}:
            raise UserError(
                f"{files.path} lacks {needed[0]}, which plain ViTs have: download it again, or give its config.json"
            )
    prefix = int("cls_token" in files.weights)
    registers = files.shapes["reg_token"][1] if "reg_token" in files.weights else 0
    count = files.shapes.get("pos_embed", (1, 0))[1]
    pool = "map" if "attn_pool.latent" in files.weights else "token" if prefix else "avg"
    notes.append(
        f"no config.json: a plain ViT of width {width} and depth {depth}, with {max(1, width // 64)} heads of 64 "
        "channels and timm's defaults for everything that shapes do not determine"
    )
    return "vit_base_patch16_224", {
        "embed_dim": width,
        "depth": depth,
        "patch_size": patch,
        "num_heads": max(1, width // 64),
        "mlp_ratio": (up + 0.5) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in files.weights,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in files.weights else None,
        "class_token": bool(prefix),
        "reg_tokens": registers,
        "pos_embed": "learn" if count else "none",
        "no_embed_class": bool(prefix + registers) and math.isqrt(count) ** 2 == count,
        "pre_norm": "norm_pre.weight" in files.weights,
        "final_norm": "norm.weight" in files.weights or "fc_norm.weight" in files.weights,
        "fc_norm": "fc_norm.weight" in files.weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in files.weights,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in files.weights,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in files.weights,
        "proj_bias": "blocks.0.attn.proj.bias" in files.weights,
        "global_pool": pool,
    }


def _candidate(files: Files, values: Arguments) -> VariantConfig | None:
    """The config with these arguments, if it has the width and depth of the file."""
    shape = files.shapes.get("patch_embed.proj.weight") or files.shapes.get("patch_embed.backbone.2.conv.weight")
    if shape is None or len(shape) != 4 or values.get("embed_dim", 768) != shape[0]:
        return None
    if values.get("depth", 12) != depth_of(files):
        return None
    try:
        values = values | {"in_chans": channels_of(files)}
        return encoder_config(values, fitted_size(files, values, input_size(values, {}, values["images"]), []))
    except UserError:
        return None


def _fits(files: Files, config: VariantConfig, kind: str) -> bool:
    """Whether a model of timm's class `kind` with this config has just the names and shapes of the file."""
    classes = outputs_of(files)
    one = _first_block(config)
    there = {name for name in used_names(files) if OWN.match(name) and not re.match(r"blocks\.[1-9]", name)}
    entries, own = spelling(one, kind, there, classes), skeleton(one, classes).state_dict()
    if {name for entry in entries.values() for name in entry.names} != there:
        return False
    for key, entry in entries.items():
        shapes = [files.shapes[name] for name in entry.names]
        if entry.sizes and any(shape[:1] != (rows,) for shape, rows in zip(shapes, entry.sizes, strict=True)):
            return False
        # The tensor of a slice is larger, and rotary directions are one tensor for all blocks.
        whole = not entry.sizes and entry.piece is None and key != "encoder.rotary.frequencies"
        if whole and shapes[0] != (entry.shape or tuple(own[key].shape)):
            return False
    return True


def _first_block(config: VariantConfig) -> VariantConfig:
    """The same with one block, which has the same kinds of names and shapes and is built faster."""
    blocks = tuple(i for i in config.global_blocks if i == 0)
    return replace(config, depth=1, kv_heads=config.kv_heads[:1], global_blocks=blocks)
