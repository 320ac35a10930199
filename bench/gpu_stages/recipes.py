"""The recipes of CIFAR-10 to their end, and the search for where numbers are no longer finite."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import ROOT, Row
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode

from gpu_stages.common import Bench, flops
from gpu_stages.kernels import kernels
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.errors import RunError
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch
from vitrail.train import loop
from vitrail.train.build import build
from vitrail.train.device import autocast
from vitrail.train.folder import RunFolder
from vitrail.train.optim import Optimizers, factor
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, LossModule, compile_network, train_step
from vitrail.zoo import load

SAVING = 20.0
"""seconds before the end of a stage in which a command that is not done saves its state"""
AROUND = 110.0
"""seconds of `vitrail train cifar10` beside its steps: on an H100, starting, decoding and compiling took 70"""


def use_graphs(bench: Bench) -> bool:
    """Whether the stage `graphs` found CUDA graphs to be right and faster."""
    return bool(bench.rows.get("graphs", {}).get("CUDA graphs are used in the recipes"))


def epochs_that_fit(bench: Bench, seconds: float) -> int | None:
    """The epochs of `cifar10` that take so many seconds, by the step of the stage `graphs`; None: the recipe's own."""
    row = bench.rows.get("graphs", {}).get("CUDA graphs" if use_graphs(bench) else "plain")
    if row is None:
        return None
    run = bench.recipe("cifar10")
    epochs = int(max(0.0, seconds) * 1000 / row["milliseconds"] / (45_000 // run.batch_size))
    return None if epochs >= run.epochs else max(1, epochs)


# ---- the whole command


def cifar10(bench: Bench) -> None:
    """The whole command. The recipe's full length runs only if its step is fast enough, else as many epochs as fit.

    At the time limit it is stopped, and saves; the row is recorded either way. A stopped run resumes when the stage is
    run again.
    """
    out = bench.scratch / "cifar10"
    if any(row["kind"] == "done" for row in RunFolder(out).rows()):
        shutil.rmtree(out)  # of an earlier measurement
    resumed = (out / "recipe.json").exists()
    command = [sys.executable, "-m", "vitrail", "train", *words(bench, out, resumed)]
    began = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    try:
        printed, _ = process.communicate(timeout=None if bench.tiny else max(1.0, bench.left() - SAVING))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=SAVING)
    finally:
        process.kill()
        process.wait(timeout=60)
    wall = time.monotonic() - began
    scores = json.loads(printed) if process.returncode == 0 else {}
    row: Row = {
        "train": " ".join(word.removeprefix(f"{ROOT}{os.sep}") for word in ("vitrail", *command[3:])),
        "exit code": process.returncode,
        "wall seconds": round(wall, 1),
        "goal": 0.94,
        **logged(bench, RunFolder(out), scores),
    }
    if resumed:
        row["note"] = "the run was resumed: the wall time is that of the last command only"
    bench.keep("cifar10", row)
    if process.returncode not in (0, 130):
        raise RunError(f"vitrail train cifar10 ended with {process.returncode}")


def words(bench: Bench, out: Path, resumed: bool) -> list[str]:
    """What follows `vitrail train`."""
    if resumed:
        return ["--resume", str(out), "--json", *(["--device", "cpu"] if bench.tiny else [])]
    chosen = ["cifar10", "--out", str(out), "--json", *(["--data", bench.data] if bench.data else [])]
    if use_graphs(bench):
        chosen += ["--cuda-graphs"]
    if not bench.tiny and (epochs := epochs_that_fit(bench, bench.left() - SAVING - AROUND)) is not None:
        chosen += ["--epochs", str(epochs)]
    if bench.tiny:
        chosen += ["--device", "cpu", "--no-compile", "--epochs", "0.2", "--batch-size", "64"]
        chosen += ["--width", "32", "--depth", "1", "--heads", "2"]
    return chosen


def logged(bench: Bench, folder: RunFolder, scores: Row) -> Row:
    """What the log of a run tells of its speed, of its faults and of its scores."""
    rows = folder.rows()
    if folder.metrics.exists():
        shutil.copy(folder.metrics, bench.results / f"gpu-{folder.path.name}.jsonl")
    trained, evaluated = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
    found: Row = {
        "split": scores.get("split"),
        **{name: scores[name] for name in ("top1", "top5", "calibration_error", "count") if name in scores},
        "steps": trained[-1]["step"] if trained else 0,
        "steps that moved nothing": sum(row["skipped"] for row in trained),
        "best val top1": max((row["top1"] for row in evaluated), default=None),
        "largest attention logit": max((max(row.get("attention_logits", [0.0])) for row in evaluated), default=None),
    }
    if trained:
        speed, wait = (statistics.median(row[name] for row in trained) for name in ("images_per_s", "wait"))
        found |= {"median images per second": round(speed), "median fraction of time waiting for data": round(wait, 4)}
        found["largest gradient norm"] = max(row.get("gradient_norm", 0.0) for row in trained)
        if (run := folder.run()).early_shape is None:  # else most steps have smaller images, and take fewer operations
            own = run.model
            each = flops(lambda: Classify(encoder_for(own), [str(i) for i in range(10)], Preprocess(own.image_size)))
            found["utilisation"] = round(speed * each / bench.matrix_rate(), 4)
    return found


# ---- three seeds of the small recipe


def cifar10_small(bench: Bench) -> None:
    """`cifar10-small` with seeds 0, 1 and 2: seconds after import, compiling apart, and top-1 on the open test images.

    As many seeds as there is time for. The weights of the best on val are saved in float16, and scored as saved.
    """
    row: Row = {"goal": "94 % in less than 60 seconds", "seeds": {}}
    best = -1.0
    for seed in range(3):
        # What the first seed has compiled is read from the disk by the others.
        slowest = max((one["seconds"] + one["compiling"] / 3 + 5 for one in row["seeds"].values()), default=0.0)
        if bench.left() < slowest:
            row["left out"] = f"seeds from {seed} on: no time"
            break
        row["seeds"][str(seed)], components = one_seed(bench, bench.scratch / f"cifar10-small-{seed}", seed)
        if (own := row["seeds"][str(seed)]["best val top1"]) > best:
            best = own
            row["float16"] = halved(bench, components, seed)
        for name in ("seconds", "top1"):
            row[f"mean {name}"] = round(statistics.mean(one[name] for one in row["seeds"].values()), 4)
        bench.keep("cifar10-small", row)
        bench.forget()
    bench.keep("cifar10-small", row)


def one_seed(bench: Bench, place: Path, seed: int) -> tuple[Row, loop.Components]:
    """A run of the small recipe in this process, and its components, with the best weights."""
    shutil.rmtree(place, ignore_errors=True)
    run, began = bench.recipe("cifar10-small", seed=seed, eval_every=1000, cuda_graphs=use_graphs(bench)), time.time()
    components, steps = build(run, open_data(bench.data or run.data), bench.device)
    folder, starts = RunFolder(place), list[float]()

    def timed(*arguments: Any) -> AsyncScalars:
        starts.append(time.perf_counter())
        return train_step(*arguments)

    with folder.new(), mock.patch.object(loop, "train_step", timed):
        folder.begin(run, components.task.classes)
        starts.append(time.perf_counter())
        scores = loop.fit(run, components, folder, steps)
        bench.wait()
    whole, waits = time.time() - began, [b - a for a, b in itertools.pairwise(starts)]
    # The host waits for the compiler before the first step and in the first of each size, and in no others so long.
    usual = statistics.median(waits) if waits else 0.0
    compiling = 0.0 if bench.tiny else sum(wait - usual for wait in waits if wait > max(0.5, 5 * usual))
    row = {
        "seconds": round(whole - compiling, 1),
        "compiling": round(compiling, 1),
        "split": scores["split"],
        "top1": scores["top1"],
        "parameters": scores["parameters"],
        **{key: value for key, value in logged(bench, folder, scores).items() if key not in ("split", "top1")},
    }
    return row, components


def halved(bench: Bench, components: loop.Components, seed: int) -> Row:
    """Save the weights in float16, and score the file."""
    task, place = components.task, bench.results / "cifar10-small"
    half = {k: v.half() if v.is_floating_point() else v for k, v in task.state_dict().items()}
    task.save(place, half)
    split = "test" if components.test else "val"
    scores = loop.evaluate(load(place, device=bench.device), components.loaders, split, final=True)
    size = (place / "model.safetensors").stat().st_size
    return {"seed": seed, "bytes": size, "fits": size <= 12_000_000, "split": split, "top1": scores["top1"]}


# ---- numbers that are not finite


def nonfinite(bench: Bench) -> None:
    """Train `cifar10` as it was when it failed: cuDNN's attention, and nothing that bounds queries and keys.

    The first step that is not finite is repeated with each kernel. The row says how far the run came otherwise.
    """
    run = bench.recipe("cifar10", qk_norm=False)
    components, steps = build(run, open_data(bench.data or run.data), bench.device)
    if not bench.tiny:
        torch.backends.cuda.enable_cudnn_sdp(True)  # `build` has switched it off
    task = components.task.train()
    optimizers, module = Optimizers(task, run.optim, compile=run.compiled), LossModule(task)
    if run.compiled:
        compile_network(module, run, bench.device)
    row: Row = {"steps": 0, "largest gradient norm": 0.0}
    for step, batch in zip(range(steps), components.train.batches(), strict=False):
        rate = factor(run.optim, step, steps, components.train.steps_per_epoch)
        found = train_step(run, module, batch, optimizers, rate).read()
        if not found["finite"]:
            row |= {"not finite at step": step + 1, "loss": str(found["loss"]), "norm": str(found["gradient_norm"])}
            row["repeated"] = repeated(bench, run, task, batch)
            break
        row["steps"] = step + 1
        row["largest gradient norm"] = max(row["largest gradient norm"], found["gradient_norm"])
        if bench.left() < 15:
            break
    row["smallest logsumexp per layer"] = smallest_logsumexp(task, batch)
    bench.keep("nonfinite", row)


def repeated(bench: Bench, run: Run, task: Task, batch: Batch) -> Row:
    """The step again with each kernel: the parameters whose gradient is not finite. The guard has moved no weight."""
    named = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    rows: Row = {}
    for name, kernel in kernels(bench).items():
        try:
            with sdpa_kernel(kernel), autocast(bench.device, run.precision):
                loss = task.loss(batch)["loss"]
                given = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        except RuntimeError as error:
            rows[name] = f"refused: {str(error).splitlines()[0][:80]}"
            continue
        bad = [key for key, g in zip(named, given, strict=True) if g is not None and not g.isfinite().all()]
        rows[name] = {"finite loss": bool(loss.isfinite()), "gradients not finite": len(bad), "the last": bad[-1:]}
    return rows


class _Smallest(TorchFunctionMode):
    """Notes the smallest logsumexp of a row of attention logits, for every call of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            logits: Tensor = args[0].float() @ args[1].float().mT * args[0].shape[-1] ** -0.5
            self.found.append(round(float(logits.logsumexp(-1).amin()), 2))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def smallest_logsumexp(task: Task, batch: Batch) -> list[float]:
    task.eval()
    with _Smallest() as smallest:
        task.features(batch["image"][:64])
    return smallest.found
