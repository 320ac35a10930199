"""Runs whose encoder stays as it is: its features are computed once, and a head is solved for or remembers them."""

from __future__ import annotations

import shlex
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitrail.tasks.caption import Caption
from vitrail.tasks.classify import Classify
from vitrail.tasks.knn import KNN
from vitrail.train.loop import Components, evaluate, finish, numbers
from vitrail.train.probe import Features, features, linear_probe, scores_of
from vitrail.train.run import Run
from vitrail.train.state import RunFolder
from vitrail.variants import DistilledHead
from vitrail.vit import Head
from vitrail.zoo import native


def fit_frozen(run: Run, parts: Components, folder: RunFolder) -> dict[str, Any]:
    """What `fit` is for methods `linear` and `knn`. It is done in one pass, so a stopped one simply begins again."""
    task = parts.task
    began = time.monotonic()
    folder.metrics.unlink(missing_ok=True)
    folder.log(kind="start", step=0, score=task.score, command=shlex.join(["vitrail", *sys.argv[1:]]))
    known = features(task, parts.train, run.precision)
    speed = len(known.labels) / (time.monotonic() - began)
    step = 1
    learned: dict[str, float] = {}
    if isinstance(task, Caption):
        task.build_index(*known)
    elif isinstance(task, KNN):
        task.head.build_index(*known)
    else:
        assert isinstance(task, Classify)
        step = _solve_head(run, task, known, parts, folder)
        learned = _of_training(task, known)
    folder.log(kind="train", step=step, epoch=1.0, seconds=time.monotonic() - began, images_per_s=speed, **learned)
    scores = evaluate(task, parts.val)
    # The rows of the strengths have no score, so this one is the best.
    folder.log(kind="val", step=step, seconds=time.monotonic() - began, **numbers(scores))
    for place in (folder.best, folder.last):
        native.save(task, place)
    return finish(run, parts, folder, step, time.monotonic() - began)


def _solve_head(run: Run, task: Classify, known: Features, parts: Components, folder: RunFolder) -> int:
    """Put the linear probe in as the head; a row for each strength of the penalty, and the chosen one's number."""
    probe = linear_probe(known, features(task, parts.val, run.precision), len(task.classes))
    for step, row in enumerate(probe.tried, 1):
        folder.log(kind="val", step=step, strength=row["strength"], cross_entropy=row["cross_entropy"])
    kind = DistilledHead if isinstance(task.head, DistilledHead) else Head
    head = kind(known.vectors.shape[1], len(task.classes)).to(probe.weight.device)
    # DeiT's pair of heads averages what they say of their own tokens, which is what one says of the tokens' mean.
    for linear in (module for module in head.modules() if isinstance(module, nn.Linear)):
        linear.load_state_dict({"weight": probe.weight, "bias": probe.bias})
    task.head, task.hidden, task.loss_kind = head, None, "softmax"
    return next(step for step, row in enumerate(probe.tried, 1) if row["strength"] == probe.strength)


@torch.no_grad()
def _of_training(task: Classify, known: Features) -> dict[str, float]:
    """Loss and accuracy on the training part."""
    scores = scores_of(F.linear(known.vectors, task.head.linear.weight, task.head.linear.bias), known.labels)
    return {"loss": scores["cross_entropy"], "accuracy": scores["top1"]}
