"""How many operators the host dispatches in a training step of the recipe `cifar10`, compiled as on a GPU.

    TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE=1 python bench/dispatch.py

On a GPU each operator is at least one launch, which takes 5 to 10 microseconds of the host. The recipe is unchanged but
for its width. What CUDA would compile is compiled for the CPU here; the variable lets the profiler see the compiled
kernels. An event counts if its name begins with `aten::` and no event above it does; each compiled kernel counts one.
Reads CIFAR-10 from the folder that `VITRAIL_DATA` names; results/dispatch.json.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Parser, Row, record, tiny_cifar10
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from vitrail.data.sets import open_data
from vitrail.recipes import RECIPES
from vitrail.train.build import build
from vitrail.train.optim import Average, Optimizers
from vitrail.train.run import Run, with_fields
from vitrail.train.step import LossModule, compile_network, train_step

STEPS = 3
"""steps that are counted, and steps before them, in which everything is compiled"""


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"])
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("VITRAIL_DATA") and Path(os.environ["VITRAIL_DATA"]),
        help="contains cifar10/",
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        data = tiny_cifar10(Path(place)) if args.tiny else args.data / "cifar10"
        changes: Row = {"width": 48, "compile": True, "memory": True}
        if args.tiny:
            changes |= {"depth": 1, "policy": "none", "batch_size": 4}
        found = count(with_fields(RECIPES["cifar10"](45_000), changes), data)
    for name, each in found.items():
        print(f"{name}: {each['operators']}, the most frequent: {each['most frequent']}")
    record("dispatch", found, args.results)
    print("operators per step:", found["step"]["operators"])


def count(run: Run, data: Path) -> Row:
    """Operators of making a batch, of the running average, and of the whole step with both."""
    components, _ = build(run, open_data(data), torch.device("cpu"))
    task = components.task.train()
    optimizers, module = Optimizers(task, run.optim, compile=run.compiled), LossModule(task)
    average = Average(task, run.optim.ema)
    compile_network(module, run, torch.device("cpu"))
    batches = components.train.batches()

    def step(number: int) -> None:
        train_step(run, module, next(batches), optimizers, 1.0)
        average.update(number)

    for number in range(STEPS):
        step(number)
    counts = {"data": lambda number: next(batches), "average": lambda number: average.update(number), "step": step}
    return {name: counted(function) for name, function in counts.items()}


def counted(function: Callable[[int], object]) -> Row:
    """Operators per call, and those that occur most often."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(STEPS, 2 * STEPS):
            function(number)
    names = Counter(event.name for event in found.events() or () if dispatched(event))
    often = {name: round(times / STEPS, 1) for name, times in names.most_common(8)}
    return {"operators": round(names.total() / STEPS), "most frequent": often}


def dispatched(event: FunctionEvent) -> bool:
    """Whether the host dispatched the event: an operator that no other one called, or a compiled kernel."""
    if not event.name.startswith("aten::"):
        return "cpp_fused" in event.name or event.name.startswith("triton_")
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return parent is None


if __name__ == "__main__":
    main()
