"""Checkpoints as their authors published them: MAE, MoCo v3, DINO (and iBOT), DINOv2 and DINOv3; SAM is in `sam.py`.

They hold only weights. Heads follow from the width, sizes from the positions, and preprocessing is that of the authors'
evaluation. Bare encoders of MAE, DINO and I-JEPA have only timm's names, and are read as timm's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitrail.data.preprocess import Preprocess, imagenet_statistics
from vitrail.variants import VariantConfig
from vitrail.zoo.renames import blocks_in, heads_for, joined, linear, square
from vitrail.zoo.source import Files, Found, Weight

NAME = "originals"


LEFT = {
    r"(decoder_|mask_token$|masked_embed$)": "the decoder and the mask token of pre-training",
    r"(head|dino_head|ibot_head|projectors)\.": "the head of pre-training",
    r"rope_embed\.periods$": "computed from the config",
    r".*\.bias_mask$": "a mask for keys without a bias",
    r"local_cls_norm\.": "only for small crops in training",
}
"""prefixes of names that may be left out, and why"""


def recognise(files: Files) -> bool:
    """Whether there are names that no other library's files have."""
    return _layout(files) is not None


def read(files: Files) -> Found:
    """The encoder, by the shapes of its weights."""
    layout = _layout(files)
    assert layout is not None
    found = LAYOUTS[layout](files)
    used = {name for weight in found.weights.values() for name in weight.names}
    for name in files.weights.keys() - used:
        for start, reason in LEFT.items():
            if re.match(start, name):
                found.left[name] = reason
    found.notes.append(f"the file has no preprocessing: using that of the published {layout} weights")
    return found


def _layout(files: Files) -> str | None:
    """The entry of `LAYOUTS` that names and shapes match."""
    names, shapes = files.weights, files.shapes
    if files.json.get("config.json", {}).keys() & {"model_type", "architecture"}:
        return None  # a library's names
    if not any(name in names for name in ("blocks.0.attn.qkv.weight", "blocks.0.0.attn.qkv.weight")):
        return None
    if "storage_tokens" in names or "rope_embed.periods" in names:
        return "DINOv3"
    if "decoder_embed.weight" in names:
        return "MAE"
    if "register_tokens" in names or (len(shapes.get("mask_token", ())) == 2 and "pos_embed" in names):
        return "DINOv2"
    if any(name.startswith(("head.last_layer.", "head.mlp.")) for name in names):
        return "DINO"
    if "head.7.running_mean" in names and "head.7.weight" not in names:
        return "MoCo v3"  # its projector ends in a norm without weights
    return None


def _mae(files: Files) -> Found:
    config = _plain(files, resampling="bicubic")
    return _found("MAE's .pth", config, _names(files, config), _images(config, config.image_size, "bicubic"))


def _dino(files: Files) -> Found:
    config = _plain(files, resampling="offset")
    return _found("DINO's .pth", config, _names(files, config), _images(config, config.image_size, "bicubic"))


def _moco(files: Files) -> Found:
    config = replace(_plain(files, resampling="bicubic"), heads=12)  # of 32 channels in ViT-S
    return _found("MoCo v3's .pth", config, _names(files, config), _images(config, config.image_size, "bilinear"))


def _dinov2(files: Files) -> Found:
    registers = files.shapes.get("register_tokens", (1, 0))[1]
    # The models with registers were published with another interpolation of positions.
    config = _plain(files, resampling="antialias" if registers else "offset", registers=registers)
    side = min(224 // config.patch * config.patch, config.image_size[0])
    found = _found("DINOv2's .pth", config, _names(files, config), _images(config, (side, side), "bicubic"))
    if registers:
        found.weights["encoder.registers"] = Weight(("register_tokens",))
    return found


def _dinov3(files: Files) -> Found:
    width = files.shapes["patch_embed.proj.weight"][0]
    heads = heads_for(width)
    if "rope_embed.periods" in files.shapes:
        heads = width // (4 * files.shapes["rope_embed.periods"][0])
    bias = f"{_block(files, 0)}attn.qkv.bias" in files.shapes
    config = _plain(
        files,
        rotary="centred",
        rotary_temperature=100.0,
        rotary_pairs="halves",
        key_bias=not bias,
        resampling="antialias",
        heads=heads,
        registers=files.shapes.get("storage_tokens", (1, 0))[1],
        qkv_bias=bias,
        norm_eps=1e-5,
    )
    found = _found("DINOv3's .pth", config, _names(files, config), _images(config, config.image_size, "bilinear"))
    found.preprocess = replace(found.preprocess, resize="squash", crop_fraction=1.0)
    if config.registers:
        found.weights["encoder.registers"] = Weight(("storage_tokens",))
    return found


def _plain(files: Files, **changes: Any) -> VariantConfig:
    """The config of an encoder with timm's names, DINOv2's gated MLP or DINOv3's, and `changes`."""
    shapes, first = files.shapes, _block(files, 0)
    width, channels, patch = shapes["patch_embed.proj.weight"][:3]
    prefix = int("cls_token" in shapes)
    placed = "pos_embed" in shapes
    side = square(files, "pos_embed", prefix) * patch if placed else 224 // patch * patch
    gated = next((name for name in ("mlp.w3", "mlp.fc2") if f"{first}{name}.weight" in shapes), "mlp.fc2")
    hidden = shapes[f"{first}{gated}.weight"][1]
    config = VariantConfig(
        width=width,
        depth=blocks_in(files, "blocks.{}.norm1.weight") or _chunked(files),
        heads=heads_for(width),
        patch=patch,
        image_size=(side, side),
        channels=channels,
        class_token=bool(prefix),
        pool="token" if prefix else "average",
        positions="learned" if placed else "none",
        qkv_bias=f"{first}attn.qkv.bias" in shapes,
        layer_scale=1e-5 if f"{first}ls1.gamma" in shapes else None,
        activation="silu" if gated == "mlp.w3" else "gelu",
        mlp="gated" if gated == "mlp.w3" else "plain",
        mlp_hidden=hidden,
    )
    return replace(config, **changes)


def _block(files: Files, number: int) -> str:
    """The prefix of a block's names. DINOv2 trains in chunks: `blocks.CHUNK.NUMBER.`"""
    if f"blocks.{number}.norm1.weight" in files.shapes:
        return f"blocks.{number}."
    ending = f".{number}.norm1.weight"
    inside = [n for n in files.shapes if n.endswith(ending) and n.startswith("blocks.") and n.count(".") == 4]
    return inside[0].removesuffix("norm1.weight") if inside else f"blocks.{number}."


def _chunked(files: Files) -> int:
    return sum(bool(re.fullmatch(r"blocks\.\d+\.\d+\.norm1\.weight", name)) for name in files.shapes)


def _names(files: Files, config: VariantConfig) -> dict[str, Weight]:
    """The renaming table of such an encoder."""
    t: dict[str, Weight] = {}
    linear(t, "encoder.patches.projection", "patch_embed.proj")
    if config.class_token:
        t["encoder.class_token"] = Weight(("cls_token",))
    if config.positions == "learned":
        t["encoder.positions"] = Weight(("pos_embed",))
    for i in range(config.depth):
        own, theirs = f"encoder.blocks.{i}.", _block(files, i)
        linear(t, f"{own}norm1", f"{theirs}norm1")
        linear(t, f"{own}norm2", f"{theirs}norm2")
        _attention(t, f"{own}attention.", f"{theirs}attn.", config)
        _mlp(t, f"{own}mlp.", f"{theirs}mlp.", files)
        if config.layer_scale is not None:
            t[f"{own}branch1.0.scale"] = Weight((f"{theirs}ls1.gamma",))
            t[f"{own}branch2.0.scale"] = Weight((f"{theirs}ls2.gamma",))
    linear(t, "encoder.norm", "norm")
    return t


def _attention(t: dict[str, Weight], own: str, theirs: str, config: VariantConfig) -> None:
    t[f"{own}qkv.weight"] = Weight((f"{theirs}qkv.weight",))
    if config.qkv_bias and config.key_bias:
        t[f"{own}qkv.bias"] = Weight((f"{theirs}qkv.bias",))
    elif config.qkv_bias:
        for name, third in (("q_bias", 0), ("v_bias", 2)):
            t[own + name] = Weight((f"{theirs}qkv.bias",), _third(third), "without the keys' third")
    linear(t, f"{own}out", f"{theirs}proj")


def _third(number: int) -> Callable[[Tensor], Tensor]:
    return lambda bias: bias.chunk(3)[number]


def _mlp(t: dict[str, Weight], own: str, theirs: str, files: Files) -> None:
    """Two linear maps, or with a gate: DINOv2 has gate and values in one (`w12`), DINOv3 in two, the gate first."""
    if f"{theirs}w3.weight" not in files.shapes:
        linear(t, f"{own}up", f"{theirs}fc1")
        linear(t, f"{own}down", f"{theirs}fc2")
        return
    linear(t, f"{own}up", f"{theirs}w12")
    if f"{theirs}w1.weight" in files.shapes:
        for end in ("weight", "bias"):
            t[f"{own}up.{end}"] = joined(f"{theirs}{name}.{end}" for name in ("w1", "w2"))
    linear(t, f"{own}down", f"{theirs}w3")


def _found(source: str, config: VariantConfig, weights: dict[str, Weight], preprocess: Preprocess) -> Found:
    return Found(source, config, None, preprocess, weights, left={})


def _images(config: VariantConfig, size: tuple[int, int], interpolation: str) -> Preprocess:
    """Preprocessing of these models' evaluation: a center crop of 7/8."""
    mean, std = imagenet_statistics(config.channels)
    return Preprocess(
        size=size,
        crop_fraction=224 / 256,
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        mean=mean,
        std=std,
        channels=config.channels,
    )


LAYOUTS = {"MAE": _mae, "MoCo v3": _moco, "DINO": _dino, "DINOv2": _dinov2, "DINOv3": _dinov3}
