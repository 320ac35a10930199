"""Write the meaning of timm's architecture names, from timm's code, to src/vitrail/zoo/timm/models.json.

    python bench/timm_models.py

An entry has the class that timm builds, its arguments, and the preprocessing if a checkpoint does not contain it.
Defaults (of the class, or in `IMAGES`) are left out. Only this file is needed to read a checkpoint. With
`--results DIR` the table is written to DIR/timm-models.json, with timm's version, and the package's file does not
change; `--tiny` does this with the names of one module.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import timm
from harness import RESULTS, ROOT, Parser, Row, record
from timm.models import beit, deit, eva, vision_transformer, vision_transformer_hybrid, vision_transformer_sam
from torch import nn

from vitrail.files import write_atomic

MODULES = (vision_transformer, deit, beit, vision_transformer_hybrid, vision_transformer_sam, eva)
OUT = ROOT / "src" / "vitrail" / "zoo" / "timm" / "models.json"
LEFT_OUT = {"feature_cfg", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
"""arguments of timm's builder, and some that do not affect a model's output"""
LEFT_OUT |= {"rope_rescale_coords", "dynamic_img_size", "block_fn", "embed_layer", "pretrained_strict"}
IMAGES = {
    "input_size": [3, 224, 224],
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
"""preprocessing of most names"""
BLOCKS = {
    "ResPostBlock": {"block": "post"},
    "ParallelScalingBlock": {"block": "joint"},
    "DiffParallelScalingBlock": {"block": "joint_fused", "attn_layer": "diff"},
    "ParallelThingsBlock": {"block": "parallel"},
}
BACKBONES = {
    # ResNet-D: the number of blocks in each used stage.
    "vit_small_resnet26d_224": [2, 2, 2, 2],
    "vit_small_resnet50d_s16_224": [3, 4, 6],
    "vit_base_resnet26d_224": [2, 2, 2, 2],
    "vit_base_resnet50d_224": [3, 4, 6, 3],
}


class Built(Exception):
    """Raised instead of building a model."""


def parser() -> Parser:
    parser = Parser(__doc__, modules=[deit])
    parser.set_defaults(modules=MODULES)
    return parser


def main() -> None:
    args = parser().parse_args()
    table = table_of(args.modules)
    known = table["deit_tiny_patch16_224"]
    assert (known["class"], known["embed_dim"], known["num_heads"]) == ("VisionTransformer", 192, 3), known
    if args.results != RESULTS:
        record("timm-models", {"timm": timm.__version__, "models": table}, args.results)
        return
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(table[name], sort_keys=True)}" for name in sorted(table))
    write_atomic(OUT, "{\n" + lines + "\n}\n")


def table_of(modules: Sequence[ModuleType]) -> dict[str, Row]:
    """The entry of each name, and under "" the preprocessing of most names."""
    calls: list[tuple[type[nn.Module], Row]] = []

    def note(kind: type[nn.Module], name: str, pretrained: bool, **arguments: Any) -> None:
        calls.append((kind, arguments))
        raise Built

    table: dict[str, Row] = {"": {"images": IMAGES}}
    for module in modules:
        original = module.build_model_with_cfg
        module.build_model_with_cfg = note  # type: ignore[attr-defined]
        try:
            for name in timm.list_models(module=module.__name__.rsplit(".", 1)[-1]):
                try:
                    timm.create_model(name)
                except Built:
                    table[name] = entry(name, *calls.pop())
        finally:
            module.build_model_with_cfg = original  # type: ignore[attr-defined]
    return table


def entry(name: str, kind: type[nn.Module], arguments: Row) -> Row:
    defaults = {p.name: p.default for k in reversed(kind.__mro__) for p in _parameters(k)}
    own: Row = {"class": kind.__name__}
    for key, value in arguments.items():
        if key == "block_fn":
            own |= BLOCKS[value.__name__]
        elif key == "pretrained_filter_fn":
            own |= resizing(value)
        elif key == "embed_layer":
            own |= backbone(name, value.keywords["backbone"])
        elif key not in LEFT_OUT and defaults.get(key, inspect.Parameter.empty) != value:
            own[key] = plain(value)
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    images = {key: plain(getattr(settings, key)) for key in IMAGES}
    own["images"] = {key: value for key, value in images.items() if value not in (None, IMAGES[key])}
    return own


def resizing(adapt: Any) -> Row:
    """How position embeddings are resized when weights are loaded, if not in the usual way."""
    options = getattr(adapt, "keywords", {})
    if options.get("interpolation", "bicubic") == "bicubic":
        return {}
    assert (options["interpolation"], options["antialias"]) == ("bilinear", False), options
    return {"resizing": "corners" if options.get("align_corners") else "bilinear"}


def backbone(name: str, module: Any) -> Row:
    """Type of the convolutional backbone, and the blocks (or widths) of each stage."""
    if name in BACKBONES:
        return {"backbone": "resnet", "backbone_layers": BACKBONES[name]}
    if type(module).__name__ == "ConvStem":
        widths = [layer.conv.out_channels for layer in module]
        return {"backbone": "conv", "backbone_layers": widths[:-1]}
    return {"backbone": "resnetv2", "backbone_layers": [len(stage.blocks) for stage in getattr(module, "stages", [])]}


def plain(value: Any) -> Any:
    """Classes by name, with their arguments."""
    if isinstance(value, functools.partial):
        return {"name": plain(value.func), **{k: plain(v) for k, v in value.keywords.items()}}
    if inspect.isclass(value):
        return value.__name__
    return list(value) if isinstance(value, tuple) else value


def _parameters(kind: type) -> list[inspect.Parameter]:
    own = kind.__dict__.get("__init__")
    return list(inspect.signature(own).parameters.values()) if own and issubclass(kind, nn.Module) else []


if __name__ == "__main__":
    main()
