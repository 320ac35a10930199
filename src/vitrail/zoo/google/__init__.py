"""Google's `.npz` files: the paper's own models, AugReg's and the hybrids, and big_vision's with SigLIP's image tower.

Both are flattened JAX parameters with `/` in the names. The paper's code once numbered the layers of a block together
(`LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`), and its published files keep that; with
flax's linen it numbers each kind separately, as big_vision does. The names of the positions distinguish the two.

Kernels are [in, out], attention's are [D, heads, d], and convolutions are [height, width, in, out]. The code uses the
tanh approximation of GELU and norms with epsilon 1e-6.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.variants import VariantConfig
from vitrail.zoo.entries import average_rank
from vitrail.zoo.google.table import BIG_VISION, PAPER, PAPER_LINEN, Names, renaming_table
from vitrail.zoo.google.writing import write
from vitrail.zoo.renames import class_names
from vitrail.zoo.source import Files, Found

__all__ = ["NAME", "read", "recognise", "write"]

NAME = "google"

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
    table = renaming_table(config, names, shapes, hidden, classes is not None)
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
