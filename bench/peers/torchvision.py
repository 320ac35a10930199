"""torchvision's Vision Transformers with random weights, read by vitrail from a state dict.

The models have two blocks and everything else as published. torchvision creates a model for one square size and fits
published weights to it with `interpolate_embeddings`; it has nothing for images that are not square.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models import VisionTransformer, vision_transformer

import vitrail
from peers.comparison import OTHERS, by, differences, note_on, random_images, randomise, rounded
from vitrail.tasks.task import Task

LIBRARY = "torchvision"
TINY = ("vit_b_32",)
CLASSES = 11
OWN = 224
HIDDEN = "vit_b_16, hidden layer"
"""with the layer before the head of section 3.1's pre-training"""
OLD_NAMES = "vit_b_16, names of 2021"
"""with the names that the MLPs' weights had in torchvision 0.12"""


def models() -> list[str]:
    return [*torchvision.models.list_models(include="vit_*"), HIDDEN, OLD_NAMES]


def compare(name: str) -> dict[str, Any]:
    """The differences of one model at its own size, and at another square: loaded for it, and at run time."""
    arguments = _arguments(name.split(",")[0]) | ({"representation_size": 48} if name == HIDDEN else {})
    peer = VisionTransformer(OWN, **arguments).eval()
    randomise(peer, seed=sum(map(ord, name)))
    weights = peer.state_dict()
    patch = arguments["patch_size"]
    other = rounded(OTHERS[0], patch)
    resized = VisionTransformer(other[0], **arguments).eval()
    resized.load_state_dict(vision_transformer.interpolate_embeddings(other[0], patch, dict(weights)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vit.pth"
        torch.save(_old_names(weights) if name == OLD_NAMES else weights, file)
        task, task_of_other = vitrail.load(file), vitrail.load(file, image_size=other)
        sizes = {
            by((OWN, OWN)): _difference(task, peer, OWN),
            by(other): _difference(task_of_other, resized, other[0]),
            f"{by(other)} at run time": _difference(task, resized, other[0]),
        }
    note = ", ".join(filter(None, [note_on(OTHERS[:1], patch), "square images only"]))
    return {"arguments": arguments, "sizes": sizes, "note": note}


def _arguments(name: str) -> dict[str, Any]:
    """What torchvision's function of this name passes on, but for the number of blocks."""
    found: dict[str, Any] = {}
    original = vision_transformer._vision_transformer
    vision_transformer._vision_transformer = lambda **values: found.update(values)
    try:
        getattr(vision_transformer, name)()
    finally:
        vision_transformer._vision_transformer = original
    kept = {key: found[key] for key in ("patch_size", "num_heads", "hidden_dim", "mlp_dim")}
    return kept | {"num_layers": 2, "num_classes": CLASSES}


def _old_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    for now, before in renamed.items():
        weights = {key.replace(now, before): value for key, value in weights.items()}
    return weights


@torch.inference_mode()
def _difference(task: Task, peer: VisionTransformer, side: int) -> dict[str, float]:
    images = random_images((side, side))
    kept: dict[str, Tensor] = {}
    hook = peer.encoder.register_forward_hook(lambda _, __, tokens: kept.update(tokens=tokens))
    logits = peer(images)
    hook.remove()
    features = task.features(images)
    tokens = torch.cat([features.prefix, features.patches], dim=1)
    return differences((tokens, kept["tokens"]), (task(images), logits))
