"""What a training tells people on standard error: at its start what it does, at its end what it chose and what is next.

Each is one line of the log. Programs read `scores.json`, `recipe.json` or `--json` instead.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vitrail import recipes, recommended
from vitrail.data.kinds import role_of
from vitrail.data.sets import ImageSet
from vitrail.data.sources import is_image, is_litter
from vitrail.process import cores
from vitrail.tasks.task import Task
from vitrail.tasks.values import Score
from vitrail.train.device import FORMATS, number_format
from vitrail.train.folder import RunFolder
from vitrail.train.loop import Components
from vitrail.train.run import Run
from vitrail.units import count
from vitrail.vit import ViTConfig

log = logging.getLogger("vitrail")

NAMED = 6
"""classes whose images are counted one by one; of more, the fewest and the most are named"""
BUSY = 0.5
"""fraction of the cores that other processes use, from which they slow this one down"""
WATCHED = 0.5
"""seconds over which it is measured what they use"""


def begin(run: Run, components: Components, folder: RunFolder, steps: int, resume: bool) -> None:
    """Tell what a run trains on, with what, and where it is kept; a new one also what it might start from."""
    for line in start_lines(run, components, folder, steps):
        log.warning(line)
    if not resume and not run.fast_dev_run:
        for line in advice(run, len(components.train.set), components.train.device.type != "cpu"):
            log.warning(line)


def start_lines(run: Run, components: Components, folder: RunFolder, steps: int) -> Iterator[str]:
    """The lines of `begin`: the images of each split, the model, the training, the folder."""
    task, train = components.task, components.train
    for name, loader in {"train": train, "val": components.val, "test": components.test}.items():
        if loader is not None:
            held = " held back from train" * (name == "val" and components.held_back)
            bad = f", {len(loader.bad):,} of them left out" if loader.bad else ""  # later ones are named when read
            yield f"{name}: {len(loader.set):,} images{held}{classes_of(loader.set)}{bad}"
    yield model_line(run, task)
    yield training_line(run, train.device, steps, train.steps_per_epoch, components.world.size, len(train.set))
    alone = components.world.size == 1  # else what other processes use may be this run's
    if train.device.type == "cpu" and alone and (line := busy_line()) is not None:
        yield line
    yield f"folder: {folder.path}"


def classes_of(images: ImageSet) -> str:
    """How many images each class has, or the classes with the fewest and the most; empty for data without."""
    names = images.classes
    if not names or not images.target.stratum(0):
        return f" ({len(names)} classes)" if names else ""
    numbers = torch.bincount(images.target.strata(), minlength=len(names)).tolist()
    pairs = list(zip(names, numbers, strict=True))
    if len(pairs) <= NAMED:
        return f" ({', '.join(f'{name} {number:,}' for name, number in pairs)})"
    fewest, most = (best(pairs, key=lambda pair: pair[1]) for best in (min, max))
    if fewest[1] == most[1]:
        return f" ({len(names):,} classes, {most[1]:,} each)"
    return f" ({len(names):,} classes, {fewest[1]:,} ({fewest[0]}) to {most[1]:,} ({most[0]}) each)"


def model_line(run: Run, task: Task) -> str:
    """The network, its parameters, its image size, and where its weights come from."""
    parameters = sum(parameter.numel() for parameter in task.parameters())
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    some = f" ({count(trained)} trained)" if trained < parameters and not run.tune.frozen else ""
    size = "x".join(map(str, task.preprocess.size))
    origin = "from scratch" if run.init is None else f"from {run.init}, method {run.tune.method}"
    return f"model: {run.network}, {count(parameters)} parameters{some}, images of {size}, {origin}"


def training_line(
    run: Run, device: torch.device, steps: int, per_epoch: int, processes: int = 1, images: int | None = None
) -> str:
    """How long it trains, and with what. A batch holds at most the `images` that there are; None: more than it asks."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        where = f"{device.type.upper()}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else "MPS"
    where = f"{processes} processes, each on {where}" if processes > 1 else where
    kind = number_format(device, run.precision)
    name = next(word for word, own in FORMATS.items() if own == kind)
    scaled = ", the loss is scaled" if kind == torch.float16 and not run.tune.frozen else ""
    if run.tune.frozen:
        return f"training: one pass on {where}, {name}"
    epochs = f"{steps / per_epoch:.3g}"
    length = f"{epochs} epoch{'s' * (epochs != '1')} = {steps:,} step{'s' * (steps > 1)}"
    batch = f"{run.batch_size} image{'s' * (run.batch_size > 1)}"
    if images is not None and images < run.batch_size:
        batch = f"all {images} images (--batch-size {run.batch_size} is more)"
    return f"training: {length} of {batch} on {where}, {name}{scaled}"


def busy_line() -> str | None:
    """A line if other processes have used this machine's cores in the last minute and use them now.

    The load of the last minute alone may be that of a command that has ended, such as an installation. None also where
    the system does not tell: it does on Linux.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    total = os.cpu_count() or 1
    if load < BUSY * total or (used := used_by_others(total, WATCHED)) is None or used < BUSY * total:
        return None
    fewer = f"; OMP_NUM_THREADS={max(1, cores() // 2)} may be faster" if torch.get_num_threads() > 1 else ""
    return f"busy: other processes use {used:.1f} of the {total} cores: training is slower{fewer}"


def used_by_others(total: int, seconds: float, clock: Path = Path("/proc/stat")) -> float | None:
    """The number of the `total` cores that other processes use in the next `seconds`; None if `clock` is missing."""
    try:
        before, own = _busy_and_all(clock), time.process_time()
        time.sleep(seconds)
        after = _busy_and_all(clock)
    except OSError:
        return None
    busy, every = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, busy / max(every, 1) * total - (time.process_time() - own) / seconds)


def _busy_and_all(clock: Path) -> tuple[int, int]:
    """The time that all cores have worked since the machine started, and that with idle time, in ticks."""
    with clock.open() as file:  # user, nice, system, idle, waiting for a disk, interrupts (2), stolen
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def advice(run: Run, images: int, gpu: bool) -> Iterator[str]:
    """The weights of the Hub to start from, with the command, for a run that starts from none of the user's."""
    recipe = recipes.RECIPES.get(run.recipe)
    by_default = run.init in recommended.bundled() and recipe is not None and recipe(images).init == run.init
    from_scratch = run.init is None and min(run.model.image_size) >= recommended.SMALL
    if not isinstance(run.model, ViTConfig) or not (by_default or from_scratch):
        return
    if (encoder := recommended.suited(run.task.name, images, gpu)) is None:
        return
    size = f"{count(encoder.parameters)} parameters, {encoder.licence}"
    yield f"tip: pretrained weights usually score higher (vitrail models lists some), such as {encoder.id} ({size}):"
    yield f"tip: {recommended.choice(run.task.name).command_for(encoder, quoted([run.data]))}"


def end(kind: type[Task], folder: RunFolder, named: bool) -> None:
    """Tell how the best weights were chosen, and commands to continue with. `named`: where they are was printed."""
    for line in end_lines(kind, folder, named):
        log.warning(line)


def end_lines(kind: type[Task], folder: RunFolder, named: bool) -> Iterator[str]:
    """The lines of `end`."""
    run, scores, rows = folder.run(), folder.scores or {}, folder.rows()
    if kind.score is not None:
        yield from chosen_lines(run, kind.score, scores.get("split", ""), rows)
    if not named:
        yield f"best weights: {folder.best}, report: {folder.report}"
    data = folder.data(run.data)
    image = an_image(Path(data)) or Path("IMAGE")
    own = str(folder.path)
    yield f"next: {quoted(['vitrail', 'predict', str(image), '--model', own])}"
    if isinstance(run.model, ViTConfig):
        looks = str(folder.path / "explain")
        yield f"next: {quoted(['vitrail', 'explain', str(image), '--model', own, '--out', looks])}"
    yield f"next: {quoted(['vitrail', 'serve', own])}"


def chosen_lines(run: Run, rule: Score, split: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Which evaluation on `val` the best weights are of, and what that means for a score on the same split."""
    seen = [(row["step"], row[rule.name]) for row in rows if row["kind"] == "val" and rule.name in row]
    if run.tune.frozen:
        yield f"chosen: method {run.tune.method} is solved in one pass; what it can choose, it chooses on val"
    elif seen:
        best = seen[0]
        for pair in seen[1:]:
            best = pair if rule.better(pair[1], best[1]) else best
        number = f"the best of {len(seen)} evaluations" if len(seen) > 1 else "the only evaluation"
        yield f"chosen: step {best[0]:,} of {seen[-1][0]:,}, {number} on val ({rule.text(best[1])})"
    if split == "val" and not run.fast_dev_run:
        yield "the score is on val too, where it was chosen, so it is a little too good; a test split gives a fair one"


def an_image(data: Path) -> Path | None:
    """An image of a data folder for the commands at the end, of an evaluation split if there is one."""
    for folder in (data / "test", data / "val", data):
        for place, inside, names in os.walk(folder):
            there = sorted((role_of(name) == "targets", name) for name in inside if not is_litter(name))
            inside[:] = [name for _, name in there]  # masks last
            files = (Path(place, name) for name in sorted(names) if not is_litter(name))
            if (found := next(filter(is_image, files), None)) is not None:
                return found
    return None


def quoted(words: Sequence[str]) -> str:
    """Words as the shell of this system takes them."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
