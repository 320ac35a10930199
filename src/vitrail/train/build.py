"""Build the components of a run from its plain values: the task, and a loader for each split."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from vitrail import zoo
from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.memory import fits
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import seed_for
from vitrail.data.sets import Splits, split_val
from vitrail.data.tally import Tally
from vitrail.errors import UserError
from vitrail.tasks import task_of
from vitrail.tasks.encoder import Encoder, encoder_for
from vitrail.tasks.task import Task
from vitrail.train import tensorboard
from vitrail.train.device import choose_attention, ready_to_compile
from vitrail.train.joined import join_statistics
from vitrail.train.loaders import evaluation_loader
from vitrail.train.loop import Components
from vitrail.train.optim import Optim
from vitrail.train.parallel import ALONE, World
from vitrail.train.run import Run, changed_fields
from vitrail.train.tune import FROZEN, tune
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
    kind = task_of(run.task)
    if run.tensorboard:
        tensorboard.require()
    if not splits.val:
        train, val = split_val(splits.train, VAL_FRACTION, run.group)
    else:
        train, val = splits.train, splits.val
    kind.check(run.task, run.tune.method)
    # A validation split cut from the training split shares its limit of unreadable images.
    tally = Tally.of(splits.train, run.max_bad)
    val_tally = Tally.of(val, run.max_bad) if splits.val else tally
    test_tally = Tally.of(splits.test, run.max_bad) if splits.test else None
    train, val = train.spread(run.images), val.spread(run.images)
    test = splits.test.spread(run.images) if splits.test else None
    seed = seed_for(run.seed, -1)
    torch.manual_seed(seed)
    task = start(run, Splits(train, val, test), loaded)
    if run.early_size is not None and sum(view.number for view in task.views) > 1:
        raise UserError(f"early_size shrinks one image per sample, and the task {task.name} has several: remove it")
    if task.whole_batch and run.accumulate != 1:
        raise UserError(f"the loss of the task {task.name} needs the whole batch at once: remove --accumulate")
    if world.shard and run.accumulate == "auto":
        raise UserError("--accumulate auto tries steps in each process alone, and --shard needs all: give a number")
    if run.init is not None:
        zoo.check_filled(task, run.init, seed)
        if run.tune.frozen:
            task.prepare_to_solve(run.tune.method, len(train))
        tune(task, run.tune)
    elif run.tune.method != "full":
        raise UserError(f"method {run.tune.method} needs pretrained weights: name them with --init")
    task.to(device)
    world.copy_from_first(task.state_dict().values())
    join_statistics(task, world)
    choose_attention(device)
    if run.compiled:
        ready_to_compile(device)
    target, augment = task.encode_target(train.target), run.augment if not run.tune.frozen else None
    memory = run.memory
    if memory is None and world.size > 1:  # all do the same, since images in memory are rounded differently
        memory = all(world.numbers(fits(train, target, task.preprocess, augment, device, world.size)))
    loader = Loader(
        train,
        task.preprocess,
        target=target,
        batch_size=run.batch_size,
        seed=run.seed,
        train=not run.tune.frozen,
        augment=run.augment,
        device=device,
        workers=run.workers,
        memory=memory,
        balanced=run.task.balanced,
        max_bad=run.max_bad,
        tally=tally,
        views=task.views,
        prepare=task.preparation(train=not run.tune.frozen),
        compile=run.compiled,
        rank=world.rank,
        world=world.size,
    )
    check_micro_batches(run, loader)
    others = [
        evaluation_loader(
            task, split, device, run.workers, run.seed, run.max_bad, shared, rank=world.rank, world=world.size
        )
        if split
        else None
        for split, shared in ((val, val_tally), (test, test_tally))
    ]
    assert others[0] is not None
    return Components(task, loader, others[0], others[1], world, not splits.val), run.steps(loader.steps_per_epoch)


def check_micro_batches(run: Run, loader: Loader) -> None:
    """Refuse more micro-batches than a process has images per step: batch norm, or sharding, would wait for ever."""
    images = min(loader.batch_size, len(loader.samples)) // loader.unit // loader.world * loader.unit
    if run.accumulate == "auto" or run.tune.frozen:
        return
    if loader.world > 1 and run.accumulate > images:
        raise UserError(
            f"{run.accumulate} micro-batches of {images} images per process and step: lower --accumulate, or raise "
            "--batch-size"
        )


IDLE = frozenset(
    [
        *("epochs", "max_steps", "accumulate", "early_size", "early", "eval_every", "patience", "compile", "drop_path"),
        *(entry.name for config in (Optim, Augment) for entry in fields(config)),
    ]
)
"""options without effect if the encoder is frozen: it reads each image once, without augmentation"""


def warn_unused(recipe: Run, requested: Run, method: str) -> None:
    """Warn of options that `requested` changes from the recipe's values but the chosen method does not use."""
    used = {"lora": {"lora_rank", "lora_alpha"}, "last-blocks": {"last_blocks"}}
    idle = {name for other, names in used.items() if other != method for name in names}
    idle |= {*IDLE, *task_of(requested.task).unused_when_frozen} if method in FROZEN else set()
    names = [f"--{name.replace('_', '-')}" for name in changed_fields(recipe, requested) if name in idle]
    if names:
        log.warning("method %s does not use %s", method, ", ".join(names))


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
