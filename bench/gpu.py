"""Measurements on a GPU: python bench/gpu.py [STAGE...] --data DIR, where DIR contains CIFAR-10 (or VITRAIL_DATA).

Each stage adds its rows to results/gpu.json when it ends, so an interrupted run keeps the earlier ones. Only the named
stages run; all of them take less than 25 minutes on an H100. In this order, with the approximate time of each:

    attention   one minute     fused attention in bf16 against the plain product: outputs and gradients
    data        two minutes    batches from images on the device, and how often a step synchronises with it
    step-b16    four minutes   the training step of ViT-B/16 at 224: fraction of the matrix rate; against timm
    step-l16    six minutes    the same for ViT-L/16
    cifar10     eight minutes  `vitrail train cifar10`, the whole command: wall time and test score (goal 94 %)

A machine without a network needs a copy of this repository, the folder of `--data`, and wheels of missing packages (it
keeps its own PyTorch): `pip download --no-deps -d wheels tyro docstring-parser typeguard simplejpeg` elsewhere, then

    pip install --no-index --no-deps wheels/*.whl && PYTHONPATH=src python bench/gpu.py --data DIR

If a command may take only ten minutes, run the stages in several: `attention data step-b16`, then `step-l16`, then
`cifar10`. Rows that need timm say so if it is missing. `--tiny` runs every stage on a CPU.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, Parser, Row, in_turns, record, recorded, training_step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.data.augment import Augmenter, stream_keys
from vitrail.data.loader import Loader
from vitrail.data.mixing import mix_pairs
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import Splits, open_data
from vitrail.errors import RunError
from vitrail.recipes import RECIPES
from vitrail.sizes import config_for
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.train.build import build
from vitrail.train.optim import Optim, Optimizers
from vitrail.train.run import Run
from vitrail.train.state import RunFolder
from vitrail.train.step import LossModule, train_step
from vitrail.vit import Attention, ViTConfig

TIMM = {"B/16": "vit_base_patch16_224", "L/16": "vit_large_patch16_224"}
BATCHES = {"B/16": 256, "L/16": 128}
"""images per step, halved until they fit"""
TINY: Row = {"width": 32, "depth": 2, "heads": 2, "image_size": 32}
TIMM_NAMES = {"width": "embed_dim", "depth": "depth", "heads": "num_heads", "image_size": "img_size"}
LIMIT = 500
"""seconds after which the command of the stage cifar10 gets a signal to save and stop"""


class Bench:
    """The device, the number of rounds, and the rows so far."""

    def __init__(self, tiny: bool, data: str | None, results: Path, limit: float) -> None:
        if not tiny and not torch.cuda.is_available():
            sys.exit("no GPU that PyTorch can use: --tiny tries the script on a CPU")
        self.tiny, self.data, self.results, self.limit = tiny, data, results, limit
        self.device = torch.device("cpu" if tiny else "cuda")
        self.rounds, self.calls = (2, 1) if tiny else (9, 5)
        self.rows: Row = {} if tiny else recorded("gpu", results)

    def keep(self, stage: str, row: Row) -> None:
        """Record a stage's rows with those of the other stages."""
        self.rows[stage] = row
        record("gpu", self.rows, self.results)
        print(json.dumps({stage: row}), flush=True)

    def matrix_rate(self) -> float:
        """Floating-point operations per second of a large product of random bf16 matrices: a median."""
        side = 256 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        times = in_turns({"product": lambda: a @ b}, self.rounds, warm_up=3, calls=5, device=self.device.type)
        return 2 * side**3 / statistics.median(times["product"])


# ---- attention


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference divided by the norm of `wanted`."""
    return float((found.double() - wanted).norm() / wanted.norm())


def attention(bench: Bench) -> None:
    """Each kernel for attention in bf16 against the plain product in float64: the relative error is below 2 %."""
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
            outputs = zip(("output", "gradient"), found, wanted, strict=True)
            errors = {what: round(relative_error(a, b), 6) for what, a, b in outputs}
            rows.setdefault(name, {})[way] = errors
            assert max(errors.values()) < 0.02, (name, way, errors)
    bench.keep("attention", {"relative error to float64": rows})


def through(layer: nn.Module, x: Tensor, pull: Tensor, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """The layer's output for tokens, and the gradient of its product with `pull` at the tokens."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(backend):
        out = layer(x)
        (gradient,) = torch.autograd.grad(out, x, pull)
    return out.detach(), gradient


# ---- batches


def data(bench: Bench) -> None:
    """A set on the device: batches equal those of the CPU and do not depend on batch size; how often a step waits."""
    run = RECIPES["cifar10"](45_000)
    digits = open_data("digits").train
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = torch.arange(100, 164)

    def augmented(where: torch.device, chosen: slice, mixed: bool) -> Tensor:
        augment = run.augment if mixed else replace(run.augment, cutmix=0.0)
        own, keys = samples[chosen].to(where), stream_keys(1, 2).to(where)
        x = Augmenter(augment, (32, 32), where)(images[chosen].to(where), own, keys)
        return (mix_pairs(x, own, keys, augment)[0] if augment.mixes else x).cpu()

    here, there = (augmented(where, slice(None), True) for where in (torch.device("cpu"), bench.device))
    together = augmented(bench.device, slice(None), False)
    alone = torch.cat([augmented(bench.device, slice(i, i + 1), False) for i in range(64)])
    row: Row = {
        "fraction of pixels that differ from the CPU's": float((here != there).float().mean()),
        "batches of 1 and 64 equal": bool(torch.equal(together, alone)),
    }
    assert row["batches of 1 and 64 equal"] and row["fraction of pixels that differ from the CPU's"] < 0.01, row
    components, _ = build(small(run), Splits(digits), bench.device)
    loader = components.train
    batch = next(loader.batches())
    assert loader.memory and batch["image"].device.type == batch["label"].device.type == bench.device.type
    row |= {"kept on": str(batch["label"].device), "waits": waits(bench, small(run), loader, components.task)}
    bench.keep("data", row)


def small(run: Run) -> Run:
    """The recipe with a small network that is not compiled."""
    assert isinstance(run.model, ViTConfig)
    model = replace(run.model, width=32, depth=2, heads=2, stem=(4, 8))
    return replace(run, data="digits", model=model, compile=False, batch_size=64)


def waits(bench: Bench, run: Run, loader: Loader, task: Any) -> Row:
    """How often a training step makes the CPU wait for the device, and where. Its loss is read once."""
    if bench.device.type != "cuda":
        return {"per step": "measured on a GPU only"}
    optimizers, module, batches = Optimizers(task, run.optim), LossModule(task.train()), loader.batches()
    for _ in range(3):
        train_step(run, module, next(batches), optimizers, 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(10):
                train_step(run, module, next(batches), optimizers, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)})
    return {"per step": sum("synchron" in str(w.message) for w in caught) / 10, "places": places}


# ---- the training step


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


def plain_step(bench: Bench, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step as in a plain script: compiled, bf16 autocast, fused AdamW."""
    backend = None if bench.tiny else "inductor"
    return training_step(model.to(bench.device), batch["image"], batch["label"], torch.bfloat16, backend)


def loop_step(bench: Bench, task: Classify, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step of `vitrail train`, which also reads the loss."""
    run = Run("bench", data="none", optim=Optim(lr=1e-4), batch_size=len(batch["image"]), precision="bf16")
    module = LossModule(task.to(bench.device).train())
    if not bench.tiny:
        module.compile(dynamic=False)
    optimizers = Optimizers(task, run.optim, compile=not bench.tiny)
    return lambda: train_step(run, module, batch, optimizers, 1.0)


def variants(bench: Bench, size: str, batch: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[], object] | str]]:
    """Steps by name, or the reason why one is not available."""
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
    """Median time of each variant's step; the variants alternate."""
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
        "gflops per image": round(needed / count / 1e9, 2),
        "matrix rate, TFLOP/s": [round(rate / 1e12, 2) for rate in rates],
    }
    medians = {name: statistics.median(readings) for name, readings in times.items()}
    for name, median in medians.items():
        row[name] = {
            "milliseconds": round(1000 * median, 3),
            "spread": round(1000 * (max(times[name]) - min(times[name])), 3),
            "images per second": round(count / median, 1),
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


def cifar10(bench: Bench) -> None:
    """The whole command, which is stopped (and saves) at the time limit. The rows are recorded either way.

    A stopped run resumes when the stage is run again.
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
    try:
        printed, _ = process.communicate(timeout=bench.limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(timeout=60)
    wall = time.monotonic() - began
    logged = RunFolder(out).rows()
    trained = [row for row in logged if row["kind"] == "train"]
    scores = json.loads(printed) if process.returncode == 0 else {}
    row: Row = {
        "train": " ".join(word.removeprefix(f"{ROOT}{os.sep}") for word in ("vitrail", *command[3:])),
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
        row |= {"median images per second": round(speed), "median fraction of time waiting for data": round(wait, 4)}
        model = RunFolder(out).run().model
        each = flops(lambda: Classify(encoder_for(model), [str(i) for i in range(10)], Preprocess(model.image_size)))
        row["utilisation"] = round(speed * each / bench.matrix_rate(), 4)
    if resumed:
        row["note"] = "the run was resumed: the wall time is that of the last command only"
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
    args = options.parse_args()
    if unknown := [name for name in args.stages if name not in STAGES]:
        options.error(f"no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    bench = Bench(args.tiny, args.data, args.results, args.limit)
    failed = []
    for name in args.stages or STAGES:
        began = time.monotonic()
        try:
            STAGES[name](bench)
        except Exception as error:  # the later stages still run
            failed.append(name)
            bench.keep(name, {**bench.rows.get(name, {}), "failed": f"{type(error).__name__}: {str(error)[:300]}"})
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
