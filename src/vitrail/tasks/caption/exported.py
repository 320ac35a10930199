"""The programs of a captioner: `encoder`, `step`, which reads and returns the cache of the words so far, and `match`.

The search over words, and the index of captions that reranks them, are no networks: they run in vitrail beside the
programs, so the options of decoding stay free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.text import END, PAD, START
from vitrail.errors import UserError
from vitrail.tasks.caption.components import NextWords, ReadImages, reranked
from vitrail.tasks.caption.decoders import Decoder, State, Step, WordDecoder
from vitrail.tasks.caption.matching import Match, text_states
from vitrail.tasks.exported import AFTER, Engine, Program
from vitrail.tasks.values import Batch

if TYPE_CHECKING:
    from vitrail.tasks.caption.task import Caption

ROWS = 2
"""captions per image in the example inputs; also the words before"""
SHORTEST = 3
"""words of a caption in the program `match`, which is traced without the cases of one word and none"""
COMPARED = 40
"""words of a caption up to which an export is compared"""
MAX_WORDS = 1024
"""of a decoder without a limit of its own"""


class EncoderProgram(nn.Module):
    """Images to pooled vectors [B, D], then the tensors of the first state: `State.words`, `State.image`."""

    def __init__(self, read: ReadImages) -> None:
        super().__init__()
        self.read = read

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pooled, state = self.read(images)
        return (pooled, *state.words, *state.image)


class StepProgram(nn.Module):
    """Next words [B, K] of K captions per image, the rows [B, K] of the state that they continue, and the state.

    To logits [B * K, V], attention [B * K, M] if the decoder has one, and the next state's `words`. The image's tensors
    stay the same.
    """

    def __init__(self, step: NextWords, words: int) -> None:
        """`words` is the number of tensors in `State.words`."""
        super().__init__()
        self.step, self.count = step, words

    def forward(self, words: Tensor, rows: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        before = State(list(state[: self.count]), list(state[self.count :]))
        logits, attention, after = self.step(words.flatten(), rows.flatten(), before)
        return (logits, *(() if attention is None else (attention,)), *after.words)


class MatchProgram(nn.Module):
    """Pooled vectors [B, D] and captions [B, K, T] to the logits of matching [B, K] and the images' vectors [B, D']."""

    def __init__(self, match: Match, decoder: Decoder) -> None:
        super().__init__()
        self.match, self.decoder = match, decoder

    def forward(self, pooled: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        texts = text_states(self.decoder, captions.flatten(0, 1)).unflatten(0, captions.shape[:2])
        return self.match(pooled[:, None], texts)[:, 0], self.match(pooled)


def programs(task: Caption, batch: Batch) -> dict[str, Program]:
    """The programs of a captioner with a decoder of vitrail's own, with inputs after the first words of a batch."""
    if not isinstance(task.decoder, WordDecoder):
        raise UserError(
            "a captioner with a language model of transformers cannot be exported, since that keeps its own cache of "
            "words: export a captioner with a decoder of vitrail's own"
        )
    images = batch["image"]
    modules: dict[str, Any] = task.components()
    count = len(images)
    pooled, first = modules["encoder"](images)
    state, rows = first, torch.arange(count).repeat_interleave(ROWS)
    words = torch.full((count * ROWS,), START)
    for _ in range(ROWS):
        logits, attention, state = modules["step"](words, rows, state)
        words, rows = logits.argmax(dim=1), torch.arange(count * ROWS)
    grows = state.words[0].shape != first.words[0].shape and state.words[0].ndim == 4
    inner: dict[int, str] = {0: "length", 1: "rows"} if grows else {0: "rows"}
    before = {f"words.{i}": tensor for i, tensor in enumerate(state.words)}
    image = {f"image.{i}": tensor for i, tensor in enumerate(state.image)}
    limit = task.decoder.max_length or MAX_WORDS
    shape = (count, ROWS)
    found = {
        "encoder": Program(
            EncoderProgram(modules["encoder"]),
            {"images": images},
            ["pooled", *before, *image],
            {"images": {0: "batch", 2: "height", 3: "width"}},
        ),
        "step": Program(
            StepProgram(modules["step"], len(before)),
            {"next": words.view(shape), "rows": rows.view(shape), **before, **image},
            ["logits", *(["attention"] if attention is not None else []), *(f"{name}{AFTER}" for name in before)],
            {
                "next": {0: "batch", 1: "captions"},
                "rows": {0: "batch", 1: "captions"},
                **dict.fromkeys(before, inner),
                **{name: _free_of_image(tensor) for name, tensor in image.items()},
            },
            {"length": (0, limit - 1)},
            steps=max(1, min(limit, COMPARED) - ROWS),
        ),
    }
    if task.match is not None:
        captions = torch.cat([words.view(*shape, 1)] * SHORTEST + [torch.full((*shape, 1), END)], dim=2)
        found["match"] = Program(
            MatchProgram(task.match, task.decoder),
            {"pooled": pooled, "captions": captions},
            ["logits", "vectors"],
            {"pooled": {0: "batch"}, "captions": {0: "batch", 1: "captions", 2: "length"}},
            {"length": (SHORTEST, limit)},
        )
    return found


def _free_of_image(tensor: Tensor) -> dict[int, str]:
    """An image's keys and values are [B, heads, M, d], or [B, M, D]."""
    return {0: "batch", tensor.ndim - 2: "tokens"}


def run_programs(
    task: Caption, engines: Mapping[str, Engine], outputs: Mapping[str, Sequence[str]]
) -> dict[str, Callable[..., Any]]:
    """Components that call engines. With the engine `match` there is `rerank`, as in `Reranker`."""
    words = sum(name.startswith("words.") for name in outputs["encoder"])
    attends = "attention" in outputs["step"]

    def encoder(images: Tensor) -> tuple[Tensor, State]:
        pooled, *state = engines["encoder"](images)
        return pooled, State(state[:words], state[words:])

    def step(next_words: Tensor, rows: Tensor | None, state: State) -> Step:
        if rows is None:
            rows = torch.arange(len(next_words), device=next_words.device)
        images = len(state.image[0]) if state.image else 1
        shape = (images, -1)
        logits, *rest = engines["step"](next_words.view(shape), rows.view(shape), *state.words, *state.image)
        attention = rest.pop(0) if attends else None
        return Step(logits, attention, State(rest, state.image))

    def rerank(pooled: Tensor, captions: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # Padding changes nothing.
        padded = F.pad(captions, (0, max(0, SHORTEST - captions.shape[2])), value=PAD)
        logits, vectors = engines["match"](pooled, padded)
        return reranked(scores, captions, logits, vectors, task.consensus, task.option)

    return {"encoder": encoder, "step": step, **({"rerank": rerank} if "match" in engines else {})}
