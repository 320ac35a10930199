"""What an export is compared on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vitrail
from vitrail.export.proof import Proof, normalised_noise, pairs


@torch.inference_mode()
def test_a_captioner_is_compared_at_each_length_of_a_caption() -> None:
    """Engines have been right for 14 words and wrong for 15."""
    task: Any = vitrail.load("caption")
    images = normalised_noise(task, 1, (32, 32))
    lengths: list[int] = []

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        program = task.programs({"image": images})["step"]
        named = dict(zip(program.inputs, inputs, strict=True))
        lengths.append(named["words.0"].shape[0])
        found = dict(zip(program.outputs, program.module(*inputs), strict=True))
        return tuple(value + (lengths[-1] == 15) if name == "logits" else value for name, value in found.items())

    task.engines = {name: program.module for name, program in task.programs({"image": images}).items()} | {"step": step}
    found = [(one - other).abs().max() for name, one, other in pairs(task, task, images) if name == "step.logits"]
    assert lengths == list(range(2, task.decoder.max_length))
    assert [lengths[i] for i, apart in enumerate(found) if apart > 0.5] == [15]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_infinitely_far_from_one_that_is(value: float) -> None:
    """By this an export in bf16 or int8 is refused, whose other differences are only told."""
    proof = Proof()
    proof.add(torch.ones(2), torch.tensor([1.0, value]), "here")
    assert proof.absolute == proof.share == proof.relative == math.inf and proof.where == "here"
    same = Proof()
    same.add(torch.tensor([1.0, value]), torch.tensor([1.0, value]), "here")
    assert same.absolute == same.share == 0.0
