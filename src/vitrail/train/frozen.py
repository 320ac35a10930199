"""Runs with a frozen encoder: features are computed once, and what follows the encoder is solved for."""

from __future__ import annotations

import shlex
import sys
import time
from typing import Any

from vitrail.train.folder import RunFolder
from vitrail.train.loop import Components, evaluate, finish, numbers
from vitrail.train.probe import features
from vitrail.train.run import Run


def fit_frozen(run: Run, components: Components, folder: RunFolder) -> dict[str, Any]:
    """Like `fit`, for the methods in `Task.solved`. It takes one pass, so an interrupted run starts again."""
    task = components.task
    began = time.monotonic()
    folder.metrics.unlink(missing_ok=True)
    folder.log_start(run, task.score, 0, shlex.join(["vitrail", *sys.argv[1:]]), components.images)
    world = components.world
    train = features(task, components.train, run.precision, world)
    speed = len(train.labels) / (time.monotonic() - began)
    tried = task.solve(run.tune.method, train, lambda: features(task, components.val, run.precision, world))
    # What a row says of the training split begins with `train_`; only the row that was chosen has it.
    step, trained = 1, dict[str, float]()
    for number, row in enumerate(tried, 1):
        own = {name.removeprefix("train_"): value for name, value in row.items() if name.startswith("train_")}
        folder.log(kind="val", step=number, **{k: value for k, value in row.items() if not k.startswith("train_")})
        if own:
            step, trained = number, own
    folder.log(kind="train", step=step, epoch=1.0, seconds=time.monotonic() - began, images_per_s=speed, **trained)
    scores = evaluate(task, components.loaders, "val", world=world)
    # The rows of the penalties have no score, so this is the best row.
    folder.log(kind="val", step=step, seconds=time.monotonic() - began, **numbers(scores))
    for place in (folder.best, folder.last) if world.is_main else ():
        task.save(place)
    return finish(run, components, folder, step, time.monotonic() - began)
