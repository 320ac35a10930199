"""The line at the start of a run that reads from disk: how fast images are decoded for it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from vitrail.data.loader import Loader
from vitrail.errors import UserError
from vitrail.process import cores
from vitrail.tasks.task import Task
from vitrail.train.device import autocast
from vitrail.train.run import Run

IMAGES, CALLS = 32, 3
"""images of a batch that is timed, and how often it is"""


def decoding_line(run: Run, task: Task, loader: Loader, rows: Sequence[dict[str, Any]] = ()) -> str | None:
    """How many images per second this machine decodes, for a loader that reads from disk; None for any other.

    Also what its GPUs need: from `rows`, those of the run's log, if it has trained before, else by a short measurement.
    """
    if loader.memory or loader.set.streamed is not None:
        return None
    here = processes_here(loader.world)
    # More workers than cores decode no faster.
    rate = loader.rate() * min(max(1, loader.workers) * here, cores())
    who = {0: "the main process decodes", 1: "1 worker decodes"}.get(loader.workers, f"{loader.workers} workers decode")
    gpu = "the GPU took", "the GPU needs", "it"
    if here > 1:
        of = {0: "", 1: " with 1 worker each"}.get(loader.workers, f" with {loader.workers} workers each")
        who, gpu = f"{here} processes{of} decode", (f"their {here} GPUs took", f"their {here} GPUs need", "they")
    own = ""
    if loader.device.type == "cuda":
        if (need := needed(rows)) is not None:  # the log counts the images of all processes
            own = f", and {gpu[0]} about {need * here / loader.world:,.0f} images/s when {gpu[2]} did not wait for data"
        elif not run.tune.frozen and (need := measured(run, task, loader)) is not None:
            need *= here
            own = f", and {gpu[1]} about {need:,.0f} images/s (measured on {IMAGES} images, without compiling)"
    return f"the images are read from disk: {who} about {rate:,.0f} images/s{own}"


def processes_here(world: int) -> int:
    """How many of the `world` processes of a run are on this machine; all, if what started them does not tell."""
    return min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def needed(rows: Sequence[dict[str, Any]]) -> float | None:
    """Images per second of a run while it did not wait for data, by the last row of its log; None if it is unknown."""
    row = next((row for row in reversed(rows) if "images_per_s" in row), None)
    return row["images_per_s"] / (1 - row["wait"]) if row is not None and row["wait"] < 1 else None


def measured(run: Run, task: Task, loader: Loader) -> float | None:
    """Images per second of the forward and backward pass, on a few images of the run.

    None if they are all bad, or do not fit in the memory of the GPU at once. Nothing that the run depends on changes.
    It is a guess: compiled networks and larger batches are faster.
    """
    training, parameters = task.training, [p for p in task.parameters() if p.requires_grad]
    devices = [loader.device] if loader.device.type == "cuda" else []
    # Compiling would take minutes, and again for the batches of the run.
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices):
        try:
            if not len((batch := loader.first(IMAGES))["image"]):
                return None
            task.eval()  # so that batch norm's statistics stay; the products are those of training
            for call in range(CALLS + 1):  # the first is slower
                if call == 1:
                    _wait(loader.device)
                    began = time.perf_counter()
                with autocast(loader.device, run.precision):
                    loss = task.loss(batch)["loss"]
                torch.autograd.grad(loss, parameters, allow_unused=True)
            _wait(loader.device)
        except (UserError, torch.OutOfMemoryError):  # the micro-batches of the run may be smaller than this one
            return None
        finally:
            task.train(training)
    return CALLS * len(batch["image"]) / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
