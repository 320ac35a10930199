"""The numbers of an explanation, for `POST /v1/explain` and for `explain` in `POST /v1/predict`."""

from __future__ import annotations

from typing import Any

import torch

from vitrail.data.prepare import Sample
from vitrail.errors import UserError
from vitrail.explain.attention import attention_distance, attention_maps, rollout
from vitrail.explain.trace import encoder_of, pool_of
from vitrail.tasks.answers import numbered_by_pixels
from vitrail.tasks.task import Task


def explanation(task: Task, sample: Sample) -> dict[str, Any]:
    """Where a model looks in an image, as plain data. UserError for a model that has no attention to read.

    `grid` is the rows and columns of the patches of what the model sees (of several frames the first); `rollout` has a
    number per patch, `attention_distance` one per layer and head, in pixels; `pieces` are those of an answer that is
    made piece by piece, with the attention of each over the patches.
    """
    images = task.preprocess.normalise(sample.images[:1])
    found: dict[str, Any] = {}
    if pieces := _pieces(task, images):
        found["pieces"] = pieces
    try:
        encoder = encoder_of(task)
    except UserError:
        if not pieces:
            raise
        return found
    config = encoder.config
    maps = attention_maps(task, images)
    grid = (images.shape[2] // config.patch, images.shape[3] // config.patch)
    heat = rollout(maps, config.prefix_tokens, pool_of(encoder))[0]
    return found | {
        "grid": grid,
        "patch": config.patch,
        "prefix_tokens": config.prefix_tokens,
        "rollout": _rounded(heat.unflatten(0, grid).tolist()),
        "attention_distance": _rounded(attention_distance(maps, grid, config.patch).tolist()),
    }


@torch.inference_mode()
def _pieces(task: Task, images: torch.Tensor) -> list[dict[str, Any]]:
    device = next(task.parameters()).device
    sample = torch.tensor([numbered_by_pixels(images[0])], device=device)
    found = task.pieces({"image": images.to(device), "sample": sample})
    return [
        {
            "text": piece.text,
            "p": piece.p,
            "attention": None if piece.heat is None else _rounded(piece.heat.tolist()),
        }
        for piece in (found[0] if found else [])
    ]


def _rounded(values: Any) -> Any:
    """Nested lists with numbers of five significant digits."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")
