"""`--accumulate auto`: the fewest micro-batches whose step of training fits in the memory of the device.

The batch size belongs to a recipe's optimisation and stays; only how much of a batch is computed at once is chosen.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from vitrail.data.loader import Batch, Loader
from vitrail.errors import RunError
from vitrail.tasks.task import Task
from vitrail.train.parallel import World
from vitrail.train.run import Run
from vitrail.train.scale import loss_scale
from vitrail.train.step import LossModule, train_step

log = logging.getLogger("vitrail")

TRIED_ON = ("cuda",)
"""types of devices whose full memory is a torch.OutOfMemoryError; on a CPU the system kills the process"""
STEPS = 2
"""steps of a trial: the first allocates the optimizer's state, which the second has beside its forward pass"""
MARGIN = 0.1
"""fraction of the free memory that a trial leaves: later batches may need more, and so may the libraries of the GPU"""


def with_micro_batches(run: Run, task: Task, loader: Loader, world: World) -> Run:
    """The run with a number in place of `accumulate` auto, which one line tells; a run with a number is unchanged.

    Real steps are tried on the first batch, without compiling. Each process tries alone, since one that fails would
    leave the others waiting, and the largest number is that of all. The run then begins as one with that number does.
    RunError if single images do not fit.
    """
    if run.accumulate != "auto":
        return run
    if run.tune.frozen:  # nothing is split
        return replace(run, accumulate=1)
    if loader.device.type not in TRIED_ON:
        log.warning("accumulate: auto needs a CUDA GPU, so batches are not split; if memory runs out, give a number")
        return replace(run, accumulate=1)
    with _unchanged(task, loader.device):
        batch = loader.first(loader.batch_size)
        images = min(world.all_gather_number(len(batch["image"])))
        found = world.all_gather_number(_fewest(run, task, batch, images))
    if 0 in found:
        raise RunError("a step does not fit in the GPU's memory, even image by image: choose a smaller --image-size")
    count, total = max(found), images * world.size
    split = "are not split" if count == 1 else f"are split into {count} micro-batches of {-(-total // count)}"
    log.warning(f"accumulate: batches of {total} images {split}, which fit in the GPU's memory")
    return replace(run, accumulate=count)


def _fewest(run: Run, task: Task, batch: Batch, images: int) -> int:
    """The first of 1, 2, 4, ... micro-batches that fit, up to one per image; 0 if none do."""
    count = 1
    while images and not _fits(replace(run, accumulate=count), task, batch):
        if count == images:
            return 0
        count = min(2 * count, images)
    return count  # 1 if no image can be read, which the run will tell


def _fits(run: Run, task: Task, batch: Batch) -> bool:
    """Whether a few steps fit, with all that a step of the run has beside it."""
    gc.collect()  # what the trial before held is free now
    torch.cuda.empty_cache()
    module, device = LossModule(task), batch["image"].device
    try:
        optimizers = module.optimizers(run.optim, False, loss_scale(device, run.precision, run.batch_size))
        average = module.average(run.optim.ema) if run.optim.ema else None
        for step in range(STEPS):
            train_step(run, module, batch, optimizers, 1.0).read()
            if average is not None:
                average.update(step)
    except torch.OutOfMemoryError:
        return False
    finally:
        task.zero_grad()  # an optimizer that fails leaves gradients
    return True


@contextmanager
def _unchanged(task: Task, device: torch.device) -> Iterator[None]:
    """A block of trials, which a GPU lets take all free memory but `MARGIN`; all that a run reads is then as before."""
    task.train()
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*task.parameters(), *task.buffers())]
    gpu = []
    if device.type == "cuda":  # by its number: PyTorch sets a limit for no device without one
        gpu = [torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)]
    for each in gpu:
        free, total = torch.cuda.mem_get_info(each)
        allowed = torch.cuda.memory_reserved(each) + (1 - MARGIN) * free
        torch.cuda.set_per_process_memory_fraction(allowed / total, each)
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(gpu):
        try:
            yield
        finally:
            for each in gpu:
                torch.cuda.set_per_process_memory_fraction(1.0, each)
            for tensor, value in kept:
                tensor.detach().copy_(value)
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def named_if_full(run: Run, task: Task, world: World) -> Iterator[None]:
    """Around a step of training: a full memory of the GPU becomes a RunError that says what needs less."""
    try:
        yield
    except torch.OutOfMemoryError:
        whole = task.whole_batch or world.shard or run.cuda_graphs
        remedy = "a smaller --batch-size" if whole else f"--accumulate auto, or a number above {run.accumulate}"
        raise RunError(f"the GPU's memory is full in a step of training: start again with {remedy}") from None
