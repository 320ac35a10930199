"""Small tasks of every kind in `TASKS`, and batches for them: what the tests of the contract run over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from checked import checked

import vitrail
from vitrail.data.masks import Mask
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key
from vitrail.data.text import Tokenizer
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.caption import Caption, Captioning, Decoding, numbered
from vitrail.tasks.classify import Classify
from vitrail.tasks.classify.knn import Neighbours
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.regress import Regress
from vitrail.tasks.segment import Segment, Segmentation
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
    "regress": {"two values": lambda: Regress(encoder_for(NANO), ["age", "angle"], EIGHT)},
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
    if isinstance(task, Caption):
        captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
        return {**batch, "label": numbered(captions, task.tokenizer, task.captioning.most_words), "captions": captions}
    if isinstance(task, Segment):
        mask = torch.randint(-1, 3, (count, *size), generator=generator)  # -1 is void
        return {**batch, "mask": mask, "truth": [Mask(str(i), m) for i, m in enumerate(mask)]}
    return {**batch, "label": torch.randint(max(1, len(task.classes)), (count,), generator=generator)}


def rows_of(batch: Batch, rows: torch.Tensor) -> Batch:
    """Some rows of a batch, in that order."""
    count = len(batch["sample"])

    def chosen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows] if value.ndim and len(value) == count else value
        return [value[i] for i in rows.tolist()] if isinstance(value, list) else value

    return {name: chosen(value) for name, value in batch.items()}


def inputs(task: Task, batch: Batch) -> tuple[torch.Tensor, ...]:
    """What `forward` takes of a batch."""
    return (batch["image"], batch["label"]) if isinstance(task, Caption) else (batch["image"],)
