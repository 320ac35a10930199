"""torchvision's `vit_b_16` and its siblings: state dicts, recognised by their names.

They contain no preprocessing; it is inferred from the image size, as for the published weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitrail.data.preprocess import Preprocess, imagenet_statistics
from vitrail.variants import VariantConfig
from vitrail.zoo.renames import blocks_in, class_names, heads_for, linear, square
from vitrail.zoo.source import Files, Found, Weight

NAME = "torchvision"

BLOCK = "encoder.layers.encoder_layer_{}."
MLP = ("mlp.0", "mlp.3")
MLP_BEFORE_2022 = ("mlp.linear_1", "mlp.linear_2")


def recognise(files: Files) -> bool:
    """Whether the names are those of torchvision's VisionTransformer."""
    return "conv_proj.weight" in files.weights and "encoder.pos_embedding" in files.weights


def read(files: Files) -> Found:
    """The model, by the shapes of its weights."""
    width, channels, patch = files.shapes["conv_proj.weight"][:3]
    side = square(files, "encoder.pos_embedding", prefix=1) * patch
    up, down = MLP if f"{BLOCK.format(0)}{MLP[0]}.weight" in files.shapes else MLP_BEFORE_2022
    config = VariantConfig(
        width=width,
        depth=blocks_in(files, BLOCK + "ln_1.weight"),
        heads=heads_for(width),
        patch=patch,
        image_size=(side, side),
        channels=channels,
        mlp_ratio=files.shapes[f"{BLOCK.format(0)}{up}.weight"][0] / width,
        resampling="bicubic_corners",
    )
    weights: dict[str, Weight] = {
        "encoder.class_token": Weight(("class_token",)),
        "encoder.positions": Weight(("encoder.pos_embedding",)),
    }
    linear(weights, "encoder.patches.projection", "conv_proj")
    for i in range(config.depth):
        own, theirs = f"encoder.blocks.{i}.", BLOCK.format(i)
        linear(weights, f"{own}norm1", f"{theirs}ln_1")
        linear(weights, f"{own}norm2", f"{theirs}ln_2")
        for end in ("weight", "bias"):
            weights[f"{own}attention.qkv.{end}"] = Weight((f"{theirs}self_attention.in_proj_{end}",))
        linear(weights, f"{own}attention.out", f"{theirs}self_attention.out_proj")
        linear(weights, f"{own}mlp.up", theirs + up)
        linear(weights, f"{own}mlp.down", theirs + down)
    linear(weights, "encoder.norm", "encoder.ln")
    classes, hidden = files.shapes.get("heads.head.weight"), files.shapes.get("heads.pre_logits.weight")
    if classes:
        linear(weights, "head.linear", "heads.head")
    if hidden:
        linear(weights, "head.hidden.0", "heads.pre_logits")
    notes = ["the file has no preprocessing: using torchvision's for published weights of this size"]
    return Found(
        source="torchvision's VisionTransformer",
        encoder=config,
        classes=class_names(classes[0], notes) if classes else None,
        preprocess=_preprocess(config),
        weights=weights,
        left={},
        hidden=hidden[0] if hidden else None,
        notes=notes,
    )


def _preprocess(config: VariantConfig) -> Preprocess:
    """Preprocessing of the weights for 224 pixels, or of those fine-tuned at larger sizes and of ViT-H."""
    side = config.image_size[0]
    mean, std = imagenet_statistics(config.channels)
    enlarged, interpolation = side, "bicubic"
    if side == 224 and config.patch != 14:
        enlarged, interpolation = 242 if (config.width, config.patch) == (1024, 16) else 256, "bilinear"
    return Preprocess(
        size=(side, side),
        crop_fraction=side / enlarged,
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        mean=mean,
        std=std,
        channels=config.channels,
    )


def reference(files: Files) -> Callable[[Tensor], dict[str, Tensor]]:
    """torchvision's own model with these weights."""
    from torchvision.models import VisionTransformer

    found = read(files)
    config = found.encoder
    assert config is not None
    model = VisionTransformer(
        image_size=config.image_size[0],
        patch_size=config.patch,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=round(config.width * config.mlp_ratio),
        num_classes=len(found.classes or [""]),
        representation_size=found.hidden,
    )
    if config.channels != 3:
        model.conv_proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
    model.load_state_dict({name: value.float() for name, value in files.weights.items()}, strict=bool(found.classes))
    model.eval()
    return lambda images: _outputs(model, images, found.classes is not None)


def _outputs(model: Any, images: Tensor, classes: bool) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    hook = model.encoder.register_forward_hook(lambda _, __, out: kept.update(tokens=out))
    logits = model(images)
    hook.remove()
    return {**kept, "logits": logits} if classes else kept
