"""Build the components of a run from its plain values: the task, and a loader for each split."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vitrail import zoo
from vitrail.data.loader import Loader
from vitrail.data.memory import fits
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import seed_for
from vitrail.data.sets import ImageSet, Splits, split_val
from vitrail.data.tally import Tally
from vitrail.errors import UserError
from vitrail.tasks import task_of
from vitrail.tasks.encoder import Encoder, encoder_for
from vitrail.tasks.task import Task
from vitrail.train import tensorboard
from vitrail.train.device import choose_attention, ready_to_compile
from vitrail.train.joined import join_statistics
from vitrail.train.loaders import evaluation_loader
from vitrail.train.logits import QKClip
from vitrail.train.loop import Components
from vitrail.train.parallel import ALONE, World
from vitrail.train.run import Run
from vitrail.train.tune import tune
from vitrail.variants import as_variant
from vitrail.variants.initial import initialise
from vitrail.variants.mimetic import mimetic_init
from vitrail.vit import ViTConfig

log = logging.getLogger("vitrail")

VAL_FRACTION = 0.1
"""fraction of the training split for validation, if a data set has no validation split"""


def build(
    run: Run, splits: Splits, device: torch.device, loaded: Task | None = None, world: World = ALONE
) -> tuple[Components, int]:
    """The components of a run, and its number of steps. `loaded` is the model of `run.init`, if already loaded."""
    if run.tensorboard:
        tensorboard.require()
    task_of(run.task).check(run.task, run.tune.method)
    used, tallies = used_images(run, splits)
    task = initial_task(run, used, loaded, world)
    task.to(device)
    world.broadcast_tensors(task.state_dict().values())
    join_statistics(task, world)
    choose_attention(device)
    if run.compiled:
        ready_to_compile(device)
    loader = training_loader(run, task, used.train, tallies["train"], device, world)
    check_micro_batches(run, loader)

    def evaluation(split: str, images: ImageSet) -> Loader:
        how = (run.workers, run.seed, run.max_bad, tallies[split], world.rank, world.size)
        return evaluation_loader(task, images, device, *how)

    assert used.val is not None
    val, test = evaluation("val", used.val), evaluation("test", used.test) if used.test else None
    return Components(task, loader, val, test, world, not splits.val), run.steps(loader.steps_per_epoch)


def used_images(run: Run, splits: Splits) -> tuple[Splits, dict[str, Tally]]:
    """The images of each split that the run reads, and each split's tally of unreadable images.

    A data set without a validation split gets one, cut from its training split, whose tally it shares.
    """
    tallies = {"train": Tally.of(splits.train, run.max_bad)}
    if splits.val:
        train, val = splits.train, splits.val
        tallies["val"] = Tally.of(val, run.max_bad)
    else:
        train, val = split_val(splits.train, VAL_FRACTION, run.group)
        tallies["val"] = tallies["train"]
    test = None
    if splits.test:
        test = splits.test.spread(run.images)
        tallies["test"] = Tally.of(splits.test, run.max_bad)
    return Splits(train.spread(run.images), val.spread(run.images), test), tallies


def initial_task(run: Run, splits: Splits, loaded: Task | None, world: World) -> Task:
    """The task before its first step, on the CPU. Raises UserError for options that do not go with it."""
    seed = seed_for(run.seed, -1)
    torch.manual_seed(seed)
    task = start(run, splits, loaded)
    if run.early_size is not None and sum(view.number for view in task.views) > 1:
        raise UserError(f"early_size shrinks one image per sample, and the task {task.name} has several: remove it")
    if task.whole_batch and run.accumulate != 1:
        raise UserError(f"the loss of the task {task.name} needs the whole batch at once: remove --accumulate")
    if world.shard and run.optim.qk_clip:
        raise UserError("qk_clip scales whole weights, which --shard shares out: remove one of the two")
    if world.shard and run.accumulate == "auto":
        raise UserError("--accumulate auto tries steps in each process alone, and --shard needs all: give a number")
    if run.init is not None:
        zoo.check_filled(task, run.init, seed)
        if run.tune.frozen:
            task.prepare_to_solve(run.tune.method, len(splits.train))
        tune(task, run.tune)
    elif run.tune.method != "full":
        raise UserError(f"method {run.tune.method} needs pretrained weights: name them with --init")
    if run.optim.qk_clip and not run.tune.frozen:
        QKClip(task, run.optim.qk_clip)  # refuses what it cannot bound, before any image is decoded
    return task


def training_loader(run: Run, task: Task, images: ImageSet, tally: Tally, device: torch.device, world: World) -> Loader:
    """The loader of the training images; for a frozen encoder, which reads each once, without augmentation."""
    learns, target = not run.tune.frozen, task.encode_target(images.target)
    memory = run.memory
    if memory is None and world.size > 1:  # all do the same, since images in memory are rounded differently
        augment = run.augment if learns else None
        memory = all(world.all_gather_number(fits(images, target, task.preprocess, augment, device, world.size)))
    return Loader(
        images,
        task.preprocess,
        target=target,
        batch_size=run.batch_size,
        seed=run.seed,
        train=learns,
        augment=run.augment,
        device=device,
        workers=run.workers,
        memory=memory,
        balanced=run.task.balanced,
        max_bad=run.max_bad,
        tally=tally,
        views=task.views,
        prepare=task.preparation(train=learns),
        compile=run.compiled,
        rank=world.rank,
        world=world.size,
    )


def check_micro_batches(run: Run, loader: Loader) -> None:
    """Refuse more micro-batches than a process has images per step: batch norm, or sharding, would wait for ever."""
    images = min(loader.batch_size, len(loader.set)) // loader.unit // loader.world * loader.unit
    if run.accumulate == "auto" or run.tune.frozen:
        return
    if loader.world > 1 and run.accumulate > images:
        raise UserError(
            f"{run.accumulate} micro-batches of {images} images per process and step: lower --accumulate, or raise "
            "--batch-size"
        )


def open_for(
    task: Task | type[Task],
    data: str,
    options: Mapping[str, Any],
    name: str | None = None,
    group: str | None = None,
) -> Splits:
    """The splits of a data set, as the task needs them; no `group` may be in two splits.

    `options` are the `data_options` of the task or its settings.
    """
    return task.target.open(data, name=name, group=group, val_fraction=0, **options)


def start(run: Run, splits: Splits, loaded: Task | None = None) -> Task:
    """A new task for the training split's classes or captions, or one from the weights of `run.init`."""
    kind = task_of(run.task)
    if run.init is None:
        task = kind.create(run.task, fresh_encoder(run), splits, preparation(run))
        initialise(task, run.weights_init)
        return task
    loaded = zoo.load(run.init) if loaded is None else loaded
    zoo.change_channels(loaded, run.model.channels)
    zoo.change_size(loaded, run.model.image_size)
    if isinstance(run.model, ViTConfig):
        zoo.change_drop_path(loaded, run.model.drop_path)
        zoo.change_merge(loaded, as_variant(run.model).merge)
    if loaded.classes != splits.train.classes and sorted(loaded.classes) == sorted(splits.train.classes):
        log.warning(f"{run.init} has these classes in another order, so the head starts with new values")
    return kind.adopt(run.task, loaded, splits, changed_preparation(run, loaded.preprocess))


def fresh_encoder(run: Run) -> Encoder:
    """The run's encoder with its initial weights."""
    encoder = encoder_for(run.model)
    if run.attention_init == "mimetic":
        mimetic_init(encoder)
    return encoder


PREPARATION = ("mean", "std", "resize", "crop_fraction", "interpolation")
"""fields of a run for preprocessing; None is the checkpoint's value, or the default of `Preprocess`"""


def preparation(run: Run) -> Preprocess:
    """Preprocessing for a model that is trained from scratch."""
    return _prepared(run, Preprocess(size=run.model.image_size, channels=run.model.channels))


def changed_preparation(run: Run, own: Preprocess) -> Preprocess:
    """The checkpoint's preprocessing with the run's changes; a warning names the changes."""
    new = _prepared(run, own)
    changed = [name for name in PREPARATION if getattr(new, name) != getattr(own, name)]
    if changed:
        log.warning(
            "%s differs from the training of %s: accuracy may be lower at first",
            " and ".join(f"{name.replace('_', ' ')} {getattr(new, name)}" for name in changed),
            run.init,
        )
    return new


def _prepared(run: Run, own: Preprocess) -> Preprocess:
    wanted = {name: getattr(run, name) for name in PREPARATION}
    try:
        return replace(own, **{name: value for name, value in wanted.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{error}: change or remove the option") from None
