"""What a GPU shows: python bench/gpu.py [STAGE...] --data DIR, where DIR holds CIFAR-10 (VITRAIL_DATA does as well).

Each stage adds its rows to results/gpu.json when it ends, so a run that is cut off keeps those before; stages that are
named run alone, and all of them take less than 25 minutes on an H100. In this order, with about how long each takes:

    attention   one minute     fused attention in bf16 beside the plain product: outputs and gradients
    data        two minutes    the data path with the images on the device, and how often a step waits for it
    step-b16    four minutes   the training step of ViT-B/16 at 224: share of the measured matrix rate, beside timm's
    step-l16    six minutes    the same of ViT-L/16
    cifar10     eight minutes  `vitrail train cifar10`, the whole command: wall time and test score (goal 94 %)

A machine without a network needs a copy of this repository, the folder of `--data`, and wheels of what it lacks (its
own PyTorch stays): `pip download --no-deps -d wheels tyro docstring-parser typeguard simplejpeg` elsewhere, and there

    pip install --no-index --no-deps wheels/*.whl && PYTHONPATH=src python bench/gpu.py --data DIR

Where a command may take ten minutes only, name the stages in parts: `attention data step-b16`, then `step-l16`, then
`cifar10`; results/gpu.json keeps those before. Rows that need timm say so where it is missing. `--tiny` goes through
every stage on a processor.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import ROOT, Parser, Row, in_turns, record, recorded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.data.augment import augment_batch, mix_pairs
from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import Splits, open_data
from vitrail.errors import RunError
from vitrail.recipes import RECIPES
from vitrail.sizes import config_for
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.train.build import build
from vitrail.train.loop import LossModule, train_step
from vitrail.train.optim import Optim, Optimizers
from vitrail.train.run import Run
from vitrail.train.state import RunFolder
from vitrail.vit import Attention, ViTConfig

TIMM = {"B/16": "vit_base_patch16_224", "L/16": "vit_large_patch16_224"}
BATCHES = {"B/16": 256, "L/16": 128}
"""images a step, halved until they fit"""
TINY: Row = {"width": 32, "depth": 2, "heads": 2, "image_size": 32}
TIMM_NAMES = {"width": "embed_dim", "depth": "depth", "heads": "num_heads", "image_size": "img_size"}
LIMIT = 500
"""seconds that the whole command of the stage cifar10 may take before it is asked to stop and save"""


class Bench:
    """The device, the sizes, and the rows so far."""

    def __init__(self, tiny: bool, data: str | None, results: Path, limit: float) -> None:
        if not tiny and not torch.cuda.is_available():
            sys.exit("no GPU that PyTorch can use: --tiny tries the script on a processor")
        self.tiny, self.data, self.results, self.limit = tiny, data, results, limit
        self.device = torch.device("cpu" if tiny else "cuda")
        self.rounds, self.calls = (2, 1) if tiny else (9, 5)
        self.rows: Row = {} if tiny else recorded("gpu", results)

    def keep(self, stage: str, row: Row) -> None:
        """Write a stage's rows beside those of the others."""
        self.rows[stage] = row
        record("gpu", self.rows, self.results)
        print(json.dumps({stage: row}), flush=True)

    def matrix_rate(self) -> float:
        """Floating-point operations a second of a large product of random bf16 matrices: the median of some."""
        side = 256 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        times = in_turns({"product": lambda: a @ b}, self.rounds, warm_up=3, calls=5, device=self.device.type)
        return 2 * side**3 / statistics.median(times["product"])


# ---- attention


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative error, as norms."""
    return float((found.double() - wanted).norm() / wanted.norm())


def attention(bench: Bench) -> None:
    """Each way of computing attention in bf16 against the plain product in float64, which no way may miss by 1 %."""
    ways = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    if not bench.tiny:
        ways |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    shapes = {"B/16": (197, 768, 12), "L/16": (197, 1024, 16), "registers": (201, 384, 6), "cifar10": (64, 384, 6)}
    if bench.tiny:
        shapes = {"tiny": (17, 32, 2)}
    rows: Row = {}
    for name, (tokens, width, heads) in shapes.items():
        torch.manual_seed(0)
        layer = Attention(width, heads).to(bench.device)
        x = torch.randn(4, tokens, width, device=bench.device).bfloat16()
        pull = torch.randn(4, tokens, width, device=bench.device).bfloat16()
        layer.bfloat16()  # so that the reference has the rounded weights too
        wanted = through(layer.double(), x.double(), pull.double(), SDPBackend.MATH)
        layer.bfloat16()
        for way, backend in ways.items():
            try:
                found = through(layer, x, pull, backend)
            except RuntimeError as error:
                rows.setdefault(name, {})[way] = f"not available: {str(error).splitlines()[0][:80]}"
                continue
            errors = {part: off(a, b) for part, a, b in zip(("output", "gradient"), found, wanted, strict=True)}
            rows.setdefault(name, {})[way] = {part: round(error, 6) for part, error in errors.items()}
            assert max(errors.values()) < 0.02, (name, way, errors)
    bench.keep("attention", {"relative error to float64": rows})


def through(layer: nn.Module, x: Tensor, pull: Tensor, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """What a layer gives for tokens, and the gradient at the tokens of its product with `pull`."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(backend):
        out = layer(x)
        (gradient,) = torch.autograd.grad(out, x, pull)
    return out.detach(), gradient


# ---- the data path


def data(bench: Bench) -> None:
    """The set on the device: the same images as the processor makes, one by one or together, without a wait."""
    run = RECIPES["cifar10"](45_000)
    part = open_data("digits").train
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = torch.arange(100, 164)

    def made(where: torch.device, chosen: slice, mixed: bool) -> Tensor:
        augment = run.augment if mixed else replace(run.augment, cutmix=0.0)
        x = augment_batch(images[chosen].to(where), samples[chosen], 1, 2, augment, (32, 32))
        return (mix_pairs(x, samples[chosen], 1, 2, augment)[0] if augment.mixes else x).cpu()

    here, there = (made(where, slice(None), True) for where in (torch.device("cpu"), bench.device))
    together = made(bench.device, slice(None), False)
    alone = torch.cat([made(bench.device, slice(i, i + 1), False) for i in range(64)])
    row: Row = {
        "share of pixels unlike the processor's": float((here != there).float().mean()),
        "batches of 1 and 64 alike": bool(torch.equal(together, alone)),
    }
    assert row["batches of 1 and 64 alike"] and row["share of pixels unlike the processor's"] < 0.01, row
    parts, _ = build(small(run), Splits(part), bench.device)
    loader = parts.train
    batch = next(loader.batches())
    assert loader.memory and batch["image"].device.type == batch["label"].device.type == bench.device.type
    row |= {"kept on": str(batch["label"].device), "waits": waits(bench, small(run), loader, parts.task)}
    bench.keep("data", row)


def small(run: Run) -> Run:
    """The recipe as it is, with a network that takes no time to compile: it is not compiled."""
    assert isinstance(run.model, ViTConfig)
    model = replace(run.model, width=32, depth=2, heads=2, stem=(4, 8))
    return replace(run, data="digits", model=model, compile=False, batch_size=64)


def waits(bench: Bench, run: Run, loader: Loader, task: Any) -> Row:
    """How often a step of the loop makes the processor wait for the device, and where. Its loss is read once."""
    if bench.device.type != "cuda":
        return {"a step": "only a GPU says"}
    optimizers, module, batches = Optimizers(task, run.optim), LossModule(task.train()), loader.batches()
    for step in range(3):
        train_step(run, module, next(batches), optimizers, 1.0, step)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in range(10):
                train_step(run, module, next(batches), optimizers, 1.0, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchron" in str(w.message)})
    return {"a step": sum("synchron" in str(w.message) for w in said) / 10, "places": places}


# ---- the training step


def classifier(size: str, tiny: bool) -> Classify:
    """A fresh model of a named size, or a tiny one."""
    model = vitrail.create(size, classes=1000, **(TINY if tiny else {}))
    assert isinstance(model, Classify)
    return model


def flops(make: Callable[[], Classify]) -> float:
    """Of one image through one training step: three times those of the way forward, counted product by product."""
    with torch.device("meta"):
        model = make()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(1, 3, *model.encoder.config.image_size, device="meta"))
    return 3.0 * counter.get_total_flops()


def plain_step(bench: Bench, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step as a script would make it: compiled, bf16 autocast, fused AdamW."""
    model = model.to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward: Callable[[Tensor], Tensor] = model if bench.tiny else torch.compile(model)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loop_step(bench: Bench, task: Classify, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step of `vitrail train`, which reads the loss too."""
    count = len(batch["image"])
    run = Run(recipe="bench", data="none", optim=Optim(lr=1e-4), batch_size=count, precision="bf16")
    module = LossModule(task.to(bench.device).train())
    if not bench.tiny:
        module.compile(dynamic=False)
    optimizers = Optimizers(task, run.optim)
    return lambda: train_step(run, module, batch, optimizers, 1.0, 0)


def variants(bench: Bench, size: str, batch: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[], object] | str]]:
    """Steps by name; a reason in place of one that cannot be had."""
    yield "vitrail", plain_step(bench, classifier(size, bench.tiny), batch)
    yield "vitrail's loop", loop_step(bench, classifier(size, bench.tiny), batch)
    try:
        import timm
    except ImportError:
        yield "timm", "needs timm, which is not installed"
        return
    smaller = {TIMM_NAMES[name]: value for name, value in TINY.items()} if bench.tiny else {}
    yield "timm", plain_step(bench, timm.create_model(TIMM[size], num_classes=1000, **smaller), batch)


def measure(bench: Bench, size: str, count: int) -> Row:
    """Median seconds of each variant's step; the variants take turns."""
    side = config_for(size, **(TINY if bench.tiny else {})).image_size
    batch = {
        "image": torch.randn(count, 3, *side, device=bench.device),
        "label": torch.randint(1000, (count,), device=bench.device),
    }
    missing: Row = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, step in variants(bench, size, batch):
        if isinstance(step, str):
            missing[name] = step
            continue
        for _ in range(3):
            step()
        steps[name] = step
        print(f"{size}: {name} is ready", file=sys.stderr, flush=True)
    rates = [bench.matrix_rate()]
    times = in_turns(steps, bench.rounds, warm_up=0, calls=bench.calls, device=bench.device.type)
    rates.append(bench.matrix_rate())
    rate, needed = statistics.mean(rates), count * flops(partial(classifier, size, bench.tiny))
    row: Row = {
        "batch": count,
        "gflops an image": round(needed / count / 1e9, 2),
        "matrix rate, TFLOP/s": [round(rate / 1e12, 2) for rate in rates],
    }
    medians = {name: statistics.median(readings) for name, readings in times.items()}
    for name, median in medians.items():
        row[name] = {
            "milliseconds": round(1000 * median, 3),
            "spread": round(1000 * (max(times[name]) - min(times[name])), 3),
            "images a second": round(count / median, 1),
            "utilisation": round(needed / median / rate, 4),
        }
    if "timm" in medians:
        row["timm's time / vitrail's"] = round(medians["timm"] / medians["vitrail"], 3)
        row["timm's time / vitrail's loop's"] = round(medians["timm"] / medians["vitrail's loop"], 3)
    return row | missing


def step_stage(bench: Bench, size: str) -> None:
    """The training step of a size, with the largest of some batches that fits."""
    count = 2 if bench.tiny else BATCHES[size]
    while True:
        try:
            row = measure(bench, size, count)
            break
        except torch.OutOfMemoryError:
            if count < 16:
                raise
            count //= 2
        finally:
            torch.compiler.reset()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    bench.keep(f"step-{size.replace('/', '').lower()}", row)


# ---- the recipe


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """The process does not outlive the block."""
    try:
        yield
    finally:
        process.kill()
        process.wait(timeout=60)


def cifar10(bench: Bench) -> None:
    """The whole command, stopped (and saved) where it takes longer than the limit; what it came to is kept either way.

    A run that was stopped goes on when the stage is run again.
    """
    out = bench.results / "run" if bench.tiny else ROOT / "runs" / "gpu" / "cifar10"
    command = [sys.executable, "-m", "vitrail", "train"]
    if any(row["kind"] == "done" for row in RunFolder(out).rows()):
        shutil.rmtree(out)  # of an earlier measurement
    resumed = (out / "recipe.json").exists()
    if resumed:
        command += ["--resume", str(out), "--json"]
    else:
        command += ["cifar10", "--out", str(out), "--json", *(["--data", bench.data] if bench.data else [])]
    if bench.tiny:
        command += ["--device", "cpu", "--no-compile", "--epochs", "0.2", "--batch-size", "64"]
        command += ["--width", "32", "--depth", "1", "--heads", "2"]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    with ended(process):
        try:
            printed, _ = process.communicate(timeout=bench.limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=60)
    wall = time.monotonic() - began
    logged = RunFolder(out).rows()
    trained = [row for row in logged if row["kind"] == "train"]
    scores = json.loads(printed) if process.returncode == 0 else {}
    shown = ["vitrail", *command[3:]]
    row: Row = {
        "train": " ".join(word.removeprefix(f"{ROOT}{os.sep}") for word in shown),
        "exit code": process.returncode,
        "wall seconds": round(wall, 1),
        "split": scores.get("split"),
        **{name: scores[name] for name in ("top1", "top5", "calibration_error", "count") if name in scores},
        "goal": 0.94,
        "steps": trained[-1]["step"] if trained else 0,
        "best val top1": max((row["top1"] for row in logged if row["kind"] == "val"), default=None),
    }
    if trained:
        speed, wait = (statistics.median(row[name] for row in trained) for name in ("images_per_s", "wait"))
        row |= {"median images a second": round(speed), "median share of waiting for data": round(wait, 4)}
        model = RunFolder(out).run().model
        each = flops(lambda: Classify(encoder_for(model), [str(i) for i in range(10)], Preprocess(model.image_size)))
        row["utilisation"] = round(speed * each / bench.matrix_rate(), 4)
    if resumed:
        row["note"] = "the run was resumed: the wall time is that of its last part"
    bench.keep("cifar10", row)
    if process.returncode not in (0, 130):
        raise RunError(f"vitrail train cifar10 ended with {process.returncode}")


STAGES: dict[str, Callable[[Bench], None]] = {
    "attention": attention,
    "data": data,
    "step-b16": lambda bench: step_stage(bench, "B/16"),
    "step-l16": lambda bench: step_stage(bench, "L/16"),
    "cifar10": cifar10,
}


def parser() -> Parser:
    parser = Parser(__doc__, data="digits")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; all if left out")
    parser.add_argument("--data", help="a folder with CIFAR-10, for the stage cifar10")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the stage cifar10")
    return parser


def main() -> None:
    options = parser()
    asked = options.parse_args()
    if unknown := [name for name in asked.stages if name not in STAGES]:
        options.error(f"no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    bench = Bench(asked.tiny, asked.data, asked.results, asked.limit)
    failed = []
    for name in asked.stages or STAGES:
        began = time.monotonic()
        try:
            STAGES[name](bench)
        except Exception as error:  # the stages after it are worth having
            failed.append(name)
            bench.keep(name, {**bench.rows.get(name, {}), "failed": f"{type(error).__name__}: {str(error)[:300]}"})
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
