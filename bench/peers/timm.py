"""Every architecture of timm's ViT modules with random weights, read by vitrail from a folder.

Two blocks stand for all of an architecture's: one where they are wide, and three where windows and global attention
alternate. Everything else is as published.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from peers.comparison import OTHERS, Size, by, differences, note_on, random_images, randomise, rounded
from vitrail.tasks.task import Task
from vitrail.variants import resize
from vitrail.vit import ViT
from vitrail.zoo.assemble import assemble
from vitrail.zoo.source import Files
from vitrail.zoo.timm import flat, read
from vitrail.zoo.timm.arguments import table

LIBRARY = "timm"
TINY = ("test_vit", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")
MODULES = ("vision_transformer", "deit", "beit", "vision_transformer_hybrid", "vision_transformer_sam", "eva")
CLASSES = 11
WIDE = 1200
"""wider architectures get one block in place of two"""


def models() -> list[str]:
    return [name for module in MODULES for name in timm.list_models(module=module)]


def compare(name: str, others: tuple[Size, Size] = OTHERS, **smaller: Any) -> dict[str, Any]:
    """The differences of one architecture at its own size and at others; `smaller` are further arguments of timm's.

    timm creates the model for each other size with its own interpolation of the weights, and vitrail's is resized.
    Where timm can, both also take the last size at run time, with the positions of the model's own size.
    """
    arguments = {**shallow(name), **smaller}
    peer = timm_model(name, arguments)
    randomise(peer, seed=sum(map(ord, name)))
    weights = dict(peer.state_dict())
    task = ours(name, arguments, weights)
    encoder = task.encoder
    assert isinstance(encoder, ViT)
    own, patch = encoder.config.image_size, encoder.config.patch
    sizes = {by(own): difference(task, peer, own)}
    for size in (rounded(other, patch) for other in others):
        if table()[name]["class"] == "VisionTransformerSAM":
            # timm's SAM takes any size, and cannot be created for one from another's weights.
            sizes[by(size)] = difference(task, peer, size)
            continue
        resized = timm_model(name, {**arguments, "img_size": size})
        resized.load_state_dict(filtered(name, resized, weights), assign=True)
        there = ours(name, arguments, weights)
        assert isinstance(there.encoder, ViT)
        resize(there.encoder, size)
        sizes[by(size)] = difference(there, resized, size)
        del resized, there
    if table()[name]["class"] not in ("VisionTransformerSAM", "Beit"):
        moving = timm_model(name, {**arguments, "dynamic_img_size": True, "img_size": own})
        moving.load_state_dict(weights, assign=True)
        size = rounded(others[-1], patch)
        sizes[f"{by(size)} at run time"] = difference(task, moving, size)
    return {"arguments": arguments, "sizes": sizes, "note": note_on(others, patch)}


def shallow(name: str) -> dict[str, Any]:
    """Arguments that leave few blocks of each kind, and a head of few classes."""
    values = table()[name]
    arguments: dict[str, Any] = {"depth": 1 if values.get("embed_dim", 768) > WIDE else 2, "num_classes": CLASSES}
    if "global_attn_indexes" in values:
        arguments |= {"depth": 3, "global_attn_indexes": [1]}
    if kv_heads := values.get("num_kv_heads"):
        # The first blocks have all heads of keys and values, those in the middle fewer.
        arguments["num_kv_heads"] = [kv_heads[0], kv_heads[len(kv_heads) // 2]][-arguments["depth"] :]
    return arguments


def timm_model(name: str, arguments: dict[str, Any]) -> Any:
    """A model whose weights are still to come: timm's own initial ones take longer than the comparison."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, **arguments)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif hasattr(module, "_init_buffers"):
            module._init_buffers()
    return model.eval().requires_grad_(False)


def ours(name: str, arguments: dict[str, Any], weights: dict[str, Tensor]) -> Task:
    """What vitrail reads from a folder with these weights."""
    model_args = {key: value for key, value in arguments.items() if key != "num_classes"}
    config = {"architecture": name, "model_args": model_args, "pretrained_cfg": {"num_classes": CLASSES}}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    files = Files(Path(name), {"config.json": config}, weights, shapes)
    return assemble(files, read(files))


def filtered(name: str, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as timm's own loading fits them to the model."""
    found: list[Any] = []
    module = sys.modules[timm.model_entrypoint(name).__module__]
    original = module.build_model_with_cfg
    module.build_model_with_cfg = lambda *args, **named: found.append(named["pretrained_filter_fn"])  # type: ignore[attr-defined]
    try:
        timm.model_entrypoint(name)()
    finally:
        module.build_model_with_cfg = original  # type: ignore[attr-defined]
    return found[0](dict(weights), model)


@torch.inference_mode()
def difference(task: Task, peer: Any, size: Size) -> dict[str, float]:
    assert isinstance(task.encoder, ViT)
    images = random_images(size, task.encoder.config.channels)
    theirs = peer.forward_features(images)
    logits = peer.forward_head(theirs)
    features = task.features(images)
    tokens = torch.cat([features.prefix, features.patches], dim=1)
    return differences((tokens, flat(theirs)), (task(images), logits))
