"""Fine-tuning: start from pretrained weights, with method and learning rate chosen by the size of the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitrail.data.augment import Augment
from vitrail.tasks import task_of
from vitrail.tasks.classify import Classification
from vitrail.train.optim import Optim
from vitrail.train.run import Run, with_fields
from vitrail.train.tune import Method, Tune

log = logging.getLogger("vitrail")

FEW_PER_CLASS, FEW = 10, 1_000
"""with fewer images per class than the first number the encoder is frozen; with fewer in total than the second, LoRA"""
NARROW = 384
"""below this width all weights are trained instead of LoRA, with the settings of training from scratch"""
SMALL = Optim(optimizer="muon", lr=1e-3, muon_lr=4e-3, weight_decay=0.05, beta2=0.98, warmup=0.1, clip=1.0)
"""learning rate for all weights of a narrow model, as in the recipe `folder`: small models still have much to learn"""
RATES: dict[Method, float] = {"full": 1e-4, "last-blocks": 1e-4, "lora": 5e-4}
"""learning rates for a model of width 768"""
LAYER_DECAY: dict[Method, float] = {"full": 0.75}


def finetune(images: int) -> Run:
    """Fine-tune pretrained weights to classify images. The amount of data determines method and learning rate.

    Command: vitrail train finetune --data FOLDER [--init SOURCE] [--method lora] [--image-size 384 384]

    Without --method, the choice is (and one line on standard error gives the reason):
    - fewer than 10 images per class: `linear`. With so few images, training millions of weights fits noise and distorts
    good features (arXiv 2202.10054). Training only the head is a convex problem. It is solved exactly, with its penalty
    chosen on the validation split.
    - fewer than 1,000 images in all: `lora`. On tasks of 1,000 images, low-rank updates score higher than training all
    weights or only the head (arXiv 2206.04673, table 1). A model of width below 384 trains all weights instead:
    compared with its matrices an update of rank 8 is not small, and takes as long to learn.
    - otherwise: `full`, with a learning rate that falls by a factor of 0.75 per layer towards the input, because early
    layers are the most general (arXiv 2106.08254). A model of width below 384 is trained without this factor, by Muon
    with the learning rates of training from scratch. `last-blocks` and `knn` are never chosen. The first saves time and
    memory. The second needs one pass over the data, but is seldom better than `linear`.

    For a model of width 768 the learning rate is 1e-4 for all weights, and 5e-4 for LoRA's factors, which start at zero
    and change more. It is inversely proportional to the width: AdamW changes each weight by about the learning rate,
    and fewer changes add up in a narrower layer (arXiv 2203.03466, table 3). With fewer than 10,000 images there are
    more epochs, so that about 10,000 images are seen, each at most 50 times. `vitrail train folder --init SOURCE` is
    the same. Score, compared with training from scratch: results/transfer.json
    """
    epochs = min(50.0, max(5.0, 10_000 / max(images, 1)))
    return Run(
        recipe="finetune",
        data="folder",
        init="classify",
        tune=Tune(method="auto"),
        task=Classification(smoothing=0.1, balanced=True),
        augment=Augment(crop="resized", scale=(0.3, 1.0), flip=True),
        optim=Optim(weight_decay=0.05, warmup=0.1, clip=1.0),
        epochs=epochs,
        batch_size=32 if images < 2_000 else 128,
        eval_every=max(1.0, epochs / 10),
    )


def resolve_auto(run: Run, images: int, classes: int, changes: Mapping[str, Any]) -> Run:
    """The run with `changes`; if its method is `auto`, with the method and learning rates that suit the data.

    Explicit values are kept: a method in `changes` gets its default learning rates, and rates in `changes` stay.
    """
    wanted = changes.get("method", run.tune.method)
    if "auto" not in (wanted, run.tune.method):
        return with_fields(run, changes)
    width = run.model.width
    method, reason = choose(images, classes, width) if wanted == "auto" else (wanted, "")
    if wanted == "auto" and method == "linear" and method not in task_of(run.task).solved:
        method = "frozen"  # the same, by gradient descent
    peak = float(f"{RATES.get(method, run.optim.lr) * 768 / width:.2g}")
    optim = replace(run.optim, lr=peak, layer_decay=LAYER_DECAY.get(method, 1.0))
    run = replace(run, optim=SMALL if method == "full" and width < NARROW else optim)
    run = with_fields(run, {**changes, "method": method})
    if reason:
        rate = "" if run.tune.frozen else f"; learning rate {run.optim.lr:g}"
        log.warning("method %s: %s%s", method, reason, rate)
    return run


def choose(images: int, classes: int, width: int = 768) -> tuple[Method, str]:
    """The method for this number of training images and classes and this model width, with the reason."""
    have = f"{images:,} images, {images // classes:,} per class," if classes else f"{images:,} images"
    if images < FEW_PER_CLASS * classes:
        return "linear", f"{have} are too few to train the encoder"
    if images < FEW and width < NARROW:
        return "full", f"{have} are enough to train all weights of such a small model"
    if images < FEW:
        return "lora", f"{have} are enough to adapt the encoder, but not to train all its weights"
    return "full", f"{have} are enough to train all weights"
