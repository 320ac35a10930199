"""`--accumulate auto`: the number that fits is found, and the run is the one that was started with that number."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_ranks
from small_runs import CPU, assert_same, small_run, train
from torch import Tensor

from vitrail.baselines.cnn import ResNetConfig
from vitrail.cli import main
from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.sets import open_data
from vitrail.errors import RunError, UserError
from vitrail.start import begin
from vitrail.tasks.classify import Classify
from vitrail.tasks.values import Batch
from vitrail.train import fitting
from vitrail.train.build import build
from vitrail.train.fitting import MARGIN, with_micro_batches
from vitrail.train.folder import RunFolder
from vitrail.train.optim import Optim, Optimizers
from vitrail.train.parallel import ALONE, World
from vitrail.train.run import Run
from vitrail.train.tune import Tune
from vitrail.zoo import load


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device whose memory holds 8 images; the sizes of the micro-batches that were tried."""
    sizes: list[int] = []
    limit_to(8, monkeypatch, sizes)
    return sizes


def limit_to(limit: int, patch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """Let this processor report that its memory is full, from more than `limit` images at a time."""
    plain = Classify.loss

    def loss(task: Classify, batch: Batch, *rest: Any) -> dict[str, Tensor]:
        sizes.append(len(batch["image"]))
        found = plain(task, batch, *rest)
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    patch.setattr(Classify, "loss", loss)
    patch.setattr(fitting, "TRIED_ON", ("cpu",))


def begun(run: Run, out: Path) -> dict[str, Tensor]:
    """The weights of a run that the command starts."""
    begin(lambda images: run, None, None, {}, out, "cpu")
    return {**load(out / "best").state_dict(), **{f"last.{k}": v for k, v in load(out / "last").state_dict().items()}}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_run_is_that_of_the_number_that_fits(
    optimizer: Any, full: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With dropout, stochastic depth, batch norm's statistics, mixup and an average, to the same bits."""
    run = small_run(max_steps=6, eval_every=0.1, optim=Optim(optimizer, lr=0.01, ema=0.9))
    auto = begun(replace(run, accumulate="auto"), tmp_path / "auto")
    assert full[:7] == [32, 16, *[8] * 4, 8], "the fewest are tried first"
    assert "accumulate: batches of 32 images are split into 4 micro-batches of 8, which fit in" in caplog.text
    assert_same(auto, begun(replace(run, accumulate=4), tmp_path / "four"))
    folders = [RunFolder(tmp_path / name) for name in ("auto", "four")]
    recipes = [(folder.path / "recipe.json").read_text() for folder in folders]
    assert recipes[0] == recipes[1] and json.loads(recipes[0])["accumulate"] == 4
    losses = [[row["loss"] for row in folder.rows() if row["kind"] == "train"] for folder in folders]
    assert losses[0] and losses[0] == losses[1]


@pytest.mark.parametrize("fails", ["forward", "optimizer"])
def test_a_trial_leaves_nothing_behind(fails: str, full: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(accumulate="auto", optim=Optim("adamw", lr=0.1))
    components, _ = build(run, open_data("digits"), CPU)
    task, loader = components.task, components.train
    expected = next(build(run, open_data("digits"), CPU)[0].train.batches())
    if fails == "optimizer":  # after it has moved weights
        step = Optimizers.step

        def moved_and_full(own: Optimizers, *rest: Any) -> None:
            assert all(parameter.grad is None for parameter in own.parameters), "the memory of the trial before"
            step(own, *rest)
            if full[-1] > 2:
                own.parameters[0].grad = torch.zeros_like(own.parameters[0])
                raise torch.OutOfMemoryError

        monkeypatch.setattr(Optimizers, "step", moved_and_full)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    state = torch.get_rng_state()
    found = with_micro_batches(run, task, loader, ALONE)
    assert found == replace(run, accumulate=4 if fails == "forward" else 16)
    assert_same(task.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in task.parameters())
    assert not loader.bad and not loader.wait
    batch = next(loader.batches())
    assert all(torch.equal(batch[name], expected[name]) for name in ("image", "label", "sample"))


def test_a_run_with_a_number_is_not_tried(full: list[int]) -> None:
    run = small_run(accumulate=2)
    components, _ = build(run, open_data("digits"), CPU)
    assert with_micro_batches(run, components.task, components.train, ALONE) is run and not full


def test_the_state_of_the_optimizer_is_there_in_the_steps_that_count(
    full: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of AdamW allocates it after the forward pass: memory is fullest from the second on."""
    run = small_run(accumulate="auto", optim=Optim("adamw"))
    components, _ = build(run, open_data("digits"), CPU)
    plain, made = Classify.loss, list[Optimizers]()
    init = Optimizers.__init__

    def noted(own: Optimizers, *rest: Any, **named: Any) -> None:
        init(own, *rest, **named)
        made.append(own)

    def loss(task: Classify, batch: Batch, *rest: Any) -> dict[str, Tensor]:
        if any(member.state for member in made[-1].members) and len(batch["image"]) > 4:
            raise torch.OutOfMemoryError
        return plain(task, batch, *rest)

    monkeypatch.setattr(Optimizers, "__init__", noted)
    monkeypatch.setattr(Classify, "loss", loss)
    assert with_micro_batches(run, components.task, components.train, ALONE).accumulate == 8


def test_single_images_that_do_not_fit_end_the_command_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_to(0, monkeypatch, [])
    out = tmp_path / "run"
    with pytest.raises(RunError, match="does not fit in the GPU's memory, even image by image: choose a smaller"):
        begun(small_run(accumulate="auto", batch_size=12), out)
    assert not out.exists()


def test_a_batch_that_is_no_power_of_two_is_split_down_to_single_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    limit_to(1, monkeypatch, sizes)
    run = small_run(accumulate="auto", batch_size=12)
    components, _ = build(run, open_data("digits"), CPU)
    assert with_micro_batches(run, components.task, components.train, ALONE).accumulate == 12


def agreed(world: World, run: Run) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        limit_to((8, 4)[world.rank], patch, [])
        components, _ = build(run, open_data("digits"), CPU, world=world)
        return with_micro_batches(run, components.task, components.train, world).accumulate


def test_ranks_take_the_largest_number_and_wait_for_no_rank_that_failed() -> None:
    """Batch norm, which sums over the ranks in a step, would wait for ever in a trial that they share."""
    resnet = ResNetConfig(widths=(4, 8), depth=1, strides=(1, 2), image_size=(8, 8), channels=1)
    assert in_ranks(2, False, agreed, small_run(model=resnet, accumulate="auto", augment=Augment())) == [4, 4]


def test_on_a_cpu_auto_is_one_and_a_frozen_encoder_has_no_batches_to_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path / "run")
    assert main(["train", "digits", "--accumulate", "auto", "--max-steps", "1", "--device", "cpu", "--out", out]) == 0
    assert RunFolder(Path(out)).run().accumulate == 1
    assert "auto needs a CUDA GPU, so batches are not split" in caplog.text
    caplog.clear()
    run = small_run(accumulate="auto")
    components, _ = build(run, open_data("digits"), CPU)
    frozen = replace(run, tune=Tune("linear"))
    assert with_micro_batches(frozen, components.task, components.train, ALONE).accumulate == 1 and not caplog.text


def test_what_cannot_be_split_or_tried_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cuda_graphs records one batch per step: remove --accumulate"):
        small_run(accumulate="auto", cuda_graphs=True)
    with pytest.raises(UserError, match="--shard needs all: give a number"):
        build(small_run(accumulate="auto"), open_data("digits"), CPU, world=World(0, 1, "cpu", shard=True))
    monkeypatch.setattr(Classify, "whole_batch", True)
    with pytest.raises(UserError, match="needs the whole batch at once: remove --accumulate"):
        build(small_run(accumulate="auto"), open_data("digits"), CPU)


def test_full_memory_in_a_step_names_auto(
    full: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--max-steps", "2", "--batch-size", "32", "--accumulate", "2", "--device", "cpu"]
    assert main(["train", "digits", *args]) == RunError.exit_code
    *_, last = capsys.readouterr().err.splitlines()
    remedy = "start again with --accumulate auto, or a number above 2; no checkpoint was saved yet"
    assert last == f"vitrail: the GPU's memory is full in a step of training: {remedy}"
    monkeypatch.setattr(Classify, "whole_batch", True)
    with pytest.raises(RunError, match="start again with a smaller --batch-size"):
        train(small_run(), tmp_path / "run")


@pytest.mark.parametrize("device, number", [("cuda", 2), ("cuda:1", 1)])
def test_a_trial_on_a_gpu_leaves_a_margin(
    device: str, number: int, full: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 bytes, 20 are PyTorch's own and 60 are free: it may take 20 and nine tenths of 60, and then all.

    PyTorch sets the limit of a numbered device alone.
    """
    given: list[tuple[int, float]] = []

    def limit(fraction: float, device: torch.device) -> None:
        given.append((torch._utils._get_device_index(device), fraction))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    components, _ = build(small_run(), open_data("digits"), CPU)
    with fitting._unchanged(components.task, torch.device(device)):
        ((limited, fraction),) = given
        assert limited == number and fraction == pytest.approx(0.2 + (1 - MARGIN) * 0.6)
    assert given[1:] == [(number, 1.0)]


def test_the_first_images_of_a_set_in_memory_are_those_of_the_first_step() -> None:
    run = small_run()
    loader: Loader = build(run, open_data("digits"), CPU)[0].train
    whole, few, expected = loader.first(32), loader.first(7), next(loader.batches())
    assert torch.equal(whole["image"], expected["image"]) and torch.equal(whole["label"], expected["label"])
    assert few["sample"].tolist() == expected["sample"][:6].tolist(), "pairs stay together"
