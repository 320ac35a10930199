"""Measurements on one GPU, in stages: python bench/gpu.py [STAGE...] --data DIR, where DIR contains CIFAR-10.

Only the named stages run, or those of a call: `first` and `second` together measure every goal, each in less than six
minutes. Every stage is a process of its own, is stopped at its time limit, and adds its rows to gpu.json in the folder
of `--results` as it goes, so that nothing is lost. What a stage leaves of its limit, the stages after it may use.
`--plan` prints stages and limits.

    first    attention       which kernels give finite gradients, how exact and how fast they are
             graphs          the step of the recipe cifar10 with and without CUDA graphs, and its profile
             cifar10-small   three seeds of the small recipe: seconds to its score; weights in float16
             step-b16        the step of ViT-B/16 at 224 against timm, compiled: time, fraction of the matrix rate
             block           one block of ViT-B/16: kernels, bf16 weights, padded tokens, larger batches
    second   cifar10         `vitrail train cifar10`, the whole command: wall time and test score (goal 94 %)
             step-l16        as step-b16 for ViT-L/16
    by name  inference       ViT-B/16 in bf16 as the server runs it: eager, compiled and exported, batches of 1 and 64
             data            batches from images on the device, and how often a step waits for it
             nonfinite       the recipe as it was when it failed, and which kernel is to blame

The recipes use CUDA graphs if `graphs` has found that they are right and faster, and `cifar10` trains for fewer epochs
if its step is so slow that all of them would not fit. Both are read from gpu.json. `--tiny` runs every stage on a CPU.
"""

# A GPU machine without a network keeps its own PyTorch. It needs this repository with the ignored folder .gpu/, which
# holds CIFAR-10 and wheels for its Python, made from the root of the repository where there is a network by
#
#   mkdir -p .gpu/cifar10 && cp DIR/*.parquet .gpu/cifar10/ && pip download -q --no-deps --only-binary=:all: \
#     --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#     --platform manylinux2014_x86_64 -d .gpu/wheels simplejpeg rich
#
# Then the two commands there, from the root of the repository; OUT is a folder whose files come back. Before the second
# one, copy the gpu.json of the first one to results/, or the second does not know how fast the recipe's step is.
#
#   python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .gpu/wheels/*.whl && \
#   PYTHONPATH=/tmp/site:$PWD/src PYTHONUNBUFFERED=1 \
#   timeout 350 python3 bench/gpu.py first --data .gpu/cifar10 --results $OUT
#
#   python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .gpu/wheels/*.whl && \
#   cp results/gpu.json $OUT/ && PYTHONPATH=/tmp/site:$PWD/src PYTHONUNBUFFERED=1 \
#   timeout 350 python3 bench/gpu.py second --data .gpu/cifar10 --results $OUT

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from gpu_stages import inference, kernels, recipes, steps
from gpu_stages.common import Bench
from harness import Parser


class Stage(NamedTuple):
    """What a stage runs, and the seconds after which it is stopped."""

    run: Callable[[Bench], None]
    seconds: int


STAGES = {
    "attention": Stage(kernels.attention, 30),
    "graphs": Stage(steps.graphs, 80),
    "cifar10-small": Stage(recipes.cifar10_small, 120),
    "step-b16": Stage(lambda bench: steps.step_stage(bench, "B/16"), 80),
    "block": Stage(kernels.block, 30),
    "cifar10": Stage(recipes.cifar10, 225),
    "step-l16": Stage(lambda bench: steps.step_stage(bench, "L/16"), 115),
    "inference": Stage(inference.inference, 150),
    "data": Stage(steps.data, 20),
    "nonfinite": Stage(recipes.nonfinite, 90),
}
CALLS = {
    "first": ("attention", "graphs", "cifar10-small", "step-b16", "block"),
    "second": ("cifar10", "step-l16"),
}


def parser() -> Parser:
    parser = Parser(__doc__, data="digits")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join([*CALLS, *STAGES])}; all if left out")
    parser.add_argument("--data", help="a folder with CIFAR-10")
    parser.add_argument("--plan", action="store_true", help="print the stages and their limits, and measure nothing")
    return parser


def main() -> None:
    options = parser()
    args = options.parse_args()
    if unknown := [name for name in args.stages if name not in {**STAGES, **CALLS}]:
        options.error(f"no stage {unknown[0]!r}: choose from {', '.join([*CALLS, *STAGES])}")
    chosen = [stage for name in args.stages or STAGES for stage in CALLS.get(name, (name,))]
    print(plan(chosen), file=sys.stderr, flush=True)
    if args.plan:
        return
    if not args.tiny and not in_process(require_gpu, 60):
        sys.exit("no GPU that PyTorch can use: --tiny tries the script on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` ends the stage too
    failed = run_stages(Bench(args.tiny, args.data, args.results), chosen)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def plan(chosen: Sequence[str]) -> str:
    """The limits of the stages, and of each call."""
    limits = [f"{name} {STAGES[name].seconds} s" for name in chosen]
    calls = [f"{name} {sum(STAGES[stage].seconds for stage in own)} s" for name, own in CALLS.items()]
    return f"limits: {', '.join(limits)}\ntogether {sum(STAGES[name].seconds for name in chosen)} s; {', '.join(calls)}"


def run_stages(bench: Bench, chosen: Sequence[str]) -> list[str]:
    """Run the stages one after the other, each in a process; returns the names of those that failed."""
    failed, spare = [], 0.0
    for name in chosen:
        began, limit = time.monotonic(), STAGES[name].seconds * (10 if bench.tiny else 1) + spare
        if not in_process(partial(run_stage, bench, name, limit), limit):
            failed.append(name)
            if time.monotonic() - began >= limit:
                in_process(partial(note, bench, name, "stopped at its time limit"), 60)
        print(json.dumps({name: bench.rows.get(name)}), flush=True)
        spent = time.monotonic() - began
        print(f"{name}: {spent:.0f} s", file=sys.stderr, flush=True)
        spare = max(0.0, limit - spent)
    return failed


def run_stage(bench: Bench, name: str, limit: float) -> None:
    """One stage; its error is in its row, and the later stages still run."""
    bench.begin(limit)
    try:
        STAGES[name].run(bench)
    except Exception as error:
        note(bench, name, f"{type(error).__name__}: {str(error)[:300]}")
        raise


def note(bench: Bench, name: str, failure: str) -> None:
    """Add the failure to the stage's row, which keeps what was measured before it."""
    bench.keep(name, {**bench.rows.get(name, {}), "failed": failure})


def require_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit(1)


def in_process(function: Callable[[], None], limit: float) -> bool:
    """Call a function in a process that starts with this one's imports; whether it succeeded in so many seconds.

    A fork, since importing takes seconds: this process never touches the GPU, or its children could not. A crash or an
    error of the GPU ends the child alone, and so does the limit, with all processes that the child has started.
    """

    def child() -> None:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            function()
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        process.join(limit)
        return process.exitcode == 0
    finally:
        if process.is_alive():
            assert process.pid
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


if __name__ == "__main__":
    main()
