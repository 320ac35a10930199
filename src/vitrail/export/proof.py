"""How far an export is from the model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitrail.tasks.exported import AFTER
from vitrail.tasks.task import Task

BATCHES = (1, 2, 5)
"""images at once, at each size"""


@dataclass
class Proof:
    """The largest difference over sizes, batches and outputs."""

    absolute: float = 0.0
    share: float = 0.0
    """the same, as a share of the output's largest value where that is above 1"""
    relative: float = 0.0
    """the same, as a share of the largest value"""
    where: str = ""
    """size, batch and output of the largest share"""
    compared: int = 0
    """pairs of size and batch"""

    def add(self, expected: Tensor, found: Tensor, where: str) -> None:
        """Take in an output. Values that are not finite in both are equal."""
        if expected.shape != found.shape:
            self.absolute = self.share = self.relative = float("inf")
            self.where = f"{where}, whose shape is {list(found.shape)} and not {list(expected.shape)}"
            return
        expected, found = expected.double(), found.double()
        same = (expected == found) | (expected.isnan() & found.isnan())
        apart = torch.where(same, torch.zeros_like(expected), (expected - found).abs())
        apart = apart.nan_to_num(nan=math.inf, posinf=math.inf)
        worst = float(apart.max()) if apart.numel() else 0.0
        finite = expected[expected.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        self.absolute = max(self.absolute, worst)
        self.relative = max(self.relative, worst / max(largest, 1e-30) if worst else 0.0)
        if not self.where or worst / max(1.0, largest) > self.share:
            self.share, self.where = worst / max(1.0, largest), where

    def text(self) -> str:
        """In one line."""
        return (
            f"largest difference {self.absolute:.2g} ({self.relative:.2g} of the largest value) "
            f"over {self.compared} pairs of size and batch, at {self.where}"
        )


def normalised_noise(task: Task, count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Images [B, C, H, W] with values as normalised images have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, task.preprocess.channels, *size, generator=generator)


@torch.inference_mode()
def compare(task: Task, engine: Task, sizes: Sequence[tuple[int, int]]) -> Proof:
    """Run every component of both on noise, at each size in batches of `BATCHES`."""
    proof = Proof()
    for height, width in sizes:
        for count in BATCHES:
            images = normalised_noise(task, count, (height, width), seed=count)
            for name, expected, found in pairs(task, engine, images):
                proof.add(expected, found, f"{name}, {count} x {height}x{width}")
            proof.compared += 1
    return proof


def pairs(task: Task, engine: Task, images: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Outputs of both on the same inputs: of each program as the model gives them, and as the export does."""
    running: Any = engine
    for name, program in task.programs({"image": images}).items():
        inputs = dict(program.inputs)
        for _ in range(program.steps):
            expected = program.module(*inputs.values())
            found = running.engines[name](*inputs.values())
            for output, one, other in zip(program.outputs, expected, found, strict=True):
                yield f"{name}.{output}" if name != "model" else output, one, other
                if output.endswith(AFTER):
                    inputs[output.removesuffix(AFTER)] = one
