"""Predictions of a captioner: captions with the probability of each piece and the attention over the image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.text import END, PAD, START, Tokenizer
from vitrail.errors import UserError
from vitrail.ops import Grid
from vitrail.tasks.answers import finite
from vitrail.tasks.caption.search import Generated, Stepper
from vitrail.tasks.values import Piece, Prediction


@dataclass(frozen=True)
class Thresholds:
    """What an answer needs to be `sure`: `bench/match.py` measures them."""

    match: float
    """of the caption with the image"""
    likeness: float = -1.0
    """of the image with training images, where the captioner has an index of them"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or math.isnan(value):
                raise UserError(f"the threshold {name} must be a number, got {value!r}")

    def passed(self, match: float, likeness: float | None) -> bool:
        return match >= self.match and (likeness is None or likeness >= self.likeness)


@dataclass(frozen=True)
class Captions(Prediction):
    """The best captions of an image."""

    caption: str
    """the best caption"""
    captions: list[dict[str, Any]]
    """`{"caption": text, "score": s, "tokens": [{"text": piece, "p": probability}]}`, best first"""
    match: float | None = None
    """how well the best caption matches the image, in captioners with a contrastive loss: its logit"""
    sure: bool | None = None
    """whether caption and image are above the captioner's thresholds, if it has some"""

    def row(self) -> dict[str, Any]:
        confidence = {name: value for name in ("match", "sure") if (value := getattr(self, name)) is not None}
        return {"caption": self.caption, **confidence, "captions": self.captions}

    def records(self) -> list[dict[str, Any]]:
        """As `row`, without the tokens."""
        captions = [{name: each[name] for name in ("caption", "score")} for each in self.captions]
        return [{**self.row(), "captions": captions}]

    def text(self) -> str:
        return f"not sure: {self.caption}" if self.sure is False else self.caption


def answers_of(written: Generated, tokenizer: Tokenizer, sure_from: Thresholds | None = None) -> list[Prediction]:
    """The captions of each image; with thresholds, each `sure` or not."""
    probabilities = written.logp.exp().tolist()
    scores = written.score.tolist()
    none = [None] * len(scores)
    matches = none if written.match is None else finite(written.match[:, 0]).tolist()
    likenesses = none if written.likeness is None else written.likeness.tolist()
    answers: list[Prediction] = []
    each = zip(written.words.tolist(), probabilities, scores, matches, likenesses, strict=True)
    for numbers, ps, ss, match, likeness in each:
        rows = [_row(*row, tokenizer) for row in zip(numbers, ps, ss, strict=True) if row[2] > -math.inf]
        if not rows:
            raise UserError("this captioner's word probabilities are nan: choose other weights")
        sure = None if match is None or sure_from is None else sure_from.passed(match, likeness)
        answers.append(Captions(rows[0]["caption"], rows, match, sure))
    return answers


class Drafts:
    """A step of a search that first tells the best caption so far of the first image: the first of its rows."""

    def __init__(self, step: Stepper, tokenizer: Tokenizer, tell: Callable[[str], None]) -> None:
        self.step, self.tokenizer, self.tell = step, tokenizer, tell
        self.words: Tensor | None = None
        """[R, T] the words so far of each row"""

    def __call__(self, words: Tensor, rows: Tensor | None, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        if self.words is None:  # before the first word
            self.words = words.new_empty(len(words), 0)
        else:
            before = self.words if rows is None else self.words[rows]
            self.words = torch.cat([before, words[:, None]], dim=1)
            self.tell(_row(self.words[0].tolist(), [], 0.0, self.tokenizer)["caption"])
        return self.step(words, rows, state)


def _row(words: list[int], ps: list[float], score: float, tokenizer: Tokenizer) -> dict[str, Any]:
    words = words[: words.index(END)] if END in words else [word for word in words if word != PAD]
    pieces = tokenizer.tokens(words)
    return {
        "caption": "".join(pieces).strip(),
        "score": score,
        "tokens": [{"text": piece, "p": p} for piece, p in zip(pieces, ps, strict=False)],
    }


def pieces_of(written: Generated, step: Stepper, state: Any, grid: Grid, tokenizer: Tokenizer) -> list[list[Piece]]:
    """The pieces of each image's best caption, with the end as `<end>`.

    Each has the attention over the patches [h, w] at the step that chose it; None for a decoder without attention.
    `state` is the state before the first word.
    """
    words, heats = written.words[:, 0], []
    for read in F.pad(words[:, :-1], (1, 0), value=START).unbind(1):
        _, attention, state = step(read, None, state)
        # The prefix tokens come first, and receive the rest of the attention.
        patches = None if attention is None else attention[:, -math.prod(grid) :].float().cpu().unflatten(1, grid)
        heats.append(patches)
    found = []
    for i, (row, ps) in enumerate(zip(words.tolist(), written.logp[:, 0].exp().tolist(), strict=True)):
        texts = [*tokenizer.tokens([word for word in row if word not in (PAD, END)]), "<end>"]
        places = [None if heat is None else heat[i] for heat in heats[: sum(word != PAD for word in row)]]
        found.append([Piece(*piece) for piece in zip(texts, ps, places, strict=False)])
    return found
