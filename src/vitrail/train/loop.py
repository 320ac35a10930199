"""The loop: one for every task, in steps. A run is a function of its recipe, its data and its seed."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.loader import Loader
from vitrail.data.random import seed_for
from vitrail.errors import RunError, Stopped, UserError, warn_once
from vitrail.tasks.task import Task
from vitrail.tasks.values import Metric
from vitrail.train.device import release_memory
from vitrail.train.finite import Watch, no_number, not_finite
from vitrail.train.joined import scores_of_all
from vitrail.train.loaders import Loaders, evaluation_loader
from vitrail.train.logits import largest_logits
from vitrail.train.lora import merge_lora, merged
from vitrail.train.optim import Average, factor
from vitrail.train.parallel import ALONE, World
from vitrail.train.progress import Progress
from vitrail.train.run import Run
from vitrail.train.sharded import loss_module
from vitrail.train.state import RunFolder
from vitrail.train.step import train_step
from vitrail.zoo.files import open_files

log = logging.getLogger("vitrail")

LOG_EVERY = 20
"""steps between rows of metrics.jsonl"""
SAVE_EVERY = 300.0
"""seconds between saved states; an evaluation saves one too"""


@dataclass
class Components:
    """The components of a run, built by `train/build.py`."""

    task: Task
    train: Loader
    val: Loader
    test: Loader | None
    world: World = ALONE
    """the processes that train together"""

    @cached_property
    def loaders(self) -> Loaders:
        """By split, for evaluation."""
        train = self.train
        makers: dict[str, Callable[[], Loader]] = {"val": lambda: self.val}
        if train.train:
            how = (train.device, train.workers, train.seed, train.max_bad, None, train.rank, train.world)
            makers["train"] = lambda: evaluation_loader(self.task, train.set, *how)
        else:
            makers["train"] = lambda: train
        if (test := self.test) is not None:
            makers["test"] = lambda: test
        return Loaders(makers)


def fit(run: Run, components: Components, folder: RunFolder, steps: int, resume: bool = False) -> dict[str, Any]:
    """Train for `steps` steps and return the scores of the best checkpoint, on the test split where there is one.

    Raises `Stopped` after Ctrl-C or SIGTERM, with the state saved, and `RunError` for losses that are not finite.
    """
    try:
        seconds = _train(run, components, folder, steps, resume)
    except RunError as error:
        raise RunError(f"{error}; {saved_in(folder)}") from None
    return finish(run, components, folder, steps, seconds)


def _train(run: Run, components: Components, folder: RunFolder, steps: int, resume: bool) -> float:
    """All steps and evaluations; returns the seconds that they took."""
    task, loader, world = components.task.train(), components.train, components.world
    module, draws = loss_module(task, world), task.draws
    optimizers = module.optimizers(run.optim, run.compiled)
    average = module.average(run.optim.ema) if run.optim.ema else None
    start, best, sums = folder.load_state(task, optimizers, average) if resume else (0, None, {})
    if resume:
        module.read_whole()
    if (rule := task.score) is None:
        raise UserError(f"the task {task.name} has no score to choose a checkpoint by: it cannot be trained")
    if run.compiled:
        module.compile(dynamic=False)
    began = saved = time.monotonic()
    spent = next((row["seconds"] for row in reversed(folder.rows()) if "seconds" in row), 0.0)
    folder.log_start(rule, start, shlex.join(["vitrail", *sys.argv[1:]]))
    every = max(1, round(run.eval_every * loader.steps_per_epoch))
    batches = itertools.islice(loader.batches(start), max(0, steps - start))
    with stop_requested() as stop, Progress(steps, start, loader, sums) as progress:
        watch = Watch(task, progress, module)
        for step, batch in enumerate(batches, start):
            if draws:  # a function of (seed, step), so a resumed run draws what the first one did
                torch.manual_seed(seed_for(run.seed, step, *([world.rank] if world.rank else [])))
            if run.early_shape is not None and step < run.early * steps:
                batch["image"] = F.interpolate(batch["image"], run.early_shape, mode="bilinear", antialias=True)
                batch = task.target.rescale(batch, run.early_shape)
            rate = factor(run.optim, step, steps, loader.steps_per_epoch)
            due = time.monotonic() - saved > SAVE_EVERY
            if world.size > 1:  # all stop and save after the same step: the one after that in which one asks for it
                module.requests = {"stop": stop.requested, "save": due and world.leads}
                saved = time.monotonic() if due else saved
            scalars = train_step(run, module, batch, optimizers, rate)
            watch.follow(step + 1, scalars, batch, run.optim.lr * rate)
            if average is not None:
                average.update(step)
            module.task.after_step(step, steps)
            done = step + 1
            seconds = spent + time.monotonic() - began
            evaluating, interrupted = done % every == 0 or done == steps, stop.requested
            if world.size > 1:
                interrupted, due = watch.requests.get("stop", False), watch.requests.get("save", False)
            saving = evaluating or interrupted or due
            logging_now = done % LOG_EVERY == 0 or done == steps
            if logging_now or saving:
                watch.read(last=done == steps)
            if saving:
                module.write_whole()
            if saving and (name := not_finite(task)) is not None:
                raise RunError(f"{no_number(name)} after step {done}")
            if logging_now:
                epoch = done / loader.steps_per_epoch
                folder.log(kind="train", step=done, epoch=epoch, seconds=seconds, **progress.row())
            if evaluating:
                world.share_bad(loader)
                scores = evaluate(task, components.loaders, "val", average, world=world)
                task.train()
                logits = {"attention_logits": found} if (found := largest_logits(task, batch["image"])) else {}
                seconds = spent + time.monotonic() - began
                folder.log(kind="val", step=done, seconds=seconds, **numbers(scores), **logits)
                progress.evaluated(scores, rule)
                weights = merged(average.values if average else task.state_dict())
                if world.leads:
                    best = keep(scores[rule.name], best, task, folder, weights)
            if saving:
                folder.save_state(done, best, task, optimizers, average, progress.sums)
                saved = time.monotonic()
                release_memory()
            if interrupted and done < steps:
                raise Stopped(
                    f"stopped after step {done} of {steps}; resume with `vitrail train --resume {folder.path}`"
                )
    return spent + time.monotonic() - began


def keep(
    score: float | None, best: float | None, task: Task, folder: RunFolder, weights: dict[str, Tensor]
) -> float | None:
    """Save the weights as the last ones, and as the best ones if they are; returns the best score."""
    assert task.score is not None
    if score is None:
        warn_once(f"the validation split has no {task.score.name}: the newest checkpoint counts as the best")
    if score is None or task.score.better(score, best):
        best = best if score is None else score
        task.save(folder.best, weights)
    task.save(folder.last, weights)
    return best


@torch.inference_mode()
def evaluate(
    task: Task,
    loaders: Mapping[str, Loader],
    split: str,
    average: Average | None = None,
    metric: Callable[[], Metric] | None = None,
    final: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """`task.evaluate` on a whole split, with the average of the weights if there is one; `final` as there.

    The ranks of `world` share the split, and each has all scores. In the weights' own float32, whatever training
    computes in: `predict` does so too, on every processor.
    """
    current = {name: value.clone() for name, value in task.state_dict().items()} if average else None
    if average:
        task.load_state_dict(average.values)
    task.eval()
    if world.size == 1 or task.whole_split:
        scores = task.evaluate(loaders, split, metric, final)
    else:
        make = task.metric if metric is None else metric
        scores = scores_of_all(world, make, lambda joined: task.evaluate(loaders, split, joined, final))
        world.share_bad(loaders[split])
    if current:
        task.load_state_dict(current)
    return scores


def finish(run: Run, components: Components, folder: RunFolder, steps: int, seconds: float) -> dict[str, Any]:
    """Read the test split once, with the checkpoint that was best on the validation split."""
    task, world = components.task, components.world
    merge_lora(task)
    task.load_state_dict(world.weights_of_first(lambda: open_files(folder.best).weights))
    split = "test" if components.test else "val"
    try:
        scores = evaluate(task, components.loaders, split, final=True, world=world)
    except UserError as error:  # too many bad images, which should not cost the run
        if split == "val":
            raise
        log.warning(f"the test split is not scored, so the validation split is scored instead: {error}")
        split, scores = "val", evaluate(task, components.loaders, "val", final=True, world=world)
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


class _Stop:
    requested = False


@contextmanager
def stop_requested() -> Iterator[_Stop]:
    """Turn Ctrl-C and SIGTERM into a flag; a second Ctrl-C stops at once."""
    stop = _Stop()
    process = os.getpid()

    def ask(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a worker: a terminal's Ctrl-C reaches it too, and its parent ends it
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        log.warning("stopping after this step and saving; press Ctrl-C again to stop at once")

    try:
        old = [(number, signal.signal(number, ask)) for number in (signal.SIGINT, signal.SIGTERM)]
    except ValueError:  # signals reach only the main thread
        old = []
    try:
        yield stop
    finally:
        for number, handler in old:
            signal.signal(number, handler)
