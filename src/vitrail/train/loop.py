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
from torch import Tensor, nn

from vitrail.data.loader import Loader
from vitrail.data.random import seed_for
from vitrail.errors import RunError, Stopped, UserError, warn_once
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Metric
from vitrail.train.device import autocast, release_memory
from vitrail.train.loaders import Loaders, evaluation_loader
from vitrail.train.lora import merge_lora, merged
from vitrail.train.optim import Average, Optimizers, factor
from vitrail.train.progress import Progress
from vitrail.train.run import Run
from vitrail.train.state import RunFolder
from vitrail.zoo.files import open_files

log = logging.getLogger("vitrail")

LOG_EVERY = 20
"""steps between rows of metrics.jsonl"""
SAVE_EVERY = 300.0
"""seconds between saved states; an evaluation saves one too"""


class LossModule(nn.Module):
    """A task whose forward is its loss: what torch.compile and DDP wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task.loss(batch)


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

    Raises `Stopped` after Ctrl-C or SIGTERM, with the state saved, and `RunError` for a loss that is not finite.
    """
    task, loader = components.task, components.train
    optimizers = Optimizers(task, run.optim)
    average = Average(task, run.optim.ema) if run.optim.ema else None
    start, best, sums = folder.load_state(task, optimizers, average) if resume else (0, None, {})
    if (rule := task.score) is None:
        raise UserError(f"the task {task.name} has no score to choose a checkpoint by: it cannot be trained")
    module = LossModule(task)
    if run.compiled:
        module.compile(dynamic=False)
    began = saved = time.monotonic()
    spent = next((row["seconds"] for row in reversed(folder.rows()) if "seconds" in row), 0.0)
    folder.log_start(rule, start, shlex.join(["vitrail", *sys.argv[1:]]))
    every = max(1, round(run.eval_every * loader.steps_per_epoch))
    batches = Prefetcher(itertools.islice(loader.batches(start), max(0, steps - start)))
    with stop_requested() as stop, Progress(steps, start, loader, sums) as progress:
        for step in range(start, steps):
            task.train()
            # Dropout and its like are a function of (seed, step), so a resumed run draws what the first one did.
            torch.manual_seed(seed_for(run.seed, step))
            batch = batches.next()
            if run.early_shape is not None and step < run.early * steps:
                batch["image"] = F.interpolate(batch["image"], run.early_shape, mode="bilinear", antialias=True)
                batch = task.target.rescale(batch, run.early_shape)
            try:
                rate = factor(run.optim, step, steps)
                row = train_step(run, module, batch, optimizers, rate, step, batches.prefetch)
            except RunError as error:
                raise RunError(f"{error}; {saved_in(folder)}") from None
            if average is not None:
                average.update(task, step)
            task.after_step(step, steps)
            progress.step(row, len(batch["image"]))
            done = step + 1
            seconds = spent + time.monotonic() - began
            if done % LOG_EVERY == 0 or done == steps:
                epoch = done / loader.steps_per_epoch
                folder.log(kind="train", step=done, epoch=epoch, seconds=seconds, **progress.row())
            evaluating, interrupted = done % every == 0 or done == steps, stop.requested
            saving = evaluating or interrupted or time.monotonic() - saved > SAVE_EVERY
            if saving and (name := not_finite(task)) is not None:
                raise RunError(f"{no_number(name)} after step {done}; {saved_in(folder)}")
            if evaluating:
                scores = evaluate(task, components.loaders, "val", average)
                folder.log(kind="val", step=done, seconds=spent + time.monotonic() - began, **numbers(scores))
                progress.evaluated(scores, rule)
                weights = merged(average.values if average else task.state_dict())
                if (score := scores[rule.name]) is None:
                    warn_once(f"the validation split has no {rule.name}: the newest checkpoint counts as the best")
                if score is None or rule.better(score, best):
                    best = best if score is None else score
                    task.save(folder.best, weights)
                task.save(folder.last, weights)
            if saving:
                folder.save_state(done, best, task, optimizers, average, progress.sums)
                saved = time.monotonic()
                release_memory()
            if interrupted and done < steps:
                raise Stopped(
                    f"stopped after step {done} of {steps}; resume with `vitrail train --resume {folder.path}`"
                )
    return finish(run, components, folder, steps, spent + time.monotonic() - began)


class Prefetcher:
    """Batches that can be loaded early, while the device is busy with the batch before."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.ready: Batch | None = None

    def prefetch(self) -> None:
        """Load the next batch, if there is one."""
        if self.ready is None:
            self.ready = next(self.batches, None)

    def next(self) -> Batch:
        """The next batch. Raises StopIteration after the last."""
        ready, self.ready = self.ready, None
        return next(self.batches) if ready is None else ready


class AsyncScalars:
    """Scalars copied from the device asynchronously: reading them does not wait for work that was queued later."""

    def __init__(self, numbers: dict[str, Tensor]) -> None:
        self.names = list(numbers)
        stacked = torch.stack([number.detach().float() for number in numbers.values()])
        self.values = stacked.to("cpu", non_blocking=stacked.is_cuda)
        self.event = torch.cuda.Event() if stacked.is_cuda else None
        if self.event is not None:
            self.event.record()

    def read(self) -> dict[str, float]:
        """The scalars; waits for the copy."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def train_step(
    run: Run,
    module: LossModule,
    batch: Batch,
    optimizers: Optimizers,
    factor: float,
    step: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One step on one batch, in `run.accumulate` micro-batches.

    A loss is a sum over items, and so is the gradient that micro-batches add up to; both are divided once, by the
    number of items of the whole batch, which for captions only the last micro-batch makes known.

    `meanwhile` is called while the device computes: the loss is read after it, so that no device waits for the next
    batch, and before the weights move, so that a loss which is not finite leaves them as they were.
    """
    device = batch["image"].device
    totals: dict[str, Any] = {}
    for micro_batch in module.task.target.split(batch, run.accumulate):
        with autocast(device, run.precision):
            found = module(micro_batch)
        found["loss"].backward()
        for name, value in found.items():
            totals[name] = totals.get(name, 0) + value.detach()
    reading = AsyncScalars(totals)
    meanwhile()
    sums = reading.read()
    count = sums.pop("count") or 1.0  # a batch without items has zero sums
    means = {name: total / count for name, total in sums.items()}
    loss = means["loss"]
    if loss != loss or abs(loss) == float("inf"):
        raise RunError(f"the loss is {loss} at step {step + 1}; {_where(module.task, batch)}")
    parameters = optimizers.parameters()
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / count)
    if run.optim.clip:
        nn.utils.clip_grad_norm_(parameters, run.optim.clip)
    optimizers.step(factor)
    return {**means, "lr": run.optim.lr * factor}


@torch.inference_mode()
def evaluate(
    task: Task,
    loaders: Mapping[str, Loader],
    split: str,
    average: Average | None = None,
    metric: Callable[[], Metric] | None = None,
    final: bool = False,
) -> dict[str, Any]:
    """`task.evaluate` on a whole split, with the average of the weights if there is one; `final` as there.

    In the weights' own float32, whatever training computes in: `predict` does so too, on every processor.
    """
    current = {name: value.clone() for name, value in task.state_dict().items()} if average else None
    if average:
        task.load_state_dict(average.values)
    task.eval()
    scores = task.evaluate(loaders, split, metric, final)
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
    folder.log(kind="done", step=steps, seconds=seconds, parameters=parameters)
    return {"split": split, **scores, "seconds": seconds, "parameters": parameters}


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that are single numbers: lists would swell the log."""
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def saved_in(folder: RunFolder) -> str:
    """For the error message: what a failed run has saved."""
    return f"the last good checkpoint is {folder.last}" if folder.last.exists() else "no checkpoint was saved yet"


@torch.no_grad()
def not_finite(task: nn.Module) -> str | None:
    """The name of the first weights that are not finite numbers."""
    named = dict(task.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).tolist()
    return next((name for name, good in zip(named, finite, strict=True) if not good), None)


def no_number(name: str) -> str:
    return f"the weights of {name} are no longer finite (lower the learning rate and start again)"


@torch.no_grad()
def _where(task: Task, batch: Batch) -> str:
    """In words, the first layer that gives a number that is not finite for this batch."""
    if (name := not_finite(task)) is not None:
        return no_number(name)
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    leaves = [(name, m) for name, m in task.named_modules() if not list(m.children())]
    # What goes through nothing comes from the layer around it: fused attention is a function, no module.
    handles = [
        module.register_forward_hook(look(name.rpartition(".")[0] if isinstance(module, nn.Identity) else name))
        for name, module in leaves
    ]
    try:
        if not batch["image"].isfinite().all():
            return "the images hold numbers that are not finite: check the data"
        task.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return f"it began in the layer {found[0]}" if found else "every layer is finite, the loss itself is not"


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
