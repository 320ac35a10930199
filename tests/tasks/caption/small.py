"""A small captioner, a batch for it, and what tests read of both."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key
from vitrail.data.text import Tokenizer
from vitrail.tasks.caption import Caption, Captioning, Captions, Decoding, numbered
from vitrail.tasks.caption.decoders import WordDecoder
from vitrail.tasks.caption.matching import BagOfWords, Match
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.values import Batch
from vitrail.vit import ViTConfig

TEXTS = [["a red dog runs", "the dog"], ["two cats sit on a wall"], ["a man", "a man rides", "he rides a red bicycle"]]
WORDS = Tokenizer.train([text for texts in TEXTS for text in texts], "words", 40)
SMALL: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "decoder_dropout": 0.0}
VIT = ViTConfig(width=24, depth=1, heads=2, patch=4, image_size=(8, 8))


def captioner(seed: int = 0, encoder: Any = VIT, **changes: Any) -> Caption:
    torch.manual_seed(seed)
    config = Captioning(**{**SMALL, "most_words": 12, "decoding": Decoding(max_length=10), **changes})
    return Caption(encoder_for(encoder), config, WORDS, Preprocess(size=(8, 8), resize="squash"))


def batch(texts: list[list[str]] = TEXTS, seed: int = 0, epoch: int = 0) -> Batch:
    images = torch.randn(len(texts), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels, samples = numbered(texts, WORDS, 12), torch.arange(len(texts))
    return {"image": images, "label": labels, "sample": samples, "epoch": epoch, "key": draw_key(seed, epoch)}


def match_of(task: Caption) -> Match:
    assert task.match is not None
    return task.match


def bag_of(task: Caption) -> BagOfWords:
    assert task.bag is not None
    return task.bag


def bias(task: Caption) -> torch.Tensor:
    assert isinstance(task.decoder, WordDecoder)
    return task.decoder.bias


def captions(task: Caption, made: Batch) -> list[Captions]:
    """What the task answers."""
    answers = task.answer(made)
    return [answer for answer in answers if isinstance(answer, Captions)]


def said(task: Caption, *images: Any, **named: Any) -> list[Captions]:
    """What the task predicts."""
    return [answer for answer in task.predict(*images, **named) if isinstance(answer, Captions)]


def text_vector(task: Caption, ids: list[int]) -> torch.Tensor:
    """Of a caption that has been read up to its last word."""
    return match_of(task).text(task.decoder(torch.tensor([ids]))[0, -1])


def some_images(count: int = 5) -> list[Image.Image]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (40, 9), (9, 40), (31, 17), (8, 12)]
    return [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), generator=draw, dtype=torch.uint8).numpy())
        for w, h in sizes[:count]
    ]
