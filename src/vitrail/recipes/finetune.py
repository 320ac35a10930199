"""Fine-tuning: start from weights, with what moves and how far chosen by the size of the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitrail.data.augment import Augment
from vitrail.tasks.classify import Classification
from vitrail.train.optim import Optim
from vitrail.train.run import Run, with_fields
from vitrail.train.tune import Method, Tune

log = logging.getLogger("vitrail")

FEW_A_CLASS, FEW = 10, 1_000
"""below the first number of images a class the encoder stays frozen; below the second in all it moves by LoRA"""
NARROW = 384
"""below this width all weights move in place of LoRA, and as those of a model that starts from scratch"""
SMALL = Optim(optimizer="muon", lr=1e-3, muon_lr=4e-3, weight_decay=0.05, beta2=0.98, warmup=0.1, clip=1.0)
"""for all weights of a narrow model: the recipe `folder`'s. Features of so small a model leave much to learn"""
RATES: dict[Method, float] = {"full": 1e-4, "last-blocks": 1e-4, "lora": 5e-4}
"""learning rates of a model 768 wide"""
LAYER_DECAY: dict[Method, float] = {"full": 0.75}


def finetune(images: int) -> Run:
    """Fine-tune pretrained weights to classify images. The amount of data sets method and learning rate.

    Command: vitrail train finetune --data FOLDER [--init SOURCE] [--method lora] [--image-size 384 384]

    Without --method, the choice is (and one line on standard error gives the reason):
    - fewer than 10 images per class: `linear`. So few images cannot tell a useful change of millions of weights from
      noise, and training all weights spoils good features (arXiv 2202.10054). The head alone is a convex problem. It is
      solved exactly, with its penalty chosen on the validation split.
    - fewer than 1,000 images in all: `lora`. On tasks of 1,000 images, low-rank updates score higher than all weights
      and than the head alone (arXiv 2206.04673, table 1). A model less than 384 wide trains all weights instead: an
      update of rank 8 is not small beside its matrices, and takes as long to learn as the full matrix.
    - otherwise: `full`, with a learning rate that falls by a factor of 0.75 per layer towards the input, because early
      layers are the most general (arXiv 2106.08254). A model less than 384 wide is trained without this factor, by Muon
      and at the rates of training from scratch.
    `last-blocks` and `knn` are never chosen. The first saves time and memory. The second needs one pass over the data,
    but is seldom better than `linear`.

    In a model 768 wide the learning rate is 1e-4 for all weights, and 5e-4 for LoRA's factors, which start at zero and
    have further to go. It grows as the width shrinks: AdamW changes each weight by about the rate, and fewer changes
    add up in a narrower layer (arXiv 2203.03466, table 3). With fewer than 10,000 images there are more epochs, so that
    about 10,000 images are seen, each at most 50 times.
    `vitrail train folder --init SOURCE` is the same. Score, beside training from scratch: results/transfer.json
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
    """The run with `changes` made to it, and where its method is `auto` the method and rates that suit the data.

    What is asked for is kept: a method among the changes gets its rates, and rates among them stay.
    """
    wanted = changes.get("method", run.tune.method)
    if "auto" not in (wanted, run.tune.method):
        return with_fields(run, changes)
    width = run.model.width
    method, reason = choose(images, classes, width) if wanted == "auto" else (wanted, "")
    peak = float(f"{RATES.get(method, run.optim.lr) * 768 / width:.2g}")
    optim = replace(run.optim, lr=peak, layer_decay=LAYER_DECAY.get(method, 1.0))
    run = replace(run, optim=SMALL if method == "full" and width < NARROW else optim)
    run = with_fields(run, {**changes, "method": method})
    if reason:
        rate = "" if run.tune.frozen else f"; learning rate {run.optim.lr:g}"
        log.warning("method %s, since %s%s", method, reason, rate)
    return run


def choose(images: int, classes: int, width: int = 768) -> tuple[Method, str]:
    """A method for so many training images of so many classes, and a model so wide, and why."""
    have = f"{images:,} images, {images // max(classes, 1):,} a class,"
    if images < FEW_A_CLASS * classes:
        return "linear", f"{have} are too few to move the encoder by"
    if images < FEW and width < NARROW:
        return "full", f"{have} are enough to move all weights of a model as small as this"
    if images < FEW:
        return "lora", f"{have} are enough to adapt the encoder, not to learn all its weights anew"
    return "full", f"{have} are enough for all weights to move"
