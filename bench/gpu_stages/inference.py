"""ViT-B/16 in bf16 as the server runs it: eager, compiled, and as an export of PyTorch's."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Row, in_turns, random_model
from torch import Tensor

from gpu_stages.common import TINY, Bench
from vitrail.export import engine_for
from vitrail.export.proof import normalised_noise
from vitrail.predictions.answers import TOLERANCE
from vitrail.serve.engines import compile_task
from vitrail.tasks.task import Task
from vitrail.train.device import autocast
from vitrail.zoo.exports import read

BATCHES = (1, 64)
Forward = Callable[[Tensor], Tensor]
"""normalised images [B, C, H, W] to logits [B, classes]"""


@torch.inference_mode()
def inference(bench: Bench) -> None:
    """Milliseconds of a batch, the difference from float32, and which is the fastest of those that agree."""
    task = random_model("B/16", **(TINY if bench.tiny else {}))
    with tempfile.TemporaryDirectory() as place:
        engine_for(task, Path(place) / "pt2", "pt2", "bf16", None)
        exported: Any = read(Path(place) / "pt2", str(bench.device))
    task = task.to(bench.device)
    counts, size = (1, 2) if bench.tiny else BATCHES, task.preprocess.size
    compared = {f"batch {count}": normalised_noise(task, count, size).to(bench.device) for count in counts}
    expected = {name: logits(task, images) for name, images in compared.items()}
    found: dict[str, Forward] = {}
    for name, forward in variants(bench, task, exported):
        found[name] = forward
        # Measured again with each one more, as compiling may not end in time.
        rows = {batch: measured(bench, found, images, expected[batch]) for batch, images in compared.items()}
        bench.keep("inference", {"tolerance": TOLERANCE, **rows})


def variants(bench: Bench, task: Task, exported: Any) -> Iterator[tuple[str, Forward]]:
    """Each way to run the model in bf16, the one that takes longest to prepare last."""
    mixed = partial(autocast, bench.device, "bf16")

    def run(own: Task, images: Tensor) -> Tensor:
        with mixed():
            return logits(own, images)

    yield "eager", partial(run, task)
    yield "pt2", lambda images: exported.engines["model"](images)[0]
    if not bench.tiny:
        yield "compiled", partial(run, compile_task(task))


def logits(task: Task, images: Tensor) -> Tensor:
    """[B, classes], as the model's program gives them."""
    program = task.programs({"image": images})["model"]
    return program.module(*program.inputs.values())[0]


def measured(bench: Bench, found: dict[str, Forward], images: Tensor, expected: Tensor) -> Row:
    """One batch: the variants take turns. One agrees if no logit is further from float32 than `TOLERANCE` allows."""
    steps: dict[str, Callable[[], object]] = {name: partial(forward, images) for name, forward in found.items()}
    times = in_turns(steps, bench.rounds, warm_up=3, calls=5 * bench.calls, device=bench.device.type)
    row: Row = {}
    for name, each in times.items():
        apart = float((found[name](images).float() - expected).abs().max() / expected.abs().max())
        median = statistics.median(each)
        row[name] = {
            "milliseconds": round(1000 * median, 3),
            "spread": round(1000 * (max(each) - min(each)), 3),
            "images per second": round(len(images) / median, 1),
            "difference": round(apart, 5),
        }
    agreeing = [name for name in found if row[name]["difference"] <= TOLERANCE]
    row["fastest that agrees"] = min(agreeing, key=lambda name: row[name]["milliseconds"], default=None)
    return row
