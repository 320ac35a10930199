"""The published sizes by name, and some for small images."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches

from vitrail.errors import UserError
from vitrail.variants import as_variant
from vitrail.vit import ViTConfig

# Table 1 of the paper, the two smaller ones of DeiT (arXiv 2012.12877), and some for small images.
SIZES: dict[str, ViTConfig] = {
    "Ti/16": ViTConfig(192, 12, 3, 16),
    "S/16": ViTConfig(384, 12, 6, 16),
    "S/32": ViTConfig(384, 12, 6, 32),
    "B/16": ViTConfig(768, 12, 12, 16),
    "B/32": ViTConfig(768, 12, 12, 32),
    "L/16": ViTConfig(1024, 24, 16, 16),
    "L/32": ViTConfig(1024, 24, 16, 32),
    "H/14": ViTConfig(1280, 32, 16, 14),
    "nano/2": ViTConfig(64, 4, 4, 2, image_size=(8, 8)),
    "micro/4": ViTConfig(128, 6, 4, 4, image_size=(32, 32)),
    "mini/4": ViTConfig(192, 9, 3, 4, image_size=(32, 32)),
}


def config_for(size: str | ViTConfig, **changes: object) -> ViTConfig:
    """The config of a named size (`"S/16"`), with fields changed, also those of a variant.

    `image_size` may be one number, for a square. Raises UserError if there is no such size or field.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise UserError(f"no size {size!r}: choose from {', '.join(SIZES)}")
        size = SIZES[size]
    if isinstance(pixels := changes.get("image_size"), int):
        changes["image_size"] = (pixels, pixels)
    own = changes.keys() <= {entry.name for entry in fields(size)}
    if not own or changes.get("pool", "token") not in ("token", "average"):
        size = as_variant(size)
    names = [entry.name for entry in fields(size)]
    if unknown := [name for name in changes if name not in names]:
        near = get_close_matches(unknown[0], [*names, "classes"], n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(['classes', *names])}"
        raise UserError(f"no field {unknown[0]!r} of a model: {hint}")
    return replace(size, **changes)  # type: ignore[arg-type]
