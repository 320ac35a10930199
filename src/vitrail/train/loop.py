"""The loop: one for every task, in steps. A run is a function of its recipe, its data and its seed."""

from __future__ import annotations

import itertools
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from vitrail.data.loader import Loader
from vitrail.data.random import seed_for
from vitrail.data.sets import hash_of
from vitrail.errors import Preempted, RunError, Stopped, UserError
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Metric
from vitrail.train.finite import LOWER_RATE, Watch, not_numbers
from vitrail.train.fitting import named_if_full
from vitrail.train.folder import RunFolder
from vitrail.train.hints import Hints
from vitrail.train.joined import scores_of_all
from vitrail.train.keep import Keeper
from vitrail.train.loaders import Loaders, evaluation_loader
from vitrail.train.logits import QKClip, largest_logits
from vitrail.train.lora import merge_lora
from vitrail.train.optim import Average, factor
from vitrail.train.parallel import ALONE, World
from vitrail.train.progress import Progress
from vitrail.train.run import Run
from vitrail.train.scale import loss_scale
from vitrail.train.sharded import loss_module
from vitrail.train.step import compile_network, train_step
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
    world: World = ALONE
    """the processes that train together"""
    held_back: bool = False
    """whether `val` was cut off the training split"""

    @property
    def images(self) -> dict[str, int]:
        """The number of images of each split."""
        loaders = {"train": self.train, "val": self.val, "test": self.test}
        return {name: len(loader.set) for name, loader in loaders.items() if loader is not None}

    @property
    def cut(self) -> dict[str, str]:
        """What identifies the images that are held back for validation, which their content chooses; {} if none are."""
        return {"held_back": hash_of(self.val.set)} if self.held_back else {}

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

    Raises `Stopped` after Ctrl-C, `Preempted` after SIGTERM or SIGUSR1, with the state saved, and `RunError` for losses
    that are not finite and for what ends the run from outside, such as workers that the system kills.
    """
    training = Training(run, components, folder, steps)
    try:
        seconds = training.run_to_end(resume)
    except Halt as halt:
        raise _ended(halt, folder, steps) from None
    except RunError as error:
        raise RunError(f"{error}; {saved_in(folder)}") from None
    return finish(run, components, folder, training.done, seconds, early=training.done < steps)


class Training:
    """The steps of a run, with its log, evaluations and saves. Each process of a run has one."""

    stop: Stop
    progress: Progress
    watch: Watch

    def __init__(self, run: Run, components: Components, folder: RunFolder, steps: int) -> None:
        self.run, self.components, self.folder, self.steps = run, components, folder, steps
        self.task, self.loader, self.world = components.task.train(), components.train, components.world
        if (rule := self.task.score) is None:
            raise UserError(f"the task {self.task.name} has no score to choose a checkpoint by: it cannot be trained")
        self.rule = rule
        self.module = loss_module(self.task, self.world)
        scale = loss_scale(self.loader.device, run.precision, run.batch_size)
        self.optimizers = self.module.optimizers(run.optim, run.compiled, scale)
        self.average = self.module.average(run.optim.ema) if run.optim.ema else None
        self.clip = QKClip(self.task, run.optim.qk_clip) if run.optim.qk_clip else None
        self.keeper = Keeper(run, self.task, folder, self.optimizers, self.average, self.world)
        self.hints = Hints(self.task, replace(run, memory=self.loader.memory))
        self.draws = self.task.draws
        self.every = max(1, round(run.eval_every * self.loader.steps_per_epoch))
        self.done = 0
        """steps so far"""

    def run_to_end(self, resume: bool) -> float:
        """All steps that are left; returns the seconds that all have taken, those before a resume too."""
        if resume:
            self.keeper.load()
            self.module.scatter_whole()
        start = self.done = self.keeper.step
        if start:
            self.hints.resumed(self.folder.rows(), start / self.steps)
        if resume and self.world.is_main:
            epoch = start / self.loader.steps_per_epoch
            where = (
                f"after step {start:,} of {self.steps:,} (epoch {epoch:.3g})" if start else "from its start: no state"
            )
            log.warning(f"resuming {self.folder.path} {where}")
        if self.run.compiled:
            compile_network(self.module, self.run, self.loader.device)
        self.began = time.monotonic()
        self.spent = next((row["seconds"] for row in reversed(self.folder.rows()) if "seconds" in row), 0.0)
        command = shlex.join(["vitrail", *sys.argv[1:]])
        self.folder.log_start(self.run, self.rule, start, command, self.components.images, self.world.size)
        batches = itertools.islice(self.loader.batches(start), max(0, self.steps - start))
        bar = Progress(self.steps, start, self.loader, self.keeper.sums)
        with stop_requested() as self.stop, self.keeper, bar as self.progress:
            self.watch = Watch(self.run, self.task, self.progress, self.module, moved=start > 0)
            try:
                if self.keeper.pending is not None:
                    self.evaluate(self.keeper.pending)
                for batch in self._until_stopped(batches):
                    if self.enough:
                        break
                    with named_if_full(self.run, self.task, self.world):
                        self.step(batch)
                    self.log_and_save(batch)
            except Halt as halt:
                if not halt.alone:
                    self.watch.read()
                    self.keeper.save(self.done, self.progress.sums)
                    self.keeper.wait()
                    self.world.barrier()  # until rank 0 has written: a rank that ends before would end the others
                raise
            except RunError:
                if self.progress.sums:  # such as steps that moved nothing, which `vitrail doctor` looks for
                    self._write_row()
                raise
        if self.world.on_any(self.stop.requested):  # in the last steps, or while the last state was written
            raise self._halt()
        if self.enough:
            if self.progress.sums:
                self._log_row()
            if self.world.is_main:
                self._say_early()
        return self.seconds

    @property
    def enough(self) -> bool:
        """Whether the run ends early: `patience` evaluations in a row had no better score."""
        return self.run.patience is not None and self.keeper.waited >= self.run.patience and self.done < self.steps

    def _say_early(self) -> None:
        rate = factor(self.run.optim, self.done - 1, self.steps, self.loader.steps_per_epoch)
        log.warning(
            f"stopped early after step {self.done} of {self.steps}: no better {self.rule.name} than "
            f"{self.rule.text(self.keeper.best) or 'none'} in {self.keeper.waited} evaluations; the learning rate was "
            f"still {rate:.0%} of its peak, so fewer --epochs, over which it falls to its end, may score higher"
        )

    def _halt(self) -> Halt:
        return Halt(Preempted if self.world.on_any(self.stop.preempted) else Stopped)

    @property
    def seconds(self) -> float:
        """Of the run so far."""
        return self.spent + time.monotonic() - self.began

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches until a stop is requested, which interrupts the wait for one."""
        if self.world.size > 1:  # all stop after the same step: see `log_and_save`
            try:
                yield from batches
            except RunError as error:
                raise Halt(RunError, str(error), alone=True) from None
            return
        while True:
            with self.stop.between_steps():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def step(self, batch: Batch) -> None:
        """One step of training, and what follows it: the bound on logits, the average, the task's own update."""
        run, world, step = self.run, self.world, self.done
        if self.draws:  # a function of (seed, step), so a resumed run draws what the first one did
            torch.manual_seed(seed_for(run.seed, step, *([world.rank] if world.rank else [])))
        if run.early_shape is not None and step < run.early * self.steps:
            batch["image"] = F.interpolate(batch["image"], run.early_shape, mode="bilinear", antialias=True)
            batch |= self.task.target.rescale(batch, run.early_shape)
        if world.size > 1:
            late = self.keeper.late and world.is_main and not self.module.requests.get("save", False)
            self.module.requests = {"stop": self.stop.requested, "preempt": self.stop.preempted, "save": late}
        rate = factor(run.optim, step, self.steps, self.loader.steps_per_epoch)
        scalars = train_step(run, self.module, batch, self.optimizers, rate)
        if self.clip is not None:
            self.clip.after(step, batch["image"])
        self.watch.follow(step + 1, scalars, batch, run.optim.lr * rate)
        if self.average is not None:
            self.average.update(step)
        self.module.task.after_step(step, self.steps)
        self.done = step + 1

    def log_and_save(self, batch: Batch) -> None:
        """After a step: log, evaluate, save and stop where it is time to. `batch` is that of the step.

        Several processes stop and save after the same step: the one after that in which one of them requests it.
        """
        done, last, requests = self.done, self.done == self.steps, self.watch.requests
        evaluating = done % self.every == 0 or last
        stopping = requests.get("stop", False) or (
            evaluating and self.world.size > 1 and self.world.on_any(self.stop.requested)
        )
        late = self.keeper.late if self.world.size == 1 else requests.get("save", False)
        saving = evaluating or stopping or late or self.keeper.due(done)
        if (logging_now := done % LOG_EVERY == 0 or last) or saving:
            self.watch.read(last=last)
        if logging_now:
            self._log_row()
        if saving:
            self.module.gather_whole()
        if evaluating:
            self.keeper.refuse_infinite(done)
            self.world.share_bad(self.loader)
            found = largest_logits(self.task, batch["image"])
            beside = {"attention_logits": found} if found else {}
            if stopping and not last:  # the resumed run evaluates
                self.keeper.save(done, self.progress.sums, pending=beside)
            else:
                self.hints.evaluated(self.evaluate(beside), batch["image"], done / self.steps)
        elif saving:
            self.keeper.save(done, self.progress.sums)
        if stopping and not last:
            raise self._halt()

    def _log_row(self) -> None:
        self.hints.logged(self._write_row())

    def _write_row(self) -> dict[str, float]:
        epoch = self.done / self.loader.steps_per_epoch
        row = self.progress.row()
        self.folder.log(kind="train", step=self.done, epoch=epoch, seconds=self.seconds, **row)
        return row

    def evaluate(self, beside: dict[str, Any]) -> dict[str, Any]:
        """Score `val`, log it with what is `beside`, and save. Returns both.

        If that is interrupted, the state is saved first, and a resumed run evaluates.
        """
        began = time.monotonic()
        self.keeper.wait()  # a process that forks workers should have no other thread
        around = self.stop.between_steps() if self.world.size == 1 else None
        try:
            scores = evaluate(self.task, self.components.loaders, "val", self.average, around=around, world=self.world)
        except Halt:
            self.keeper.save(self.done, self.progress.sums, pending=beside)
            raise
        except RunError as error:  # in one process `between_steps` has made a Halt of it
            raise Halt(RunError, str(error), alone=True) from None
        if (what := not_numbers(self.task, scores, "val")) is not None:  # such weights are no checkpoint
            raise RunError(f"{what} after step {self.done}: {LOWER_RATE}")
        self.task.train()
        self.folder.log(kind="val", step=self.done, seconds=self.seconds, **numbers(scores), **beside)
        self.progress.evaluated(scores, self.rule, time.monotonic() - began)
        self.keeper.score(self.done, scores[self.rule.name], self.progress.sums)
        return scores | beside


def _ended(halt: Halt, folder: RunFolder, steps: int) -> Exception:
    """The exception of a training that ended early, with the newest state that is saved."""
    if not (done := max(folder.states.steps(), default=0)):
        return halt.outcome(f"{halt}; no step was {'saved' if halt.alone else 'finished'}: start the run again")
    return halt.outcome(f"{halt}; step {done} of {steps} is saved: resume with `vitrail train --resume {folder.path}`")


@torch.inference_mode()
def evaluate(
    task: Task,
    loaders: Mapping[str, Loader],
    split: str,
    average: Average | None = None,
    metric: Callable[[], Metric] | None = None,
    final: bool = False,
    around: AbstractContextManager[None] | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """`task.evaluate` on a whole split, with the average of the weights if there is one; `final` as there.

    The call is made in the context `around`, which may end it: the task has its own weights again even then. The ranks
    of `world` share the split, and each has all scores. In the weights' own float32, whatever training computes in.
    """
    current = {name: value.clone() for name, value in task.state_dict().items()} if average else None
    if average:
        task.load_state_dict(average.values)
    task.eval()
    try:
        with around or nullcontext():
            if world.size == 1 or task.whole_split:
                return task.evaluate(loaders, split, metric, final)
            make = task.metric if metric is None else metric
            scores = scores_of_all(world, make, lambda joined: task.evaluate(loaders, split, joined, final))
            world.share_bad(loaders[split])
            return scores
    finally:
        if current:
            task.load_state_dict(current)


def finish(
    run: Run, components: Components, folder: RunFolder, steps: int, seconds: float, early: bool = False
) -> dict[str, Any]:
    """Read the test split once, with the checkpoint that was best on the validation split.

    `steps` are those that were trained; `early` tells that these are fewer than planned.
    """
    task, world = components.task, components.world
    merge_lora(task)
    task.load_state_dict(world.broadcast_weights(lambda: open_files(folder.best).weights))
    split = "test" if components.test else "val"
    try:
        scores = evaluate(task, components.loaders, split, final=True, world=world)
    except UserError as error:  # too many bad images, which should not cost the run
        if split == "val":
            raise
        log.warning(f"the test split is not scored, so the validation split is scored instead: {error}")
        split, scores = "val", evaluate(task, components.loaders, "val", final=True, world=world)
    if (what := not_numbers(task, scores, split)) is not None:
        raise RunError(f"{what}: {LOWER_RATE}")
    if split == "test":
        folder.log(kind="test", step=steps, **scores)
    parameters = sum(p.numel() for p in task.parameters())
    ended = {
        "seconds": seconds,
        "parameters": parameters,
        "skipped": sum(row.get("skipped", 0) for row in folder.rows()),
        **({"stopped_early": True} if early else {}),
    }
    folder.log(kind="done", step=steps, **ended)
    return {"split": split, **scores, **ended}


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that are single numbers: lists would swell the log."""
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def saved_in(folder: RunFolder) -> str:
    """For the error message: what a failed run has saved."""
    return f"the last good checkpoint is {folder.last}" if folder.last.exists() else "no checkpoint was saved yet"
