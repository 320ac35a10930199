"""One loop: the same run to the same bits, stopped or not; sums divided rightly; faults named."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import checked
from small_runs import CPU, assert_same, small_run, spoiled, train
from torch import Tensor, nn

from vitrail.data.augment import Augment
from vitrail.data.loader import Batch, Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key
from vitrail.data.sets import open_data
from vitrail.data.text import Tokenizer
from vitrail.errors import Preempted, RunError, Stopped, UserError
from vitrail.tasks.caption import Caption, Captioning, numbered
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.train import loop
from vitrail.train.build import build
from vitrail.train.finite import MAX_IN_A_ROW
from vitrail.train.folder import RunFolder
from vitrail.train.loop import fit
from vitrail.train.optim import Optim, Optimizers
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, LossModule, train_step
from vitrail.train.stop import stop_requested
from vitrail.variants import VariantConfig
from vitrail.vit import ViTConfig


def test_of_equal_scores_the_later_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that stays at 0, as CIDEr does for one image, must not keep the weights of the first evaluation."""
    scores = iter((0.5, 0.5, 0.25))
    monkeypatch.setattr(loop, "evaluate", lambda task, *rest, **named: {task.score.name: next(scores, 0.0)})
    seen: list[str] = []
    save = Task.save

    def noted(task: Task, path: Path, *rest: Any) -> None:
        seen.append(path.name)
        save(task, path, *rest)

    monkeypatch.setattr(Task, "save", noted)
    train(small_run(eval_every=10 / 57), tmp_path / "run")
    assert seen[:3] == ["best-7", "best-14", "last"]


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(optim=replace(small_run().optim, qk_clip=0.5))  # in the steps 0, 10 and 20
    run = replace(run, model=replace(checked(VariantConfig, run.model), qk_norm=False))
    whole = train(run, tmp_path / "whole")
    steps = 0

    def count_and_interrupt(*args: object) -> AsyncScalars:
        nonlocal steps
        steps += 1
        if steps in (7, 16):
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", count_and_interrupt)
    assert threading.current_thread() is threading.main_thread()
    for resume in (False, True):
        with pytest.raises(Stopped, match="resume with `vitrail train --resume"):
            train(run, tmp_path / "stopped", resume=resume)
    assert_same(train(run, tmp_path / "stopped", resume=True), whole)
    assert steps == 30
    for kind, values in (("val", ("step", "top1")), ("train", ("step", "loss", "lr"))):
        rows = [[r for r in RunFolder(tmp_path / name).rows() if r["kind"] == kind] for name in ("whole", "stopped")]
        assert rows[0] and [[r[name] for name in values] for r in rows[0]] == [
            [r[name] for name in values] for r in rows[1]
        ]


def test_a_row_of_the_log_is_the_mean_of_all_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those before an evaluation."""

    steps = itertools.count(1)

    def numbered_step(*args: Any) -> AsyncScalars:
        scalars = train_step(*args)
        scalars.values[scalars.names.index("loss")] = next(steps)
        return scalars

    monkeypatch.setattr(loop, "train_step", numbered_step)
    train(small_run(eval_every=0.4), tmp_path / "run", steps=45)
    logged = RunFolder(tmp_path / "run").rows()
    assert any(row["kind"] == "val" and row["step"] % loop.LOG_EVERY for row in logged)
    rows = [row for row in logged if row["kind"] == "train"]
    assert [(row["step"], row["loss"]) for row in rows] == [(20, 10.5), (40, 30.5), (45, 43.0)]
    assert all(row["images_per_s"] > 0 for row in rows)


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    a, b = (train(small_run(seed=seed), tmp_path / str(seed), steps=3) for seed in (0, 1))
    assert not torch.equal(a["head.linear.weight"], b["head.linear.weight"])


def plain_run(**changes: Any) -> Run:
    """With stochastic depth alone. Batch norm's statistics and dropout's draws are those of a micro-batch."""
    run = small_run(augment=Augment(), optim=replace(small_run().optim, optimizer="sgd", lr=0.1, ema=0.0))
    model = replace(checked(ViTConfig, run.model), dropout=0.0, drop_path=0.5, depth=3, stem=())
    return replace(run, model=model, **changes)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 32])
def test_micro_batches_give_the_steps_of_the_whole_batch(accumulate: int) -> None:
    weights = []
    for count in (1, accumulate):
        run = plain_run(accumulate=count)
        components, _ = build(run, open_data("digits"), CPU)
        task = components.task.train()
        optimizers, module = Optimizers(task, run.optim), LossModule(task)
        for _, batch in zip(range(3), components.train.batches(0), strict=False):
            train_step(run, module, batch, optimizers, 1.0)
        weights.append(task.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


class Kept(Optimizers):
    """Optimizers that keep the gradients of a step and move nothing."""

    def step(self, gradients: Sequence[Tensor | None], factor: float, good: Tensor | None = None) -> None:
        pairs = zip(self.parameters, gradients, strict=True)
        self.seen = {parameter: gradient for parameter, gradient in pairs if gradient is not None}


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_of_captions_is_their_mean_over_words_in_any_micro_batches(clip: float) -> None:
    """Micro-batches have as many images but not as many words, and some images have fewer captions than are read."""
    words = Tokenizer.train(["a dog runs on the grass", "two cats sit"], "words", 50)
    texts = [
        ["a dog"],
        ["two cats sit on the grass", "cats"],
        ["the dog sit", "a", "a dog runs on the grass"],
        ["runs"],
    ]
    torch.manual_seed(0)
    encoder = encoder_for(ViTConfig(16, 3, 2, 4, (8, 8), drop_path=0.5))
    config = Captioning(decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_dropout=0.0, most_words=8)
    task = Caption(encoder, config, words, Preprocess(size=(8, 8))).train()
    batch: Batch = {"image": torch.randn(8, 3, 8, 8), "label": numbered(texts * 2, words, 8)}
    batch |= {"sample": torch.arange(8), "epoch": torch.tensor(1), "key": draw_key(0, 1)}
    found = task.loss(batch)
    (found["loss"] / found["count"]).backward()
    expected = {p: p.grad for p in task.parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    task.zero_grad(set_to_none=True)
    run = Run(recipe="x", data="y", model=encoder.config, optim=Optim(clip=clip), batch_size=8, precision="fp32")
    for accumulate in (1, 2, 4, 8):
        kept = Kept(task, run.optim)
        row = train_step(replace(run, accumulate=accumulate), LossModule(task), batch, kept, 1.0).read()
        assert row["loss"] == pytest.approx(found["loss"].item() / found["count"].item(), rel=1e-5)
        assert kept.seen.keys() == expected.keys()
        for parameter, gradient in expected.items():
            scaled = gradient * (clip / norm if clip else 1.0)
            torch.testing.assert_close(kept.seen[parameter], scaled, rtol=1e-3, atol=1e-6)


def test_a_batch_without_items_moves_nothing() -> None:
    """Masks may be all void: the sums are zero then, and no mean is of nothing."""

    class Nothing(LossModule):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            return {"loss": 0 * super().forward(batch)["loss"], "count": torch.zeros(())}

    run = plain_run()
    components, _ = build(run, open_data("digits"), CPU)
    before = {name: value.clone() for name, value in components.task.named_parameters()}
    optimizers = Optimizers(components.task, replace(run.optim, weight_decay=0.0))
    row = train_step(run, Nothing(components.task), next(components.train.batches(0)), optimizers, 1.0).read()
    assert row["loss"] == 0
    assert_same(dict(components.task.named_parameters()), before)


def test_a_loss_that_is_not_finite_names_step_and_layer(tmp_path: Path) -> None:
    run = small_run()
    components, _ = build(run, open_data("digits"), CPU)

    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("inf")

    components.task.encoder.blocks[1].norm2 = Overflow()
    folder = RunFolder(tmp_path / "run")
    folder.begin(run, components.task.classes)
    before = {name: value.clone() for name, value in components.task.named_parameters()}
    words = r"at step {}, the last of {} such steps in a row; it began in the layer encoder\.blocks\.1\.norm2"
    for steps, stop in ((5, 5), (40, MAX_IN_A_ROW)):
        with pytest.raises(RunError, match=words.format(stop, stop)):
            fit(run, components, folder, steps)
        assert folder.rows()[-1]["skipped"] == stop, "the log tells of them, though no row was due"
    assert not (tmp_path / "run" / "best").exists()
    assert_same(dict(components.task.named_parameters()), before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(
    fault: str, optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is that without the step, but for its number, on which a constant rate does not depend."""
    run = small_run(optim=Optim(optimizer=optimizer, lr=0.01, warmup=0.0, ema=0.0))
    weights = []
    for bad in (None, 3):
        components, _ = build(run, open_data("digits"), CPU)
        task = components.task.train()
        optimizers, module = Optimizers(task, run.optim), LossModule(task)
        batches = components.train.batches(0)
        for step in range(6):
            if step == bad:
                before = {name: value.clone() for name, value in task.state_dict().items()}
                with monkeypatch.context() as patch:
                    patch.setattr(task, "loss", spoiled(task, fault))
                    row = train_step(run, module, next(components.train.batches(9)), optimizers, 1.0).read()
                assert row["finite"] == 0 and not math.isfinite(row["gradient_norm"])
                assert_same(without_counts(task.state_dict()), without_counts(before))
            torch.manual_seed(step)  # for dropout
            assert train_step(run, module, next(batches), optimizers, 1.0).read()["finite"] == 1
        weights.append(without_counts(task.state_dict()))
    assert_same(weights[0], weights[1])


def without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without batch norm's numbers of batches, which nothing reads."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def test_steps_that_moved_nothing_are_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count(1)

    def spoil(run: Run, module: LossModule, *args: Any) -> AsyncScalars:
        scalars = train_step(run, module, *args)
        if next(steps) in (3, 4, 27):
            scalars.values[scalars.names.index("finite")] = 0
        return scalars

    monkeypatch.setattr(loop, "train_step", spoil)
    train(small_run(), tmp_path / "run")
    rows = RunFolder(tmp_path / "run").rows()
    assert [row["skipped"] for row in rows if row["kind"] == "train"] == [2, 1]
    assert rows[-1]["kind"] == "done" and rows[-1]["skipped"] == 3


def test_a_last_step_that_moves_nothing_ends_a_resumed_run_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled_last(stop: int | None, first: int) -> Any:
        steps = itertools.count(first)

        def step(run: Run, module: LossModule, *args: Any) -> AsyncScalars:
            scalars = train_step(run, module, *args)
            if (number := next(steps)) == 30:
                scalars.values[scalars.names.index("finite")] = 0
            if number == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return scalars

        return step

    monkeypatch.setattr(loop, "train_step", spoiled_last(None, 1))
    whole = train(small_run(), tmp_path / "whole")
    monkeypatch.setattr(loop, "train_step", spoiled_last(29, 1))
    with pytest.raises(Preempted, match="step 29 of 30 is saved"):
        train(small_run(), tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", spoiled_last(None, 30))
    assert_same(train(small_run(), tmp_path / "run", resume=True), whole)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may be finite and its gradient not: then the weights are looked at before they are scored or saved."""

    steps = itertools.count(1)

    def spoil(run: Run, module: LossModule, *args: Any) -> AsyncScalars:
        row = train_step(run, module, *args)
        if next(steps) == 26:
            module.task.get_parameter("encoder.blocks.1.mlp.up.weight").data[0, 0] = float("nan")
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(loop, "train_step", spoil)
    with pytest.raises(
        RunError, match=r"encoder\.blocks\.1\.mlp\.up\.weight are no longer finite after step 26: .*; the last"
    ):
        train(small_run(), tmp_path / "run")
    assert all(step < 26 for step in RunFolder(tmp_path / "run").states.steps())


def test_losses_are_read_one_step_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    read, made = AsyncScalars.read, Loader._finish

    def reads(self: AsyncScalars) -> dict[str, float]:
        events.append("read")
        return read(self)

    def makes(self: Loader, *args: Any) -> Batch:
        if self.train:
            events.append("make")
        return made(self, *args)

    monkeypatch.setattr(AsyncScalars, "read", reads)
    monkeypatch.setattr(Loader, "_finish", makes)
    train(small_run(), tmp_path / "run", steps=3)
    assert events == ["make", "make", "read", "make", "read", "read"]


def test_a_worker_leaves_ctrl_c_to_its_parent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with stop_requested() as stop:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested and not caplog.records
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and "press Ctrl-C again" in caplog.text


def test_a_folder_holds_one_run_and_its_recipe_reads_back(tmp_path: Path) -> None:
    run = small_run()
    folder = RunFolder(tmp_path / "run")
    with folder.new():
        folder.begin(run, ["a", "b"])
    assert folder.run() == run
    with pytest.raises(UserError, match="already holds a run"), folder.new():
        pass
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder(tmp_path / "nothing").run()


def test_the_best_checkpoint_is_chosen_on_val_and_test_is_read_once(tmp_path: Path) -> None:
    train(small_run(), tmp_path / "run")
    rows = RunFolder(tmp_path / "run").rows()
    assert [r["kind"] for r in rows].count("test") == 1 and rows[-1]["kind"] == "done"
    test = next(r for r in rows if r["kind"] == "test")
    assert test["count"] == 360 and sum(map(sum, test["confusion"])) == 360
