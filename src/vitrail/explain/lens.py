"""What the task would answer if the encoder ended after each of its blocks (the logit lens)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vitrail.explain.trace import Pause, Trace, encoder_of, evaluating, no_pause, recording
from vitrail.ops import Grid
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Prediction
from vitrail.vit import ViT


@torch.no_grad()
def layer_by_layer(task: Task, batch: Batch, pause: Pause = no_pause) -> list[list[Prediction]]:
    """What the task answers after each block, one answer per image, with the later blocks left out.

    The final norm, the pooling and the head or decoder read the tokens of a layer that they were not trained on, so an
    early answer tells how far the tokens have come. The last one is the model's answer. `pause` is called after each,
    while the model is whole.
    """
    encoder, weight = encoder_of(task), next(task.parameters())
    images = batch["image"].to(weight.device, weight.dtype)
    with recording(encoder) as found:
        encoder(images)
    answers = []
    for number in range(1, len(encoder.blocks) + 1):
        with evaluating(task), _ending(encoder, number, found):
            answers.append(task.answer({**batch, "image": images}))
        pause()
    return answers


@contextmanager
def _ending(encoder: ViT, number: int, found: Trace) -> Iterator[None]:
    """Meanwhile the encoder ends after block `number`, counted from 1."""
    whole = encoder.encode

    def encode(
        x: Tensor, grid: Grid, keep: Any = None, blocks: slice = slice(None), layers: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        if blocks == slice(None) and x.shape == found.hidden[number - 1].shape and not layers:
            return found.hidden[number - 1], []  # as computed before
        first, last, _ = blocks.indices(len(encoder.blocks))
        return whole(x, grid, keep, slice(first, max(first, min(last, number))), layers)

    vars(encoder)["encode"] = encode
    try:
        yield
    finally:
        del vars(encoder)["encode"]
