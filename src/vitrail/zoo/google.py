"""Google's `.npz` files: the paper's own models, AugReg's and the hybrids, and big_vision's with SigLIP's image tower.

Both are JAX's parameters, flat, with `/` in the names. Kernels stand as [in, out], attention's as [D, heads, d], and
convolutions as [height, width, in, out]. The code beside them has GELU's tanh form and norms with epsilon 1e-6.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.files import write_whole
from vitrail.tasks.classify import Classify
from vitrail.tasks.embed import Embed
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig, as_variant
from vitrail.vit import ViT, ViTConfig
from vitrail.zoo.source import Files, Found, Weight

NAME = "google"


@dataclass(frozen=True)
class Names:
    """What the two code bases call the parts of a block."""

    title: str
    norm1: str
    norm2: str
    attention: str
    mlp: str
    positions: str


PAPER = Names(
    "Google's",
    "LayerNorm_0",
    "LayerNorm_2",
    "MultiHeadDotProductAttention_1",
    "MlpBlock_3",
    "Transformer/posembed_input/pos_embedding",
)
BIG_VISION = Names(
    "big_vision's", "LayerNorm_0", "LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0", "pos_embedding"
)

PREFIXES = ("", "params/", "params/img/", "img/", "opt/target/", "target/")
"""where the image model's parameters stand; `img` in files with two towers"""
LEFT = (
    (r"^(params/)?txt/", "the text tower: vitrail loads the image tower"),
    (r"^(params/)?[tb]$", "temperature or bias of the loss between pictures and texts"),
    (r"^opt/(?!target/)|^opt_state|^step$", "the optimizer's"),
    (r"^(chrono|state)(/|$)", "the training loop's"),
)


def recognise(files: Files) -> bool:
    """The kernel that embeds patches, under one of the prefixes."""
    return _prefix(files.shapes) is not None


def read(files: Files) -> Found:
    """The config from names and shapes alone: these files hold nothing else."""
    prefix = _prefix(files.shapes)
    assert prefix is not None
    shapes = {n.removeprefix(prefix): s for n, s in files.shapes.items() if n.startswith(prefix)}
    names = BIG_VISION if any("/LayerNorm_1/" in name for name in shapes if name.startswith("Transformer")) else PAPER
    config, notes = _config(files, shapes, names)
    classes, hidden = None, None
    if "head/kernel" in shapes and config.projection is None:
        classes = [str(i) for i in range(shapes["head/kernel"][1])]
        hidden = shapes["pre_logits/kernel"][1] if "pre_logits/kernel" in shapes else None
    table = _table(config, names, shapes, hidden, classes is not None)
    weights = {name: weight._replace(names=tuple(prefix + n for n in weight.names)) for name, weight in table.items()}
    left = {n: why for n in files.shapes for pattern, why in LEFT if re.search(pattern, n)}
    for name in files.shapes.keys() - {n for weight in weights.values() for n in weight.names}:
        if classes is None and name.startswith(f"{prefix}pre_logits/"):
            left[name] = "the pre-training head's first half, without the second"
    kind = f"{names.title} .npz" + (", two towers" if prefix.endswith("img/") else "")
    # Both code bases evaluate on pictures of -1 to 1; the file itself says nothing.
    half = (0.5,) * config.channels
    preprocess = Preprocess(config.image_size, "squash", 1.0, "bilinear", mean=half, std=half, channels=config.channels)
    notes.append(
        "the file has no preprocessing: pictures squashed to the size, mean and std 0.5, as Google's code does"
    )
    return Found(kind, config, classes, preprocess, weights, left, hidden, notes)


def _prefix(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for prefix in PREFIXES:
        if (
            len(shapes.get(f"{prefix}embedding/kernel", ())) == 4
            and f"{prefix}Transformer/encoder_norm/scale" in shapes
        ):
            return prefix
    return None


def _config(files: Files, shapes: dict[str, tuple[int, ...]], names: Names) -> tuple[VariantConfig, list[str]]:
    side, side2, channels, width = shapes["embedding/kernel"]
    if side != side2:
        raise UserError(f"{files.path} has patches of {side}x{side2}: vitrail's are square")
    stages = _stages(shapes)
    patch = side
    if stages is not None:
        # The root divides by 4, each stage but the first by 2.
        channels, patch = shapes["conv_root/kernel"][2], side * 4 * 2 ** max(0, len(stages) - 1)
    stacked = "Transformer/encoderblock/" in " ".join(shapes)
    block = "Transformer/encoderblock" if stacked else "Transformer/encoderblock_0"
    query = shapes[f"{block}/{names.attention}/query/kernel"][-3:]
    hidden = shapes[f"{block}/{names.mlp}/Dense_0/kernel"][-1]
    if stacked:
        depth = shapes[f"{block}/{names.norm1}/scale"][0]
    else:
        depth = len({name.split("/")[1] for name in shapes if name.startswith("Transformer/encoderblock_")})
    notes: list[str] = []
    token = "cls" in shapes
    image_size = _image_size(files, shapes, names, patch, token, notes)
    ratio = hidden / width
    config = VariantConfig(
        # The original adds positions to the class token too, big_vision before it joins them.
        prefix_positions="class" if names is PAPER or not token else "none",
        resampling="corners",
        mlp_hidden=None if int(width * ratio) == hidden else hidden,
        **_backbone(stages),
        **_map_head(shapes, query[1], hidden),
        **_projection(files, shapes),
        width=width,
        depth=depth,
        heads=query[1],
        patch=patch,
        image_size=image_size,
        channels=channels,
        mlp_ratio=ratio,
        class_token=token,
        pool="token" if token else "attention" if "MAPHead_0/probe" in shapes else "average",
        positions="learned" if names.positions in shapes else "sine",
        activation="gelu_tanh",
        norm_eps=1e-6,
    )
    return config, notes


def _projection(files: Files, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """In a file of two towers the head leads into the space that pictures share with words."""
    if "head/kernel" not in shapes or not (_prefix(files.shapes) or "").endswith("img/"):
        return {}
    return {"projection": shapes["head/kernel"][1], "projection_bias": True}


def _stages(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """A hybrid's units in each stage; none where the root is all, None without a ResNet."""
    if "conv_root/kernel" not in shapes:
        return None
    units = {match.groups() for name in shapes if (match := re.match(r"block(\d+)/unit(\d+)/", name))}
    stages = {stage for stage, _ in units}
    return tuple(sum(stage == str(i + 1) for stage, _ in units) for i in range(len(stages)))


def _backbone(stages: tuple[int, ...] | None) -> dict[str, Any]:
    if stages is None:
        return {}
    return {
        "backbone": "resnetv2",
        "backbone_layers": stages,
        "backbone_eps": 1e-6,
        "backbone_weight": "deviation",
        "backbone_weight_eps": 1e-5,
    }


def _map_head(shapes: dict[str, tuple[int, ...]], heads: int, hidden: int) -> dict[str, Any]:
    if "MAPHead_0/probe" not in shapes:
        return {}
    own_heads = shapes["MAPHead_0/MultiHeadDotProductAttention_0/query/kernel"][1]
    own_hidden = shapes["MAPHead_0/MlpBlock_0/Dense_0/kernel"][1]
    return {
        "pool_heads": None if own_heads == heads else own_heads,
        "pool_hidden": None if own_hidden == hidden else own_hidden,
    }


def _image_size(
    files: Files, shapes: dict[str, tuple[int, ...]], names: Names, patch: int, token: bool, notes: list[str]
) -> tuple[int, int]:
    if names.positions not in shapes:
        pixels = max(1, 224 // patch) * patch
        notes.append(f"fixed positions fit any size, and the file names none: {pixels} pixels are assumed")
        return pixels, pixels
    count = shapes[names.positions][1] - (names is PAPER and token)
    side = math.isqrt(count)
    if side * side != count or side == 0:
        raise UserError(f"{files.path} has positions for {count} patches, which make no square: its size is unknown")
    return side * patch, side * patch


def _table(
    config: VariantConfig, names: Names, shapes: Mapping[str, tuple[int, ...]], hidden: int | None, head: bool
) -> dict[str, Weight]:
    """The renaming table, without the prefix; reading and writing share it."""
    table = {
        "encoder.patches.projection.weight": _conv("embedding/kernel"),
        "encoder.patches.projection.bias": Weight(("embedding/bias",)),
        **_norm("encoder.norm", "Transformer/encoder_norm"),
    }
    if config.class_token:
        table["encoder.class_token"] = Weight(("cls",))
    if config.positions == "learned":
        table["encoder.positions"] = Weight((names.positions,))
    if config.backbone == "resnetv2":
        table |= _resnet(config.backbone_layers)
    stacked = any(name.startswith("Transformer/encoderblock/") for name in shapes)
    for i in range(config.depth):
        block = _block(f"encoder.blocks.{i}", f"Transformer/encoderblock{'' if stacked else f'_{i}'}", names)
        table |= {n: _layer(weight, i) for n, weight in block.items()} if stacked else block
    if config.pool == "attention":
        pool = "MAPHead_0/"
        table["encoder.pooling.probe"] = Weight((f"{pool}probe",))
        table |= _attention("encoder.pooling.attention", f"{pool}MultiHeadDotProductAttention_0")
        table |= _norm("encoder.pooling.norm", f"{pool}LayerNorm_0")
        table |= _mlp("encoder.pooling.mlp", f"{pool}MlpBlock_0")
    if hidden:
        table |= _linear("head.hidden.0", "pre_logits")
    if head:
        table |= _linear("head.linear", "head")
    elif config.projection:
        table |= _linear("encoder.projection", "head")
    return table


def _block(own: str, theirs: str, names: Names) -> dict[str, Weight]:
    return {
        **_norm(f"{own}.norm1", f"{theirs}/{names.norm1}"),
        **_attention(f"{own}.attention", f"{theirs}/{names.attention}"),
        **_norm(f"{own}.norm2", f"{theirs}/{names.norm2}"),
        **_mlp(f"{own}.mlp", f"{theirs}/{names.mlp}"),
    }


def _attention(own: str, theirs: str) -> dict[str, Weight]:
    parts = [f"{theirs}/{part}" for part in ("query", "key", "value")]
    return {
        f"{own}.qkv.weight": Weight(tuple(f"{p}/kernel" for p in parts), _join_kernels, "joined and transposed"),
        f"{own}.qkv.bias": Weight(tuple(f"{p}/bias" for p in parts), _join_biases, "joined"),
        f"{own}.out.weight": Weight((f"{theirs}/out/kernel",), _out_kernel, "transposed"),
        f"{own}.out.bias": Weight((f"{theirs}/out/bias",)),
    }


def _mlp(own: str, theirs: str) -> dict[str, Weight]:
    return {**_linear(f"{own}.up", f"{theirs}/Dense_0"), **_linear(f"{own}.down", f"{theirs}/Dense_1")}


def _resnet(stages: tuple[int, ...]) -> dict[str, Weight]:
    """Section 3.1's ResNet; its group norms have [C], or [1, 1, 1, C] in the oldest files."""
    stem = "encoder.patches.stem"
    table = {f"{stem}.root.0.conv.weight": _conv("conv_root/kernel"), **_group_norm(f"{stem}.root.0.norm", "gn_root")}
    for i, units in enumerate(stages):
        for j in range(units):
            own, theirs = f"{stem}.stages.{i}.{j}", f"block{i + 1}/unit{j + 1}"
            for k in (1, 2, 3):
                table[f"{own}.conv{k}.weight"] = _conv(f"{theirs}/conv{k}/kernel")
                table |= _group_norm(f"{own}.norm{k}", f"{theirs}/gn{k}")
            if j == 0:
                table[f"{own}.shortcut.conv.weight"] = _conv(f"{theirs}/conv_proj/kernel")
                table |= _group_norm(f"{own}.shortcut.norm", f"{theirs}/gn_proj")
    return table


def _linear(own: str, theirs: str) -> dict[str, Weight]:
    return {
        f"{own}.weight": Weight((f"{theirs}/kernel",), torch.t, "transposed"),
        f"{own}.bias": Weight((f"{theirs}/bias",)),
    }


def _norm(own: str, theirs: str) -> dict[str, Weight]:
    return {f"{own}.weight": Weight((f"{theirs}/scale",)), f"{own}.bias": Weight((f"{theirs}/bias",))}


def _group_norm(own: str, theirs: str) -> dict[str, Weight]:
    return {name: weight._replace(make=torch.flatten) for name, weight in _norm(own, theirs).items()}


def _conv(theirs: str) -> Weight:
    return Weight((theirs,), _conv_kernel, "transposed")


def _conv_kernel(kernel: Tensor) -> Tensor:
    """[h, w, in, out] to [out, in, h, w]."""
    return kernel.permute(3, 2, 0, 1)


def _join_kernels(*kernels: Tensor) -> Tensor:
    """Three [D, heads, d] to [3D, D]."""
    return torch.cat([kernel.flatten(1).t() for kernel in kernels])


def _join_biases(*biases: Tensor) -> Tensor:
    """Three [heads, d] to [3D]."""
    return torch.cat([bias.flatten() for bias in biases])


def _out_kernel(kernel: Tensor) -> Tensor:
    """[heads, d, D] to [D, D]."""
    return kernel.flatten(0, 1).t()


def _layer(weight: Weight, i: int) -> Weight:
    """One layer of parameters that stand stacked in one array, as `scan` keeps them."""
    make = weight.make

    def take(*stacks: Tensor) -> Tensor:
        layers = [stack[i] for stack in stacks]
        return make(*layers) if make else layers[0]

    return Weight(weight.names, take, f"{weight.change} and taken from a stack".removeprefix(" and "))


# Out again


def write(task: Task, path: Path) -> None:
    """Write the file `path`, or `model.npz` in the folder `path`; one that Google's code cannot express is refused."""
    encoder = getattr(task, "encoder", None)
    if not isinstance(encoder, ViT) or not isinstance(task, Classify | Embed):
        raise UserError(f"Google's .npz cannot hold the task {task.name}: it holds a ViT with a head or without")
    config = as_variant(encoder.config)
    names = _names_for(config)
    hidden = task.hidden if isinstance(task, Classify) else None
    table = _table(config, names, {}, hidden, isinstance(task, Classify))
    state = task.state_dict()
    arrays: dict[str, np.ndarray] = {}
    prefix = "" if names is PAPER else "params/img/" if config.projection else "params/"
    for name, weight in table.items():
        for theirs, value in zip(weight.names, _split(weight, state[name], config, name), strict=True):
            arrays[prefix + theirs] = np.ascontiguousarray(value.detach().cpu().float().numpy())
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    write_whole(path if path.suffix == ".npz" else path / "model.npz", packed.getvalue())


def _split(weight: Weight, value: Tensor, config: VariantConfig, name: str) -> list[Tensor]:
    """The inverse of `weight.make`."""
    heads = config.pool_heads or config.heads if name.startswith("encoder.pooling") else config.heads
    if weight.make is _join_kernels:
        return [part.t().unflatten(1, (heads, -1)) for part in value.chunk(3)]
    if weight.make is _join_biases:
        return [part.unflatten(0, (heads, -1)) for part in value.chunk(3)]
    if weight.make is _out_kernel:
        return [value.t().unflatten(0, (heads, -1))]
    if weight.make is _conv_kernel:
        return [value.permute(2, 3, 1, 0)]
    return [value.t()] if weight.make is torch.t else [value]


def _names_for(config: VariantConfig) -> Names:
    """Which code base has such a model; a part that neither has is named."""
    hybrid = config.backbone == "resnetv2"
    newer = config.pool == "attention" or config.positions == "sine" or config.projection is not None
    newer = newer or (config.class_token and config.prefix_positions == "none")
    if hybrid and newer:
        raise UserError(
            "Google's .npz cannot hold a hybrid with attention pooling, a projection, or other positions than learned "
            "ones on all tokens: its code has no such model"
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
        "class_token": config.pool == "token",
    }
    for name, want in wants.items():
        if getattr(config, name) != want:
            raise UserError(f"Google's .npz cannot hold {name}={getattr(config, name)!r}: its code has {want!r} alone")
    if config.pool not in ("token", "average", "attention") or config.positions == "none":
        part = f"pool={config.pool!r}" if config.positions != "none" else "positions='none'"
        raise UserError(f"Google's .npz cannot hold {part}: its code has no such model")
    free = {entry.name for entry in fields(ViTConfig)} | {
        "mlp_hidden",
        "resampling",
        "pool_heads",
        "pool_hidden",
        "projection",
    }
    same: dict[str, object] = {
        "projection_bias": config.projection is not None,
        "prefix_positions": "none" if newer and config.class_token else "class",
    }
    if hybrid:
        free |= {"backbone", "backbone_layers"}
        same |= {"backbone_eps": 1e-6, "backbone_weight": "deviation", "backbone_weight_eps": 1e-5}
    for entry in fields(VariantConfig):
        want = same.get(entry.name, entry.default)
        if entry.name not in free | wants.keys() and getattr(config, entry.name) != want:
            raise UserError(
                f"Google's .npz cannot hold {entry.name}={getattr(config, entry.name)!r}: its code has {want!r} alone"
            )
    return names
