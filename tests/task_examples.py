"""Small tasks of every kind in `TASKS`, and batches for them: what the tests of the contract run over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from checked import checked

import vitrail
from vitrail.data.affine import Affine
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key
from vitrail.data.targets import Labels, Numbers, Tags, Target, Texts
from vitrail.data.text import Tokenizer
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.caption import Caption, Captioning, Decoding
from vitrail.tasks.classify import Classify
from vitrail.tasks.classify.knn import Neighbours
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.regress import Regress, Units
from vitrail.tasks.segment import Segment, Segmentation
from vitrail.tasks.tag import Tag
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch

NANO, EIGHT = SIZES["nano/2"], Preprocess(size=(8, 8))
CAPTIONS = [["a red dog runs", "a dog on the grass"], ["the grass is red"], ["a dog", "a red dog", "the dog runs"]]
WORDS = Tokenizer.train([text for texts in CAPTIONS for text in texts], "words", 20)


def _neighbours() -> Task:
    task = Classify(encoder_for(NANO), ["a", "b"], EIGHT, neighbours=5)
    checked(Neighbours, task.head).build_index(torch.randn(5, 64), torch.tensor([0, 1, 1, 0, 1]))
    return task


def _captioner(decoder: Any, **changes: Any) -> Task:
    small = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_dropout": 0.0}
    settings = Captioning(decoder=decoder, **{**small, "decoding": Decoding(max_length=6), **changes})
    return Caption(encoder_for(config_for(NANO, drop_path=0.3)), settings, WORDS, EIGHT)


def _segmenter(**values: Any) -> Task:
    weights = torch.tensor([0.5, 1.0, 2.0]) if values.get("class_weights") else None
    encoder = encoder_for(config_for(NANO, drop_path=0.3))
    return Segment(encoder, ["sky", "road", "tree"], EIGHT, Segmentation(**values), weights)


EXAMPLES: dict[str, dict[str, Callable[[], Task]]] = {
    "classify": {
        "softmax": lambda: vitrail.create("nano/2", classes=["a", "b"], drop_path=0.3),
        "sigmoid, hidden": lambda: Classify(
            encoder_for(config_for(NANO, registers=1)), ["a", "b", "c"], EIGHT, hidden=8, loss="sigmoid", smoothing=0.1
        ),
        "knn": _neighbours,
    },
    "tag": {
        "three labels": lambda: Tag(encoder_for(config_for(NANO, drop_path=0.3)), ["a", "b", "c"], EIGHT, smoothing=0.1)
    },
    "regress": {
        "two values": lambda: Regress(encoder_for(NANO), ["age", "angle"], EIGHT),
        "units": lambda: Regress(encoder_for(NANO), ["age", "x"], EIGHT, units=Units((40.0, 0.1), (12.0, 0.02))),
    },
    "embed": {"plain": lambda: vitrail.create("nano/2")},
    "caption": {
        **{decoder: partial(_captioner, decoder) for decoder in ("recurrent", "attentive", "transformer")},
        "bag of words": partial(_captioner, "transformer", bag_of_words=0.5),
    },
    "segment": {
        "linear": partial(_segmenter, head="linear", upscale=2, dice=1.0, class_weights="log"),
        "mask transformer": partial(_segmenter, head="mask-transformer", head_blocks=1),
        "queries": partial(_segmenter, head="queries", queries=6, head_blocks=1, upscale=2),
    },
}
"""by the name of the task"""


Sizes = Sequence[tuple[int, int]]


def _labels(task: Task, sizes: Sizes, generator: torch.Generator) -> Target:
    classes = list(task.classes) or ["any"]
    return Labels(torch.randint(len(classes), (len(sizes),), generator=generator), classes)


def _tags(task: Task, sizes: Sizes, generator: torch.Generator) -> Target:
    return Tags(torch.rand(len(sizes), len(task.classes), generator=generator).round(), list(task.classes))


def _numbers(task: Task, sizes: Sizes, generator: torch.Generator) -> Target:
    return Numbers(torch.randn(len(sizes), len(task.outputs), generator=generator, dtype=torch.float64), task.outputs)


def _texts(task: Task, sizes: Sizes, generator: torch.Generator) -> Target:
    return Texts([CAPTIONS[i % len(CAPTIONS)] for i in range(len(sizes))])


def _masks(task: Task, sizes: Sizes, generator: torch.Generator) -> Target:
    count = len(task.classes)
    drawn = [torch.randint(count + 1, size, generator=generator) for size in sizes]
    masks = [mask.masked_fill(mask == count, 255).to(torch.uint8) for mask in drawn]
    return Masks(masks, [str(i) for i in range(len(sizes))], list(task.classes))


TARGETS: dict[type[Target], Callable[[Task, Sizes, torch.Generator], Target]] = {
    Labels: _labels,
    Tags: _tags,
    Numbers: _numbers,
    Texts: _texts,
    Masks: _masks,
}
"""a target for images of these sizes, by its class"""
INPUTS = {"caption": ("image", "label")}
"""the fields of a batch that `forward` takes, by the name of the task; the image alone for the others"""


def target_for(task: Task, sizes: Sizes, seed: int = 0) -> Target:
    """What images of these sizes carry for a task, before `encode_target`."""
    return TARGETS[task.target](task, sizes, torch.Generator().manual_seed(seed))


def batch_for(task: Task, count: int, seed: int = 0) -> Batch:
    """A batch as the loader gives it in training, and what evaluation adds."""
    generator = torch.Generator().manual_seed(seed)
    channels, size = task.preprocess.channels, task.preprocess.size
    batch: Batch = {
        "image": torch.randn(count, channels, *size, generator=generator),
        "sample": torch.arange(100, 100 + count),
        "epoch": torch.tensor(3),
        "key": draw_key(seed, 3),
    }
    target = task.encode_target(target_for(task, [size] * count, seed))
    values = [target.read(i) for i in range(count)]
    if target.spatial:
        sizes = torch.tensor([size]).expand(count, -1)
        affine = Affine.crop(torch.cat([torch.zeros_like(sizes), sizes], dim=1), sizes, size)
        batch |= {"truth": values, "affine": affine}
        values = [target.warp(value, affine.subset([i])) for i, value in enumerate(values)]
    return {**batch, **target.collate(values, torch.arange(count), training=False)}


def rows_of(batch: Batch, rows: torch.Tensor) -> Batch:
    """Some rows of a batch, in that order."""
    count = len(batch["sample"])

    def chosen(value: Any) -> Any:
        if isinstance(value, Affine):
            return value.subset(rows.tolist())
        if isinstance(value, torch.Tensor):
            return value[rows] if value.ndim and len(value) == count else value
        return [value[i] for i in rows.tolist()] if isinstance(value, list) else value

    return {name: chosen(value) for name, value in batch.items()}


def inputs(task: Task, batch: Batch) -> tuple[torch.Tensor, ...]:
    """What `forward` takes of a batch."""
    return tuple(batch[name] for name in INPUTS.get(task.name, ("image",)))
