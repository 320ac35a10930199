"""Google's `.npz` files: the paper's own models, AugReg's and the hybrids, and big_vision's with SigLIP's image tower.

Both are flattened JAX parameters with `/` in the names. The paper's code once numbered the layers of a block together
(`LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`), and its published files keep that; with
flax's linen it numbers each kind separately, as big_vision does. The names of the positions distinguish the two.

Kernels are [in, out], attention's are [D, heads, d], and convolutions are [height, width, in, out]. The code uses the
tanh approximation of GELU and norms with epsilon 1e-6.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.files import write_whole
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig, as_variant
from vitrail.vit import ViT, ViTConfig
from vitrail.zoo.entries import average_rank
from vitrail.zoo.problem import problem_in
from vitrail.zoo.refusals import KEPT, no_place
from vitrail.zoo.renames import class_names
from vitrail.zoo.source import Files, Found, Weight

log = logging.getLogger("vitrail")

NAME = "google"


@dataclass(frozen=True)
class Names:
    """The names of a block's modules in a code base."""

    title: str
    positions: str
    norm1: str = "LayerNorm_0"
    norm2: str = "LayerNorm_1"
    attention: str = "MultiHeadDotProductAttention_0"
    mlp: str = "MlpBlock_0"

    @property
    def papers(self) -> bool:
        """Whether it is the paper's code, which also adds positions to the class token."""
        return self.title == "Google's"


PAPER = Names(
    "Google's",
    "Transformer/posembed_input/pos_embedding",
    norm2="LayerNorm_2",
    attention="MultiHeadDotProductAttention_1",
    mlp="MlpBlock_3",
)
PAPER_LINEN = Names("Google's", PAPER.positions)
BIG_VISION = Names("big_vision's", "pos_embedding")

KERNEL, NORM = "embedding/kernel", "Transformer/encoder_norm/scale"
"""names in every model"""
OPTIMIZER = r"(^|/)(opt|opt_state|optimizer)/(?!target/)"
LEFT = (
    (r"(^|/)txt/", "the text tower: vitrail loads the image tower"),
    (r"(^|/)[tb]$", "temperature or bias of the loss between images and texts"),
    (rf"{OPTIMIZER}|(^|/)step$", "state of the optimizer"),
    (r"^(chrono|state)(/|$)", "state of the training loop"),
)


def recognise(files: Files) -> bool:
    """The kernel that embeds patches, under one of the prefixes."""
    return _prefix(files.shapes) is not None


def read(files: Files) -> Found:
    """The config from names and shapes, because these files hold nothing else."""
    prefix = _prefix(files.shapes)
    assert prefix is not None
    shapes = {n.removeprefix(prefix): s for n, s in files.shapes.items() if n.startswith(prefix)}
    names = _names_of(shapes)
    config, notes = _config(files, shapes, names)
    classes, hidden = None, None
    if "head/kernel" in shapes and config.projection is None:
        classes = class_names(shapes["head/kernel"][1], notes)
        hidden = shapes["pre_logits/kernel"][1] if "pre_logits/kernel" in shapes else None
    table = _table(config, names, shapes, hidden, classes is not None)
    weights = {name: weight._replace(names=tuple(prefix + n for n in weight.names)) for name, weight in table.items()}
    left: dict[str, str] = {}
    copies = tuple(place for place in _prefixes(files.shapes) if place != prefix and not prefix.startswith(place))
    for name in files.shapes.keys() - {n for weight in weights.values() for n in weight.names}:
        if classes is None and name.startswith(f"{prefix}pre_logits/"):
            left[name] = "only the first layer of the pre-training head"
        elif copies and name.startswith(copies):
            left[name] = f"the parameters under {prefix!r} are used"
        elif why := next((why for pattern, why in LEFT if re.search(pattern, name)), None):
            left[name] = why
    kind = f"{names.title} .npz" + (", two towers" if prefix.endswith("img/") else "")
    # Both code bases evaluate on images in [-1, 1]; the file does not say it.
    half = (0.5,) * config.channels
    preprocess = Preprocess(config.image_size, "squash", 1.0, "bilinear", mean=half, std=half, channels=config.channels)
    notes.append("the file has no preprocessing: using that of Google's code (squash to the size, mean and std 0.5)")
    return Found(kind, config, classes, preprocess, weights, left, hidden, notes)


def _prefixes(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Prefixes of image models, such as `params/`, `opt/target/` or `params/img/`.

    The optimizer's moments, which have the same names, are excluded. Averages come first, then the outermost.
    """
    found = [name.removesuffix(NORM) for name in shapes if name == NORM or name.endswith(f"/{NORM}")]
    places = [p for p in found if len(shapes.get(p + KERNEL, ())) == 4 and not re.search(OPTIMIZER, p)]
    return sorted(places, key=lambda place: (average_rank(place.replace("/", ".")), place.count("/"), place))


def _prefix(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return next(iter(_prefixes(shapes)), None)


def _names_of(shapes: Mapping[str, tuple[int, ...]]) -> Names:
    """The code base of a file. The paper's has its own names of positions, numbering, or a ResNet stem."""
    linen = any("/LayerNorm_1/" in name for name in shapes if name.startswith("Transformer/"))
    if not linen:
        return PAPER
    return PAPER_LINEN if PAPER.positions in shapes or "conv_root/kernel" in shapes else BIG_VISION


def _config(files: Files, shapes: dict[str, tuple[int, ...]], names: Names) -> tuple[VariantConfig, list[str]]:
    side, side2, channels, width = shapes["embedding/kernel"]
    if side != side2:
        raise UserError(f"{files.path} has patches of {side}x{side2}: vitrail supports only square patches")
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
        # The original adds positions to the class token too; big_vision adds them before concatenating it.
        prefix_positions="class" if names.papers or not token else "none",
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
        positions="learned" if names.positions in shapes else "none" if names.papers else "sine",
        activation="gelu_tanh",
        norm_eps=1e-6,
    )
    return config, notes


def _projection(files: Files, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """In a file of two towers the head projects to the joint space of images and text."""
    if "head/kernel" not in shapes or not (_prefix(files.shapes) or "").endswith("img/"):
        return {}
    return {"projection": shapes["head/kernel"][1], "projection_bias": True}


def _stages(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The number of units in each stage of a hybrid; empty for only a root, None without a ResNet."""
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
        kind = "a model without positions works for" if names.papers else "big_vision's fixed positions work for"
        notes.append(f"the file has no learned positions; {kind} any size, and {pixels} pixels are assumed")
        return pixels, pixels
    count = shapes[names.positions][1] - (names.papers and token)
    side = math.isqrt(count)
    if side * side != count or side == 0:
        raise UserError(
            f"{files.path} has positions for {count} patches, which do not form a square: its size is unknown"
        )
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
    names = [f"{theirs}/{name}" for name in ("query", "key", "value")]
    return {
        f"{own}.qkv.weight": Weight(tuple(f"{p}/kernel" for p in names), _join_kernels, "joined and transposed"),
        f"{own}.qkv.bias": Weight(tuple(f"{p}/bias" for p in names), _join_biases, "joined"),
        f"{own}.out.weight": Weight((f"{theirs}/out/kernel",), _out_kernel, "transposed"),
        f"{own}.out.bias": Weight((f"{theirs}/out/bias",)),
    }


def _mlp(own: str, theirs: str) -> dict[str, Weight]:
    return {**_linear(f"{own}.up", f"{theirs}/Dense_0"), **_linear(f"{own}.down", f"{theirs}/Dense_1")}


def _resnet(stages: tuple[int, ...]) -> dict[str, Weight]:
    """Section 3.1's ResNet; its group norms are [C], or [1, 1, 1, C] in the oldest files."""
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
    """One layer of parameters that are stacked in one array, as by `scan`."""
    make = weight.make

    def take(*stacks: Tensor) -> Tensor:
        layers = [stack[i] for stack in stacks]
        return make(*layers) if make else layers[0]

    return Weight(weight.names, take, f"{weight.change} and taken from a stacked array".removeprefix(" and "))


# Writing


def write(task: Task, path: Path) -> None:
    """Write the file `path`, or `model.npz` in the folder `path`. UserError for models that Google's code lacks."""
    encoder = task.encoder
    if not isinstance(encoder, ViT) or not task.portable:
        raise UserError(f"Google's .npz cannot store the task {task.name}: it holds a ViT with a head or without")
    problem = problem_in(task).get("problem_type")
    if problem == "regression":
        raise UserError(
            f"Google's .npz cannot store that a head's outputs are values, and would be read as a classifier: {KEPT}"
        )
    if problem == "multi_label_classification":
        log.warning("an .npz cannot store that each class has its own probability: it will be read as single-label")
    config = as_variant(encoder.config)
    names = _names_for(config, bool(task.outputs))
    table = _table(config, names, {}, task.hidden, bool(task.outputs))
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
        return [matrix.t().unflatten(1, (heads, -1)) for matrix in value.chunk(3)]
    if weight.make is _join_biases:
        return [bias.unflatten(0, (heads, -1)) for bias in value.chunk(3)]
    if weight.make is _out_kernel:
        return [value.t().unflatten(0, (heads, -1))]
    if weight.make is _conv_kernel:
        return [value.permute(2, 3, 1, 0)]
    return [value.t()] if weight.make is torch.t else [value]


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
