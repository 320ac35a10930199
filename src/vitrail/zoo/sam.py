"""SAM's image encoder (arXiv 2304.02643), under its authors' names, alone or inside SAM, and transformers'.

It ends in a neck of two convolutions. Its tokens are the outputs of the neck, all of them patches without a prefix, and
its pooled vector is their mean. Windows and heads follow from the shapes of the relative positions.
"""

from __future__ import annotations

from typing import NamedTuple

from vitrail.data.preprocess import Preprocess, imagenet_statistics
from vitrail.errors import UserError
from vitrail.variants import VariantConfig
from vitrail.zoo.renames import blocks_in, linear, reshaped
from vitrail.zoo.source import Files, Found, Weight

NAME = "sam"


class Spelling(NamedTuple):
    """The names of the modules."""

    prefix: str
    patches: str = "patch_embed.proj"
    block: str = "blocks.{}."
    norm1: str = "norm1"
    norm2: str = "norm2"
    neck: tuple[str, str, str, str] = ("neck.0", "neck.1", "neck.2", "neck.3")

    def first(self) -> str:
        """A name that only SAM's checkpoints have."""
        return f"{self.prefix}{self.block.format(0)}mlp.lin1.weight"


TRANSFORMERS = Spelling(
    prefix="vision_encoder.",
    patches="patch_embed.projection",
    block="layers.{}.",
    norm1="layer_norm1",
    norm2="layer_norm2",
    neck=("neck.conv1", "neck.layer_norm1", "neck.conv2", "neck.layer_norm2"),
)
SPELLINGS = (Spelling("image_encoder."), Spelling(""), TRANSFORMERS, TRANSFORMERS._replace(prefix=""))


def recognise(files: Files) -> bool:
    """Whether one of the spellings matches."""
    return any(spelling.first() in files.weights for spelling in SPELLINGS)


def read(files: Files) -> Found:
    """The encoder, by the shapes of its weights."""
    s = next(spelling for spelling in SPELLINGS if spelling.first() in files.weights)
    config = _config(files, s)
    p, reason = s.prefix, "only the image encoder is read"
    t: dict[str, Weight] = {}
    linear(t, "encoder.patches.projection", f"{p}{s.patches}")
    t["encoder.positions"] = reshaped(f"{p}pos_embed", (1, -1, config.width))
    for i in range(config.depth):
        own, theirs = f"encoder.blocks.{i}.", p + s.block.format(i)
        linear(t, f"{own}norm1", theirs + s.norm1)
        linear(t, f"{own}norm2", theirs + s.norm2)
        linear(t, f"{own}attention.qkv", f"{theirs}attn.qkv", bias=config.qkv_bias)
        linear(t, f"{own}attention.out", f"{theirs}attn.proj")
        t[f"{own}attention.relative.rows"] = Weight((f"{theirs}attn.rel_pos_h",))
        t[f"{own}attention.relative.columns"] = Weight((f"{theirs}attn.rel_pos_w",))
        linear(t, f"{own}mlp.up", f"{theirs}mlp.lin1")
        linear(t, f"{own}mlp.down", f"{theirs}mlp.lin2")
    if config.neck is not None:
        for i, name in enumerate(s.neck):  # convolutions without a bias, each followed by a norm
            linear(t, f"encoder.neck.{i}", p + name, bias=bool(i % 2))
    mean, std = imagenet_statistics(config.channels)
    return Found(
        source="SAM's image encoder",
        encoder=config,
        classes=None,
        preprocess=Preprocess(config.image_size, "squash", 1.0, "bilinear", mean, std, config.channels),
        weights=t,
        left={name: reason for name in files.weights if p and not name.startswith(p)},
        notes=["images are squashed to the square that SAM pads with zeros"],
    )


def _config(files: Files, s: Spelling) -> VariantConfig:
    """Sizes from the shapes: the grid from the positions, windows and head width from the relative positions."""
    shapes, first = files.shapes, s.prefix + s.block.format(0)
    width, channels, patch = shapes[f"{s.prefix}{s.patches}.weight"][:3]
    if f"{first}attn.rel_pos_h" not in shapes or f"{s.prefix}pos_embed" not in shapes:
        raise UserError(
            f"{files.path} has SAM's names but not its positions, which determine its windows: "
            "choose a checkpoint with pos_embed and rel_pos_h"
        )
    rows, columns = shapes[f"{s.prefix}pos_embed"][1:3]
    depth = blocks_in(files, f"{s.prefix}{s.block}{s.norm1}.weight")
    sizes = [(shapes[f"{s.prefix}{s.block.format(i)}attn.rel_pos_h"][0] + 1) // 2 for i in range(depth)]
    window = min(sizes) if min(sizes) < max(rows, columns) else 0
    neck = shapes.get(f"{s.prefix}{s.neck[0]}.weight")
    hidden = shapes[f"{first}mlp.lin1.weight"][0]
    return VariantConfig(
        width=width,
        depth=depth,
        heads=width // shapes[f"{first}attn.rel_pos_h"][1],
        patch=patch,
        image_size=(rows * patch, columns * patch),
        channels=channels,
        class_token=False,
        pool="average",
        qkv_bias=f"{first}attn.qkv.bias" in shapes,
        mlp_hidden=hidden,
        norm_after=False,
        relative="decomposed",
        window=window,
        global_blocks=tuple(i for i, size in enumerate(sizes) if size != window) if window else (),
        neck=neck[0] if neck else None,
    )
