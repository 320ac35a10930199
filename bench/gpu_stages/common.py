"""What the stages share: the device, the time that is left, the rows, and models to measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import ROOT, Row, in_turns, record, recorded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.recipes import RECIPES
from vitrail.tasks.classify import Classify
from vitrail.train.run import Run, with_fields

TINY: Row = {"width": 32, "depth": 2, "heads": 2, "image_size": 32}


class Bench:
    """One stage's device, number of rounds and time limit, and the rows of all stages."""

    def __init__(self, tiny: bool, data: str | None, results: Path) -> None:
        self.tiny, self.data, self.results = tiny, data, results
        self.device = torch.device("cpu" if tiny else "cuda")
        self.scratch = results / "runs" if tiny else ROOT / "runs" / "gpu"
        """where trainings write, which is too much to bring back from another machine"""
        self.rounds, self.calls = (2, 1) if tiny else (7, 4)
        self.deadline = float("inf")

    def begin(self, limit: float) -> None:
        """Start the clock of a stage that may take `limit` seconds."""
        self.deadline = time.monotonic() + limit

    def left(self) -> float:
        """Seconds until the stage is stopped: one that measures many things leaves out the last of them."""
        return self.deadline - time.monotonic()

    @property
    def rows(self) -> Row:
        """The rows of all stages so far."""
        return recorded("gpu", self.results)

    def keep(self, stage: str, row: Row) -> None:
        """Record a stage's row with those of the other stages."""
        record("gpu", {**self.rows, stage: row}, self.results)

    def wait(self) -> None:
        """Until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Drop compiled code and cached memory."""
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def matrix_rate(self) -> float:
        """Floating-point operations per second of a large product of random bf16 matrices: a median."""
        side = 256 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        times = in_turns({"product": lambda: a @ b}, self.rounds, warm_up=3, calls=5, device=self.device.type)
        return 2 * side**3 / statistics.median(times["product"])

    def recipe(self, name: str, **changes: object) -> Run:
        """A recipe of CIFAR-10; with `--tiny` a small network on `digits`, which is not compiled."""
        if self.tiny:
            small = {"width": 32, "depth": 1, "heads": 2, "stem": (4, 8), "batch_size": 64, "early_size": None}
            changes |= {**small, "compile": False, "data": "digits", "epochs": 0.2}
        return with_fields(RECIPES[name](45_000), changes)


def classifier(size: str, tiny: bool) -> Classify:
    """A new model of a named size, or a tiny one."""
    model = vitrail.create(size, classes=1000, **(TINY if tiny else {}))
    assert isinstance(model, Classify)
    return model


def flops(make: Callable[[], Classify]) -> float:
    """Operations of a training step per image: three times those of the forward pass, counted product by product."""
    with torch.device("meta"):
        model = make()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(1, 3, *model.encoder.config.image_size, device="meta"))
    return 3.0 * counter.get_total_flops()
