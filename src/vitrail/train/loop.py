"""The loop: one for every task, in steps. A run is a function of its recipe, its data and its seed."""

from __future__ import annotations

import itertools
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from vitrail.data.loader import Loader
from vitrail.data.random import seed_for
from vitrail.errors import RunError, UserError
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Metric
from vitrail.train.finite import Watch
from vitrail.train.keep import Keeper
from vitrail.train.loaders import Loaders, evaluation_loader
from vitrail.train.logits import QKClip, largest_logits
from vitrail.train.lora import merge_lora
from vitrail.train.optim import Average, Optimizers, factor
from vitrail.train.progress import Progress
from vitrail.train.run import Run
from vitrail.train.scale import loss_scale
from vitrail.train.state import RunFolder
from vitrail.train.step import LossModule, compile_network, train_step
from vitrail.train.stop import Halt, Stop, stop_requested
from vitrail.zoo.files import open_files

log = logging.getLogger("vitrail")

LOG_EVERY = 20
"""steps between rows of metrics.jsonl"""


@dataclass
class Components:
    """The components of a run, built by `train/build.py`."""

    task: Task
    train: Loader
    val: Loader
    test: Loader | None

    @cached_property
    def loaders(self) -> Loaders:
        """By split, for evaluation."""
        train = self.train
        makers: dict[str, Callable[[], Loader]] = {"val": lambda: self.val}
        if train.train:
            how = (train.device, train.workers, train.seed, train.max_bad)
            makers["train"] = lambda: evaluation_loader(self.task, train.set, *how)
        else:
            makers["train"] = lambda: train
        if (test := self.test) is not None:
            makers["test"] = lambda: test
        return Loaders(makers)


def fit(run: Run, components: Components, folder: RunFolder, steps: int, resume: bool = False) -> dict[str, Any]:
    """Train for `steps` steps and return the scores of the best checkpoint, on the test split where there is one.

    Raises `Stopped` after Ctrl-C, `Preempted` after SIGTERM or SIGUSR1, with the state saved, and `RunError` for losses
    that are not finite and for what ends the run from outside, such as workers that the system kills.
    """
    try:
        seconds = _train(run, components, folder, steps, resume)
    except Halt as halt:
        raise _ended(halt, folder, steps) from None
    except RunError as error:
        raise RunError(f"{error}; {saved_in(folder)}") from None
    return finish(run, components, folder, steps, seconds)


def _train(run: Run, components: Components, folder: RunFolder, steps: int, resume: bool) -> float:
    """All steps and evaluations; returns the seconds that they took."""
    task, loader = components.task.train(), components.train
    scale = loss_scale(loader.device, run.precision, run.batch_size)
    optimizers = Optimizers(task, run.optim, compile=run.compiled, scale=scale)
    clip = QKClip(task, run.optim.qk_clip) if run.optim.qk_clip else None
    average = Average(task, run.optim.ema) if run.optim.ema else None
    if (rule := task.score) is None:
        raise UserError(f"the task {task.name} has no score to choose a checkpoint by: it cannot be trained")
    keeper = Keeper(run, task, folder, optimizers, average)
    if resume:
        keeper.load()
    start = done = keeper.step
    module, draws = LossModule(task), task.draws
    if run.compiled:
        compile_network(module, run, loader.device)
    began = time.monotonic()
    spent = next((row["seconds"] for row in reversed(folder.rows()) if "seconds" in row), 0.0)
    folder.log_start(rule, start, shlex.join(["vitrail", *sys.argv[1:]]))
    every = max(1, round(run.eval_every * loader.steps_per_epoch))
    batches = itertools.islice(loader.batches(start), max(0, steps - start))
    with stop_requested() as stop, keeper, Progress(steps, start, loader, keeper.sums) as progress:
        watch = Watch(task, progress)

        def evaluation(beside: dict[str, Any]) -> None:
            """Evaluate and save; if that is interrupted, the state is saved first, and a resumed run evaluates."""
            keeper.wait()  # a process that forks workers should have no other thread
            try:
                scores = evaluate(task, components.loaders, "val", average, around=stop.between_steps())
            except Halt:
                keeper.save(done, progress.sums, pending=beside)
                raise
            task.train()
            seconds = spent + time.monotonic() - began
            folder.log(kind="val", step=done, seconds=seconds, **numbers(scores), **beside)
            progress.evaluated(scores, rule)
            keeper.score(done, scores[rule.name], progress.sums)

        try:
            if keeper.pending is not None:
                evaluation(keeper.pending)
            for step, batch in enumerate(_until(stop, batches), start):
                if draws:  # a function of (seed, step), so a resumed run draws what the first one did
                    torch.manual_seed(seed_for(run.seed, step))
                if run.early_shape is not None and step < run.early * steps:
                    batch["image"] = F.interpolate(batch["image"], run.early_shape, mode="bilinear", antialias=True)
                    batch = task.target.rescale(batch, run.early_shape)
                rate = factor(run.optim, step, steps, loader.steps_per_epoch)
                scalars = train_step(run, module, batch, optimizers, rate)
                if clip is not None:
                    clip.after(step, batch["image"])
                watch.follow(step + 1, scalars, batch, run.optim.lr * rate)
                if average is not None:
                    average.update(step)
                task.after_step(step, steps)
                done = step + 1
                seconds = spent + time.monotonic() - began
                evaluating = done % every == 0 or done == steps
                saving = evaluating or keeper.due(done)
                logging_now = done % LOG_EVERY == 0 or done == steps
                if logging_now or saving:
                    watch.read(last=done == steps)
                if logging_now:
                    epoch = done / loader.steps_per_epoch
                    folder.log(kind="train", step=done, epoch=epoch, seconds=seconds, **progress.row())
                if evaluating:
                    keeper.refuse_infinite(done)
                    evaluation({"attention_logits": found} if (found := largest_logits(task, batch["image"])) else {})
                elif saving:
                    keeper.save(done, progress.sums)
        except Halt:
            watch.read()
            keeper.save(done, progress.sums)
            keeper.wait()
            raise
    if stop.requested:  # while the last state was written
        raise Halt(stop.outcome)
    return spent + time.monotonic() - began


def _ended(halt: Halt, folder: RunFolder, steps: int) -> Exception:
    """The exception of a training that ended early, with the state after its last step saved."""
    if not (done := max(folder.states.steps(), default=0)):
        return halt.outcome(f"{halt}; no step was finished: start the run again")
    return halt.outcome(f"{halt}; step {done} of {steps} is saved: resume with `vitrail train --resume {folder.path}`")


def _until(stop: Stop, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches until a stop is requested, which interrupts the wait for one."""
    while True:
        with stop.between_steps():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@torch.inference_mode()
def evaluate(
    task: Task,
    loaders: Mapping[str, Loader],
    split: str,
    average: Average | None = None,
    metric: Callable[[], Metric] | None = None,
    final: bool = False,
    around: AbstractContextManager[None] | None = None,
) -> dict[str, Any]:
    """`task.evaluate` on a whole split, with the average of the weights if there is one; `final` as there.

    The call is made in the context `around`, which may end it: the task has its own weights again even then.

    In the weights' own float32, whatever training computes in.
    """
    current = {name: value.clone() for name, value in task.state_dict().items()} if average else None
    if average:
        task.load_state_dict(average.values)
    task.eval()
    try:
        with around or nullcontext():
            scores = task.evaluate(loaders, split, metric, final)
    finally:
        if current:
            task.load_state_dict(current)
    return scores


def finish(run: Run, components: Components, folder: RunFolder, steps: int, seconds: float) -> dict[str, Any]:
    """Read the test split once, with the checkpoint that was best on the validation split."""
    task = components.task
    merge_lora(task)
    task.load_state_dict(open_files(folder.best).weights)
    split = "test" if components.test else "val"
    try:
        scores = evaluate(task, components.loaders, split, final=True)
    except UserError as error:  # too many bad images, which should not cost the run
        if split == "val":
            raise
        log.warning(f"the test split is not scored, so the validation split is scored instead: {error}")
        split, scores = "val", evaluate(task, components.loaders, "val", final=True)
    if split == "test":
        folder.log(kind="test", step=steps, **scores)
    parameters = sum(p.numel() for p in task.parameters())
    ended = {
        "seconds": seconds,
        "parameters": parameters,
        "skipped": sum(row.get("skipped", 0) for row in folder.rows()),
    }
    folder.log(kind="done", step=steps, **ended)
    return {"split": split, **scores, **ended}


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that are single numbers: lists would swell the log."""
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def saved_in(folder: RunFolder) -> str:
    """For the error message: what a failed run has saved."""
    return f"the last good checkpoint is {folder.last}" if folder.last.exists() else "no checkpoint was saved yet"
