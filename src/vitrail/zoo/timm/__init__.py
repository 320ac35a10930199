"""timm's folders (`config.json` with `architecture`, and weights) and bare state dicts. timm is not needed."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vitrail.data import imagenet
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.files import whole_folder, write_whole
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig, as_variant
from vitrail.vit import ViT
from vitrail.zoo.problem import problem_in, problem_of
from vitrail.zoo.refusals import no_hidden_layer, no_place
from vitrail.zoo.renames import class_names
from vitrail.zoo.source import Files, Found
from vitrail.zoo.timm.arguments import Arguments, arguments, encoder_config, table
from vitrail.zoo.timm.names import skeleton, spelling, written

log = logging.getLogger("vitrail")

__all__ = ["NAME", "read", "recognise", "reference", "write"]

NAME = "timm"

LEFT = (
    (r"\.relative_position_index$", "an index that follows from the size"),
    (r"^(mask_token|lm_head\.\w+)$", "of the pre-training"),
    (r"^pre_logits\.", "timm leaves the pre-training head's hidden layer out"),
    (r"\.k_bias$", "zero by construction"),
)
"""names that timm's own loading ignores, and why"""

OWN = re.compile(
    r"^(cls_token|dist_token|reg_token|pos_embed|rope\.freqs)$"
    r"|^(norm|norm_pre|fc_norm|head|head\.fc|head_dist|pre_logits\.fc)\.(weight|bias)$"
    r"|^(patch_embed|attn_pool|neck|rel_pos_bias)\."
    r"|^blocks\.\d+\.(norm[12]|attn|mlp|ls[12]?|gamma_[12]|in_norm|in_proj|mlp_bias|q_norm|k_norm|sub_norm|lambda_\w+"
    r"|attn_out_proj|mlp_out_proj|out_proj|attns|ffns)(\.|$)"
)
"""names of timm's bare state dicts"""


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
    return all(OWN.match(name) or not name.startswith(("blocks.", "patch_embed.")) for name in _used(files))


def read(files: Files) -> Found:
    """The model, its classes, and its preprocessing."""
    notes: list[str] = []
    name, given, settings = _named(files, notes)
    values: Arguments = table()[name] | {"in_chans": _channels(files)} | given
    if "config.json" not in files.json:
        # timm interpolates FlexiViT's and RADIO's positions specially when it creates them as pretrained, but never for
        # a bare state dict, which may be of another model.
        values = values | {"resizing": None}
    images = values["images"] | {k: v for k, v in settings.items() if v is not None and k in values["images"]}
    size = _size(values, given, images)
    encoder = encoder_config(values, _fitting(files, values, size, notes))
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
        return *_guess(files, notes), {}
    # Older folders have no nested level.
    labels = {key: config[key] for key in ("label_names", "label_descriptions", "problem_type") if key in config}
    return config["architecture"], config.get("model_args") or {}, (config.get("pretrained_cfg") or config) | labels


def _used(files: Files) -> Iterator[str]:
    return (name for name in files.weights if not any(re.search(pattern, name) for pattern, _ in LEFT[:1] + LEFT[3:]))


def _channels(files: Files) -> int:
    first = next((n for n in FIRST if n in files.shapes), None)
    if first is None or len(files.shapes[first]) != 4:
        raise UserError(
            f"{files.path} has no patch projection such as {FIRST[0]}: it is not a ViT of timm, or truncated"
        )
    return files.shapes[first][1]


FIRST = (
    "patch_embed.backbone.stem.conv.weight",
    "patch_embed.backbone.conv.weight",
    "patch_embed.backbone.conv1.0.weight",
    "patch_embed.backbone.0.conv.weight",
    "patch_embed.proj.weight",
)
"""the first convolution: of a backbone, or the patch projection"""


def _size(values: Arguments, given: Arguments, images: Arguments) -> tuple[int, int]:
    """(height, width) as in timm: from the arguments, or from the checkpoint if its size is fixed."""
    size = given.get("img_size") or values.get("img_size")
    if size is None or (images["fixed_input_size"] and "img_size" not in given):
        size = images["input_size"][-2:]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _fitting(files: Files, values: Arguments, size: tuple[int, int], notes: list[str]) -> tuple[int, int]:
    """`size`, or the size of the learned positions if the two differ."""
    shape = files.shapes.get("pos_embed")
    if shape is None:
        return size
    config = encoder_config(values, size)
    if len(shape) == 4:
        grid = (shape[1], shape[2])
    elif (count := shape[1] - config.placed_tokens) == math.prod(config.grid):
        return size
    elif (side := math.isqrt(max(count, 0))) ** 2 == count > 0:
        grid = (side, side)
    else:
        raise UserError(
            f"{files.path}: pos_embed is for {count} patches, which do not form a square, but images of "
            f"{size[0]}x{size[1]} have {math.prod(config.grid)}: give img_size in model_args"
        )
    found = (grid[0] * config.patch, grid[1] * config.patch)
    if grid != config.grid:
        notes.append(f"the positions are for {found[0]}x{found[1]} pixels, and so is the model")
    return found if grid != config.grid else size


def _outputs(files: Files) -> int | None:
    """The number of the head's outputs; None without a head."""
    shape = files.shapes.get("head.weight") or files.shapes.get("head.fc.weight")
    return shape[0] if shape else None


def _classes(files: Files, settings: dict[str, Any], notes: list[str]) -> list[str] | None:
    count = _outputs(files)
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


def _guess(files: Files, notes: list[str]) -> tuple[str, Arguments]:
    """The architecture whose weights have these names and shapes, or a plain one inferred from the shapes."""
    fitting: dict[str, VariantConfig] = {}
    fits = cache(lambda config, kind: _fits(files, config, kind))  # many names are the same architecture
    for name in sorted(table(), key=_plainness):
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
    depth = _depth(files)
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


def _plainness(name: str) -> tuple[bool, int, str]:
    """Plain ViTs first, then architectures with fewer arguments."""
    values = table()[name]
    return not name.startswith("vit_"), len([k for k in values if k != "images"]), name


def _depth(files: Files) -> int:
    blocks = [int(name.split(".")[1]) for name in files.weights if re.match(r"blocks\.\d+\.", name)]
    return max(blocks, default=-1) + 1


def _candidate(files: Files, values: Arguments) -> VariantConfig | None:
    """The config with these arguments, if it has the width and depth of the file."""
    shape = files.shapes.get("patch_embed.proj.weight") or files.shapes.get("patch_embed.backbone.2.conv.weight")
    if shape is None or len(shape) != 4 or values.get("embed_dim", 768) != shape[0]:
        return None
    if values.get("depth", 12) != _depth(files):
        return None
    try:
        values = values | {"in_chans": _channels(files)}
        return encoder_config(values, _fitting(files, values, _size(values, {}, values["images"]), []))
    except UserError:
        return None


def _fits(files: Files, config: VariantConfig, kind: str) -> bool:
    """Whether a model of timm's class `kind` with this config has just the names and shapes of the file."""
    classes = _outputs(files)
    one = _first_block(config)
    there = {name for name in _used(files) if OWN.match(name) and not re.match(r"blocks\.[1-9]", name)}
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


def write(task: Task, folder: Path) -> None:
    """`config.json` and `model.safetensors`, for `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub.

    Raises:
        UserError: the model has a module that no architecture of timm has; the message names it.
    """
    encoder = task.encoder
    if not task.portable or not isinstance(encoder, ViT):
        raise UserError(f"timm has no model for the task {task.name}: convert a classifier or an encoder")
    outputs = task.outputs
    if task.hidden is not None:
        raise no_hidden_layer("timm", task.hidden)
    own = as_variant(encoder.config)
    name, given = closest(own)
    if own.positions == "learned" and own.resampling != "antialias":
        log.warning("%s: for images of another size, timm interpolates positions differently", folder)
    values = table()[name] | given
    kind = values["class"]
    entries = spelling(own, kind, _apart(values), len(outputs))
    state = task.state_dict()
    weights = {key: value.contiguous().cpu() for key, value in written(entries, state).items()}
    preprocess = task.preprocess
    config = {
        "architecture": name,
        "num_classes": len(outputs),
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
            "num_classes": len(outputs),
            "classifier": "head.fc" if kind == "VisionTransformerSAM" else "head",
        },
        **({"label_names": outputs} if outputs else {}),
        **problem_in(task),
    }
    with whole_folder(folder) as place:
        write_whole(place / "model.safetensors", to_safetensors(weights, metadata={"format": "pt"}))
        write_whole(place / "config.json", json.dumps(config, indent=2) + "\n")


IGNORED: dict[str, Any] = {"drop_path": 0.0, "dropout": 0.0, "stem_blocks": 0}
"""fields for training only, and the field of a stem, which is compared itself"""
OTHER_SIZES: dict[str, Any] = {"resampling": "antialias", "resizing": None, "relative_resampling": "geometric"}
OTHER_SIZES |= {"floor_grid": True}
"""fields for other sizes than the model's own, where timm differs"""


def closest(config: VariantConfig) -> tuple[str, Arguments]:
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
    return values.get("resizing") != config.resizing, -equal, size != config.image_size, _plainness(name)


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
