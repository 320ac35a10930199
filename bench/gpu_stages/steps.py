"""The training step: with and without CUDA graphs, what the device does in it, and against timm."""

from __future__ import annotations

import itertools
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Row, in_turns, seconds, training_step
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from gpu_stages.common import TINY, Bench, classifier, flops
from vitrail.data.augment import Augmenter, stream_keys
from vitrail.data.loader import Loader
from vitrail.data.mixing import mix_pairs
from vitrail.data.sets import Splits, open_data
from vitrail.sizes import config_for
from vitrail.tasks.classify import Classify
from vitrail.train.build import build
from vitrail.train.device import choose_attention
from vitrail.train.loop import Components
from vitrail.train.optim import Average, Optim, Optimizers
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, LossModule, compile_network, train_step

TIMM = {"B/16": "vit_base_patch16_224", "L/16": "vit_large_patch16_224"}
BATCHES = {"B/16": 256, "L/16": 128}
"""images per step, halved until they fit"""
TIMM_NAMES = {"width": "embed_dim", "depth": "depth", "heads": "num_heads", "image_size": "img_size"}


# ---- the recipe's step


def graphs(bench: Bench) -> None:
    """The step of the recipe `cifar10` with and without CUDA graphs: milliseconds, kernels, and the same losses."""
    row: Row = {}
    losses = {}
    run = bench.recipe("cifar10")
    components, _ = build(run, open_data(bench.data or run.data), bench.device)
    initial = {name: value.clone() for name, value in components.task.state_dict().items()}
    for name, wanted in (("plain", False), ("CUDA graphs", True)):
        components.task.load_state_dict(initial)
        step = recipe_step(bench, replace(run, cuda_graphs=wanted), components)
        losses[name] = [step().read()["loss"] for _ in range(2 if bench.tiny else 8)]
        each = seconds(step, 2 if bench.tiny else 60, bench.device.type)
        row[name] = {"milliseconds": round(1000 * each, 3), "images per second": round(run.batch_size / each)}
        row[name] |= profiled(bench, step, 2 if bench.tiny else 5)
        bench.keep("graphs", row)
    pairs = zip(*losses.values(), strict=True)
    row["largest relative difference of the first losses"] = round(max(abs(a - b) / a for a, b in pairs), 6)
    equal = row["largest relative difference of the first losses"] < 0.01
    times = [row[name]["milliseconds"] for name in losses]
    row["CUDA graphs are used in the recipes"] = equal and times[1] < 0.97 * times[0] and not bench.tiny
    bench.keep("graphs", row)


def recipe_step(bench: Bench, run: Run, components: Components) -> Callable[[], AsyncScalars]:
    """The whole step of a recipe, from the data to the running average."""
    task = components.task.train()
    optimizers, module = Optimizers(task, run.optim, compile=run.compiled), LossModule(task)
    average, batches, steps = Average(task, 0.999), components.train.batches(), itertools.count()
    if run.compiled:
        compile_network(module, run, bench.device)

    def step() -> AsyncScalars:
        scalars = train_step(run, module, next(batches), optimizers, 1.0)
        average.update(next(steps))
        return scalars

    return step


def profiled(bench: Bench, step: Callable[[], object], steps: int) -> Row:
    """What the host launches and the device does in a step, and the kernels that take slowest."""
    activities = [ProfilerActivity.CPU, *([] if bench.tiny else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
        bench.wait()
    rows = found.key_averages()
    # A pass that PyTorch could not record runs as it would without CUDA graphs.
    skipped = counters["inductor"]["cudagraph_skips"]
    # One wait is that of the end; a step should have none.
    launches, waits = ({e.key: e.count / steps for e in rows if w in e.key} for w in ("Launch", "Synchronize"))
    # Events on the device: kernels and copies, but also what the host has named, such as an optimizer's step.
    busy = [e for e in rows if str(e.device_type) == "DeviceType.CUDA" and not getattr(e, "is_user_annotation", False)]
    busy = [e for e in busy if not e.key.startswith("Optimizer.")]
    slowest = sorted(busy, key=lambda e: -e.self_device_time_total)[:5]
    return {
        "passes that could not be recorded": skipped,
        "launches": launches,
        "waits of the host": waits,
        "kernels": round(sum(e.count for e in busy) / steps),
        "milliseconds of kernels": round(sum(e.self_device_time_total for e in busy) / steps / 1000, 3),
        "slowest": {e.key[:70]: round(e.self_device_time_total / steps / 1000, 3) for e in slowest},
    }


# ---- against timm


def plain_step(bench: Bench, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step as in a plain script: compiled, bf16 autocast, fused AdamW, and the attention that PyTorch chooses."""
    if not bench.tiny:
        torch.backends.cuda.enable_cudnn_sdp(True)
    backend = None if bench.tiny else "inductor"
    return training_step(model.to(bench.device), batch["image"], batch["label"], torch.bfloat16, backend)


def loop_step(bench: Bench, task: Classify, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step of `vitrail train`, which also reads the loss."""
    choose_attention(bench.device)
    run = Run("bench", data="none", optim=Optim(lr=1e-4), batch_size=len(batch["image"]), precision="bf16")
    module = LossModule(task.to(bench.device).train())
    if not bench.tiny:
        compile_network(module, run, bench.device)
    optimizers = Optimizers(task, run.optim, compile=not bench.tiny)
    return lambda: train_step(run, module, batch, optimizers, 1.0)


def variants(bench: Bench, size: str, batch: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[], object] | str]]:
    """Steps by name, or the reason why one is not available."""
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
        for _ in range(3):  # the first compiles, with the attention that was just chosen
            step()
        steps[name] = step
        print(f"{size}: {name} is ready", file=sys.stderr, flush=True)
    rates = [bench.matrix_rate()]
    times = in_turns(steps, bench.rounds, warm_up=1, calls=bench.calls, device=bench.device.type)
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
            bench.forget()
    bench.keep(f"step-{size.replace('/', '').lower()}", row)


# ---- batches


def data(bench: Bench) -> None:
    """A set on the device: batches equal those of the CPU and do not depend on batch size; how often a step waits."""
    run = bench.recipe("cifar10", width=32, depth=2, heads=2, stem=(4, 8), compile=False, batch_size=64)
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
    components, _ = build(run, Splits(open_data("digits").train), bench.device)
    loader = components.train
    batch = next(loader.batches())
    assert loader.memory and batch["image"].device.type == batch["label"].device.type == bench.device.type
    row |= {"kept on": str(batch["label"].device), "waits": waits(bench, run, loader, components.task)}
    bench.keep("data", row)


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
