"""Training in fp16: the loss is scaled, an overflow halves the scale and moves nothing, and a resumed run knows it."""

from __future__ import annotations

import itertools
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import checked
from task_examples import EXAMPLES, batch_for
from torch import Tensor

from vitrail.data.sets import open_data
from vitrail.errors import RunError, Stopped
from vitrail.recipes import RECIPES
from vitrail.train import loop
from vitrail.train.build import build
from vitrail.train.device import autocast, number_format
from vitrail.train.finite import MAX_IN_A_ROW
from vitrail.train.folder import RunFolder
from vitrail.train.loop import fit
from vitrail.train.optim import Optim, Optimizers
from vitrail.train.run import Run
from vitrail.train.scale import GROW_EVERY, LossScale, loss_scale
from vitrail.train.step import AsyncScalars, LossModule, train_step
from vitrail.vit import ViTConfig

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def small_run(**changes: Any) -> Run:
    run = RECIPES["digits"](1000)
    model = replace(checked(ViTConfig, run.model), width=16, depth=1, heads=2, stem=(4,))
    return replace(run, **{"model": model, "batch_size": 32, "precision": "fp16", "eval_every": 0.5, **changes})


class High(LossScale):
    """A scale that starts far too large."""

    def __init__(self, images: int, device: torch.device) -> None:
        super().__init__(images, device)
        self.ceiling = math.inf
        self.value.fill_(2.0**40)


def started(run: Run) -> tuple[LossModule, Optimizers, Any]:
    components, _ = build(run, open_data("digits"), CPU)
    scale = loss_scale(CPU, run.precision, run.batch_size)
    optimizers = Optimizers(components.task.train(), run.optim, scale=scale)
    return LossModule(components.task), optimizers, components.train.batches(0)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_takes_the_steps_of_fp32_whatever_the_scale(optimizer: Any, accumulate: int) -> None:
    """Also with clipping, which sees the gradient without the scale."""
    optim = Optim(optimizer=optimizer, lr=1e-3, muon_lr=1e-3, clip=0.5)
    found = {}
    for precision, value in (("fp32", None), ("fp16", 1.0), ("fp16", 256.0)):
        module, optimizers, batches = started(small_run(precision=precision, optim=optim, accumulate=accumulate))
        if optimizers.scale is not None and value is not None:
            optimizers.scale.value.fill_(value)
        run = small_run(precision=precision, optim=optim, accumulate=accumulate)
        rows = [train_step(run, module, next(batches), optimizers, 1.0).read() for _ in range(3)]
        assert all(row["finite"] for row in rows) and ("loss_scale" in rows[0]) == (precision == "fp16")
        found[precision, value] = rows[-1]["loss"], rows[0]["gradient_norm"], weights(module)
    loss, norm, plain = found.pop(("fp32", None))
    for half in found.values():
        assert half[0] == pytest.approx(loss, rel=5e-3) and half[1] == pytest.approx(norm, rel=2e-2)
        for name, weight in plain.items():
            torch.testing.assert_close(half[2][name], weight, rtol=0, atol=4e-3)


def test_products_are_computed_in_the_format_that_was_named() -> None:
    for name, expected in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(CPU, name):  # type: ignore[arg-type]
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
        assert (loss_scale(CPU, name, 8) is not None) == (name == "fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, own in EXAMPLES.items() for name in own])
def test_every_task_trains_in_fp16(kind: str, name: str) -> None:
    """The loss is a sum over items, which would overflow in fp16, and so would the scale in which it is seen."""
    torch.manual_seed(0)
    task = EXAMPLES[kind][name]().train()
    if kind in ("embed", "regress") or name == "knn":
        pytest.skip("it is not trained by gradients")
    optimizers = Optimizers(task, Optim(lr=1e-3), scale=LossScale(4, CPU))
    run = Run("x", data="none", batch_size=4, precision="fp16")
    before = weights(task)
    for _ in range(20):
        row = train_step(run, LossModule(task), batch_for(task, 4), optimizers, 1.0).read()
    assert row["finite"] and any(not torch.equal(value, before[key]) for key, value in task.named_parameters())


@pytest.mark.parametrize(
    "capability, bf16, expected",
    [
        ((9, 0), True, torch.bfloat16),  # H100
        ((7, 5), False, torch.float16),  # T4
        ((7, 0), False, torch.float16),  # V100
        ((6, 1), False, torch.float32),  # GTX 1080: products in fp16 are slower there
    ],
)
def test_a_gpu_without_bf16_trains_in_fp16_if_it_has_tensor_cores(
    capability: tuple[int, int], bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert number_format(torch.device("cuda"), "auto") == expected
    assert number_format(torch.device("cuda"), "fp32") == torch.float32


def test_the_scale_halves_down_to_its_floor_and_doubles_after_a_while() -> None:
    scale = LossScale(128, CPU)
    start = scale.value.item()
    assert start == 2.0**16 / 128 and scale.floor == 1 / 128
    halved = [bool(scale.update(GOOD, BAD)) for _ in range(20)]
    assert halved == [True] * 16 + [False] * 4 and scale.value.item() == scale.floor
    for _ in range(GROW_EVERY - 1):
        assert not scale.update(GOOD, GOOD)
    assert scale.value.item() == scale.floor
    scale.update(GOOD, GOOD)
    assert scale.value.item() == 2 * scale.floor and scale.steps.item() == 0
    assert not scale.update(BAD, BAD) and scale.value.item() == 2 * scale.floor, "no scale helps against such a loss"
    scale.value.fill_(scale.ceiling)
    scale.steps.fill_(GROW_EVERY - 1)
    scale.update(GOOD, GOOD)
    assert scale.value.item() == scale.ceiling
    assert LossScale(100, CPU).value.item() == start, "a power of two, by which products are exact"


def test_an_overflow_halves_the_scale_and_moves_nothing() -> None:
    module, optimizers, batches = started(small_run())
    optimizers.scale = High(32, CPU)
    before, batch = weights(module), next(batches)
    row = train_step(small_run(), module, batch, optimizers, 1.0).read()
    assert math.isfinite(row["loss"]) and not row["finite"] and row["halved"] and row["loss_scale"] == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    for _ in range(40):
        row = train_step(small_run(), module, batch, optimizers, 1.0).read()
    assert row["finite"] and not row["halved"] and row["loss_scale"] < 2.0**20
    assert any(not torch.equal(value, before[name]) for name, value in module.named_parameters())


def fitted(run: Run, path: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
    components, _ = build(run, open_data("digits"), CPU)
    folder = RunFolder(path)
    if not resume:
        folder.begin(run, components.task.classes)
    fit(run, components, folder, steps, resume)
    state = folder.states.newest(CPU)
    assert state is not None
    return {**state.values["module"], **state.values["optimizers"][-1]}


def test_overflows_are_counted_apart_and_stop_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "loss_scale", lambda device, precision, images: High(images, device))
    fitted(small_run(), tmp_path / "run", 60)
    rows = [row for row in RunFolder(tmp_path / "run").rows() if row["kind"] == "train"]
    assert rows[0]["overflows"] > MAX_IN_A_ROW and "overflows" not in rows[-1]
    assert all(row["skipped"] == 0 for row in rows) and rows[-1]["loss_scale"] < 2.0**20
    assert not any("no weight was moved" in line for line in caplog.messages)
    fitted(small_run(), tmp_path / "short", 3)
    assert "no weight was moved: the scale of the loss was still too large" in caplog.text


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the scale is at its floor, so many steps later."""
    run = small_run()
    components, _ = build(run, open_data("digits"), CPU)
    task = components.task
    plain = task.loss

    def loss(batch: Any) -> dict[str, Tensor]:
        found, weight = plain(batch), task.get_parameter("head.linear.weight")
        return {**found, "loss": found["loss"] + (weight - weight.detach()).square().sum().sqrt()}

    monkeypatch.setattr(task, "loss", loss)
    folder = RunFolder(tmp_path / "run")
    folder.begin(run, task.classes)
    last = rf"at step {16 + MAX_IN_A_ROW}, the last of {MAX_IN_A_ROW} such steps in a row"
    words = rf"{last}; .*head\.linear\.weight; the range of fp16"
    with pytest.raises(RunError, match=words):
        fit(run, components, folder, 100)


def test_a_stopped_run_in_fp16_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two overflows, and with the scale that it had."""
    monkeypatch.setattr(loop, "loss_scale", lambda device, precision, images: High(images, device))
    whole = fitted(small_run(), tmp_path / "whole", 30)
    steps = itertools.count(1)

    def interrupted(*args: Any) -> AsyncScalars:
        if next(steps) in (7, 25):
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    for resume in (False, True):
        with pytest.raises(Stopped):
            fitted(small_run(), tmp_path / "stopped", 30, resume)
    again = fitted(small_run(), tmp_path / "stopped", 30, resume=True)
    assert again.keys() == whole.keys() and again["value"] < 2.0**20
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


def test_a_run_resumes_in_another_format() -> None:
    """As where a T4 began and an H100 continues."""
    _, half, _ = started(small_run())
    _, full, _ = started(small_run(precision="fp32"))
    full.load_state_dict(half.state_dict())
    assert half.scale is not None
    half.scale.value.fill_(2.0)
    half.load_state_dict(full.state_dict())
    assert half.scale.value.item() == 2.0
