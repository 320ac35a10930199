"""From a run's plain values to its parts: the task, and a loader for each part of the data."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from vitrail import zoo
from vitrail.data.decode import Preprocess
from vitrail.data.loader import Loader
from vitrail.data.random import seed_for
from vitrail.data.sets import ImageSet, Splits, split_val
from vitrail.errors import UserError
from vitrail.tasks.classify import Classify
from vitrail.tasks.task import Task
from vitrail.train.loop import Parts
from vitrail.train.run import Run
from vitrail.vit import ViT

log = logging.getLogger("vitrail")

VAL_FRACTION = 0.1
"""of the training part, where a set brings no validation part"""


def build(run: Run, splits: Splits, device: torch.device) -> tuple[Parts, int]:
    """The parts of a run, and its number of steps."""
    train, val = (splits.train, splits.val) if splits.val else split_val(splits.train, VAL_FRACTION)
    torch.manual_seed(seed_for(run.seed, -1))
    task = start(run, train).to(device)
    loader = Loader(
        train,
        task.preprocess,
        batch_size=min(run.batch_size, len(train)),
        seed=run.seed,
        train=True,
        augment=run.augment,
        device=device,
        workers=run.workers,
        memory=run.memory,
        balanced=run.balanced,
        max_bad=run.max_bad,
    )
    others = [
        evaluation_loader(task, part, device, run.workers, run.seed) if part else None for part in (val, splits.test)
    ]
    assert others[0] is not None
    steps = max(1, round(run.epochs * loader.steps_per_epoch))
    return Parts(task, loader, others[0], others[1]), steps


def evaluation_loader(task: Task, part: ImageSet, device: torch.device, workers: int = 0, seed: int = 0) -> Loader:
    """A loader that reads a part once, in order, as the task prepares pictures."""
    return Loader(
        part, task.preprocess, batch_size=256, seed=seed, train=False, augment=None, device=device, workers=workers
    )


def start(run: Run, train: ImageSet) -> Task:
    """A fresh task, or one from the weights that `run.init` names, for the classes of `train`."""
    if run.init is not None:
        task = zoo.load(run.init, classes=train.classes, channels=run.model.channels, image_size=run.model.image_size)
        own = task.preprocess
        if (run.mean and run.mean != own.mean) or (run.std and run.std != own.std):
            log.warning("mean and std differ from those that %s was trained with, which costs accuracy", run.init)
        task.preprocess = replace(own, mean=run.mean or own.mean, std=run.std or own.std)
        assert isinstance(task, Classify)
        task.loss_kind, task.smoothing = run.loss, run.smoothing
        task.class_weights = _class_weights(run, train)
        return task
    channels = run.model.channels
    mean, std = run.mean or (0.5,) * channels, run.std or (0.5,) * channels
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"mean and std need {channels} numbers, one a channel")
    preprocess = Preprocess(
        size=run.model.image_size,
        resize=run.resize,
        crop_fraction=run.crop_fraction,
        interpolation=run.interpolation,
        mean=mean,
        std=std,
        channels=channels,
    )
    return Classify(
        ViT(run.model),
        train.classes,
        preprocess,
        hidden=run.hidden,
        loss=run.loss,
        smoothing=run.smoothing,
        class_weights=_class_weights(run, train),
    )


def _class_weights(run: Run, train: ImageSet) -> Tensor | None:
    if not run.weighted:
        return None
    counts = torch.bincount(train.labels, minlength=len(train.classes)).clamp(min=1)
    return len(train.labels) / (len(train.classes) * counts.float())
