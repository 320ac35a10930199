"""A small run of the digits, and its training: for tests of the loop and of what interrupts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checked import checked
from torch import Tensor

from vitrail.data.augment import Augment
from vitrail.data.sets import open_data
from vitrail.recipes import RECIPES
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch
from vitrail.train.build import build
from vitrail.train.folder import RunFolder
from vitrail.train.loop import fit
from vitrail.train.run import Run
from vitrail.vit import ViTConfig
from vitrail.zoo import load

CPU = torch.device("cpu")


def small_run(**changes: object) -> Run:
    """Digits with everything that is random switched on."""
    run = RECIPES["digits"](1000)
    model = replace(checked(ViTConfig, run.model), width=16, depth=2, heads=2, dropout=0.1, drop_path=0.2, stem=(4,))
    augment = Augment(crop="shift", shift=1, flip=True, mixup=0.3, erase=0.2)
    run = replace(run, model=model, augment=augment, optim=replace(run.optim, ema=0.9), batch_size=32, eval_every=0.5)
    return replace(run, **changes)  # type: ignore[arg-type]


def train(run: Run, path: Path, steps: int = 30, resume: bool = False) -> dict[str, Tensor]:
    components, _ = build(run, open_data("digits"), CPU)
    folder = RunFolder(path)
    if not resume:
        folder.begin(run, components.task.classes)
    fit(run, components, folder, steps, resume)
    return {**load(path / "best").state_dict(), **{f"last.{k}": v for k, v in load(path / "last").state_dict().items()}}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def spoiled(task: Task, fault: str) -> Any:
    """The task's loss, which is infinite, or whose gradient is: the square root of zero has an infinite slope."""
    plain = task.loss

    def loss(batch: Batch) -> dict[str, Tensor]:
        found = plain(batch)
        weight = task.get_parameter("head.linear.weight")
        odd = weight.sum() * float("inf") if fault == "loss" else (weight - weight.detach()).square().sum().sqrt()
        return {**found, "loss": found["loss"] + odd}

    return loss
