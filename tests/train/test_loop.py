"""One loop: the same run to the same bits, stopped or not; sums divided rightly; faults named."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import checked
from torch import Tensor, nn

from vitrail.data.augment import Augment
from vitrail.data.decode import Preprocess
from vitrail.data.loader import Batch, Loader
from vitrail.data.sets import open_data
from vitrail.data.text import Tokenizer
from vitrail.errors import RunError, Stopped, UserError
from vitrail.recipes import RECIPES
from vitrail.tasks.caption import Caption, Captioning, numbered
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.train import loop
from vitrail.train.build import build
from vitrail.train.loop import LossModule, fit, train_step
from vitrail.train.optim import Optimizers
from vitrail.train.run import Run
from vitrail.train.state import RunFolder
from vitrail.vit import ViTConfig
from vitrail.zoo import load, native

CPU = torch.device("cpu")


def small_run(**changes: object) -> Run:
    """Digits with everything that is random switched on."""
    run = RECIPES["digits"](1000)
    model = replace(checked(ViTConfig, run.model), width=16, depth=2, heads=2, dropout=0.1, drop_path=0.2, stem=(4,))
    augment = Augment(crop="shift", shift=1, flip=True, mixup=0.3, erase=0.2)
    run = replace(run, model=model, augment=augment, optim=replace(run.optim, ema=0.9), batch_size=32, eval_every=0.5)
    return replace(run, **changes)  # type: ignore[arg-type]


def train(run: Run, path: Path, steps: int = 30, resume: bool = False) -> dict[str, Tensor]:
    parts, _ = build(run, open_data("digits"), CPU)
    folder = RunFolder(path)
    if not resume:
        folder.begin(run, parts.task.classes)
    fit(run, parts, folder, steps, resume)
    return {**load(path / "best").state_dict(), **{f"last.{k}": v for k, v in load(path / "last").state_dict().items()}}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_of_equal_scores_the_later_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that stays at 0, as CIDEr does for one image, must not keep the weights of the first evaluation."""
    scores = iter((0.5, 0.5, 0.25))
    monkeypatch.setattr(loop, "evaluate", lambda task, *rest: {task.score: next(scores, 0.0)})
    seen: list[str] = []
    save = native.save

    def noted(task: Task, path: Path, *rest: Any) -> None:
        seen.append(path.name)
        save(task, path, *rest)

    monkeypatch.setattr(native, "save", noted)
    train(small_run(eval_every=10 / 57), tmp_path / "run")
    assert seen[:5] == ["best", "last", "best", "last", "last"]


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run()
    whole = train(run, tmp_path / "whole")
    steps = 0

    def count_and_interrupt(*args: object) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps in (7, 16):
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", count_and_interrupt)
    assert threading.current_thread() is threading.main_thread()
    for resume in (False, True):
        with pytest.raises(Stopped, match="go on with `vitrail train --resume"):
            train(run, tmp_path / "parts", resume=resume)
    assert_same(train(run, tmp_path / "parts", resume=True), whole)
    assert steps == 30
    for kind, values in (("val", ("step", "top1")), ("train", ("step", "loss", "lr"))):
        rows = [[r for r in RunFolder(tmp_path / name).rows() if r["kind"] == kind] for name in ("whole", "parts")]
        assert rows[0] and [[r[name] for name in values] for r in rows[0]] == [
            [r[name] for name in values] for r in rows[1]
        ]


def test_a_row_of_the_log_is_the_mean_of_all_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those before an evaluation."""

    def numbered_step(*args: Any) -> dict[str, float]:
        return {**train_step(*args), "loss": args[5] + 1.0}

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


def test_accumulated_parts_give_the_gradient_of_the_whole_batch() -> None:
    # Batch norm's statistics and dropout depend on the cut, so this model has neither.
    run = small_run(augment=Augment(), optim=replace(small_run().optim, optimizer="sgd", lr=0.1, ema=0.0))
    run = replace(run, model=replace(checked(ViTConfig, run.model), dropout=0.0, drop_path=0.0, stem=()))
    weights = []
    for accumulate in (1, 3):
        chosen = replace(run, accumulate=accumulate)
        parts, _ = build(chosen, open_data("digits"), CPU)
        optimizers = Optimizers(parts.task, chosen.optim, 2)
        module = LossModule(parts.task)
        for step, batch in zip(range(3), parts.train.batches(0), strict=False):
            train_step(chosen, module, batch, optimizers, 1.0, step)
        weights.append(parts.task.get_parameter("encoder.blocks.0.mlp.up.weight").detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_names_step_and_layer(tmp_path: Path) -> None:
    run = small_run()
    parts, _ = build(run, open_data("digits"), CPU)

    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("inf")

    parts.task.get_submodule("encoder.blocks.1").norm2 = Overflow()
    folder = RunFolder(tmp_path / "run")
    folder.begin(run, parts.task.classes)
    before = {name: value.clone() for name, value in parts.task.named_parameters()}
    with pytest.raises(RunError, match=r"at step 1; it began in the layer encoder\.blocks\.1\.norm2"):
        fit(run, parts, folder, 5)
    assert not (tmp_path / "run" / "best").exists()
    assert_same(dict(parts.task.named_parameters()), before)


def test_a_captioner_whose_loss_is_not_finite_names_the_layer() -> None:
    config = Captioning(decoder_width=8, decoder_depth=1, decoder_heads=2, most_words=8)
    words = Tokenizer.train(["a dog"], "words", 8)
    encoder = encoder_for(ViTConfig(width=8, depth=1, heads=2, patch=4, image_size=(8, 8)))
    task = Caption(encoder, config, words, Preprocess(size=(8, 8)))
    mlp = task.get_submodule("decoder.blocks.0.mlp")
    mlp.register_forward_hook(lambda *_: torch.tensor(torch.inf))
    batch: Batch = {"image": torch.randn(2, 3, 8, 8), "label": numbered([["a dog"], ["a dog"]], words, 8)}
    batch |= {"sample": torch.arange(2), "epoch": 0}
    run = Run(recipe="x", data="y", model=encoder.config, batch_size=2)
    with pytest.raises(RunError, match=r"the loss is \w+ at step 1; it began in the layer decoder\."):
        train_step(run, LossModule(task), batch, Optimizers(task, run.optim, 1), 1.0, 0)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may be finite and its gradient not: then the weights are looked at before they are scored or saved."""

    def spoil(run: Run, module: LossModule, *args: Any) -> dict[str, float]:
        row = train_step(run, module, *args)
        if args[3] == 25:
            module.task.get_parameter("encoder.blocks.1.mlp.up.weight").data[0, 0] = float("nan")
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(loop, "train_step", spoil)
    with pytest.raises(
        RunError, match=r"encoder\.blocks\.1\.mlp\.up\.weight are no longer finite .* after step 26; the last"
    ):
        train(small_run(), tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state" / "state.pt", weights_only=True)["step"] < 26


def test_a_step_makes_the_next_batch_while_the_device_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    read, made = loop.AsyncScalars.read, Loader._finish

    def reads(self: loop.AsyncScalars) -> dict[str, float]:
        events.append("read")
        return read(self)

    def makes(self: Loader, *args: Any) -> Batch:
        if self.train:
            events.append("make")
        return made(self, *args)

    monkeypatch.setattr(loop.AsyncScalars, "read", reads)
    monkeypatch.setattr(Loader, "_finish", makes)
    train(small_run(), tmp_path / "run", steps=3)
    assert events == ["make", "make", "read", "make", "read", "read"]


def test_a_worker_leaves_ctrl_c_to_its_parent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with loop.stop_asked() as stop:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        signal.raise_signal(signal.SIGINT)
        assert not stop.asked and not caplog.records
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and "press Ctrl-C again" in caplog.text


def test_a_folder_holds_one_run_and_its_recipe_reads_back(tmp_path: Path) -> None:
    run = small_run()
    folder = RunFolder(tmp_path / "run")
    with folder.new():
        folder.begin(run, ["a", "b"])
    assert folder.run() == run
    with pytest.raises(UserError, match="already holds a run"), folder.new():
        pass
    with pytest.raises(UserError, match="no run to go on with"):
        RunFolder(tmp_path / "nothing").run()


def test_the_best_checkpoint_is_chosen_on_val_and_test_is_read_once(tmp_path: Path) -> None:
    train(small_run(), tmp_path / "run")
    rows = RunFolder(tmp_path / "run").rows()
    assert [r["kind"] for r in rows].count("test") == 1 and rows[-1]["kind"] == "done"
    test = next(r for r in rows if r["kind"] == "test")
    assert test["count"] == 360 and sum(map(sum, test["confusion"])) == 360
