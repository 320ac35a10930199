"""Caption generation by greedy search, beam search or sampling, with any decoder, for batches of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.random import seed_for, uniform
from vitrail.data.text import END, PAD, START, UNKNOWN
from vitrail.tasks.caption.settings import Decoding

SAMPLED = 71
"""random stream for sampling words (see `uniform`)"""

Stepper = Callable[[Tensor, Tensor | None, Any], tuple[Tensor, Tensor | None, Any]]
"""maps the next words [R], the rows of the state that they continue [R] (None: each its own) and the state to a
`decoders.Step`"""


@dataclass
class Generated:
    """Captions of B images, K each, best first."""

    words: Tensor
    """int64 [B, K, T]: `END` ends a caption, `PAD` is padding"""
    logp: Tensor
    """[B, K, T] log-probability of each word; 0 after the end"""
    score: Tensor
    """[B, K] sum of `logp` over the length to the power `length_penalty`, plus the terms of `match` and `consensus`"""
    match: Tensor | None = None
    """[B, K] how well each caption matches its image: the logit of the contrastive loss, in captioners that have one"""
    likeness: Tensor | None = None
    """[B] how similar each image is to training images, in captioners with an index of them (`Consensus.likeness`)"""

    def ranked(self, score: Tensor, match: Tensor, likeness: Tensor | None) -> Generated:
        """The same captions with what a `Reranker` says of them, best first."""
        score, order = score.sort(dim=1, descending=True, stable=True)
        places = order[:, :, None].expand_as(self.words)
        words, logp = self.words.gather(1, places), self.logp.gather(1, places)
        return Generated(words, logp, score, match.gather(1, order), likeness)

    @staticmethod
    def joined(chunks: Sequence[Generated]) -> Generated:
        """Concatenate the captions of several groups of images."""
        length = max(chunk.words.shape[2] for chunk in chunks)
        words = [F.pad(chunk.words, (0, length - chunk.words.shape[2]), value=PAD) for chunk in chunks]
        logp = [F.pad(chunk.logp, (0, length - chunk.logp.shape[2])) for chunk in chunks]
        match = [chunk.match for chunk in chunks if chunk.match is not None]
        likeness = [chunk.likeness for chunk in chunks if chunk.likeness is not None]
        return Generated(
            torch.cat(words),
            torch.cat(logp),
            torch.cat([chunk.score for chunk in chunks]),
            torch.cat(match) if match else None,
            torch.cat(likeness) if likeness else None,
        )


class _Search:
    """Logits of the next words, with forbidden words at -inf."""

    def __init__(self, step: Stepper, state: Any, samples: Tensor, how: Decoding, spaced: Tensor | None) -> None:
        self.step, self.state, self.spaced, self.size = step, state, spaced, how.no_repeat_ngram_size
        # All captions of an image start from its one row.
        self.rows: Tensor | None = torch.arange(len(samples), device=samples.device).repeat_interleave(how.beam)

    def next(self, words: Tensor) -> Tensor:
        """[R, T] words so far, `START` first, to logits [R, V] of the next; forbidden words have -inf."""
        logits, _, self.state = self.step(words[:, -1], self.rows, self.state)
        logits, self.rows = logits.float(), None
        for special in (PAD, START, UNKNOWN):
            logits[:, special] = -torch.inf
        if self.size:
            previous = words[:, 1:].clone()
            if self.spaced is not None:
                previous[:, :1] = self.spaced[previous[:, :1]]  # the first word also matches the same word later
            forbid_repeats(logits, previous, self.size)
        return logits

    def keep(self, rows: Tensor) -> None:
        """Make the next words continue these rows."""
        self.rows = rows


def forbid_repeats(logits: Tensor, words: Tensor, size: int) -> None:
    """Forbid, in place, each word that would repeat an n-gram of `size` words of its caption [R, T].

    The end token is always allowed, so that there is always a next word.
    """
    if words.shape[1] < size:
        return
    rows = words.unfold(1, size, 1)  # [R, T - size + 1, size]
    ending = words[:, words.shape[1] - size + 1 :]
    same = (rows[..., :-1] == ending[:, None]).all(dim=-1) & (rows[..., -1] != END)
    places, windows = same.nonzero(as_tuple=True)
    logits[places, rows[places, windows, -1]] = -torch.inf


def generate(step: Stepper, state: Any, how: Decoding, samples: Tensor, spaced: Tensor | None = None) -> Generated:
    """Captions of the images; `state` has one row per image before the first word.

    Random draws depend on the images' sample numbers [B]. `spaced` [V] is what `Tokenizer.spaced` gives.
    """
    search = _Search(step, state, samples, how, spaced)
    return _sample(search, how, samples) if how.sample else _beam(search, how, samples)


def _sample(search: _Search, how: Decoding, samples: Tensor) -> Generated:
    images, captions = len(samples), how.beam
    words = torch.full((images * captions, 1), START, device=samples.device)
    logps, ended = [], torch.zeros(len(words), dtype=torch.bool, device=words.device)
    for place in range(how.max_length):
        logp = search.next(words).log_softmax(dim=-1)
        allowed = among(logp / how.temperature, how.top_k, how.top_p)
        draws = uniform(seed_for(how.sampling_seed, place, SAMPLED), samples, captions).flatten()
        below = allowed.softmax(dim=-1).cumsum(dim=-1)
        # By rounding the last sum can be slightly below 1, so the draw is scaled to it.
        chosen = torch.searchsorted(below, (draws[:, None] * below[:, -1:]), right=True)
        chosen = chosen.clamp(max=below.shape[1] - 1).masked_fill(ended[:, None], PAD)
        logps.append(logp.gather(1, chosen).masked_fill(ended[:, None], 0.0))
        words, ended = torch.cat([words, chosen], dim=1), ended | (chosen[:, 0] == END)
        if ended.all():
            break
    shape = (images, captions, -1)
    return _sorted(words[:, 1:].view(shape), torch.cat(logps, dim=1).view(shape), how)


def among(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [R, V] with all but the most likely words at -inf."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, places = logits.sort(dim=1, descending=True)
        before = ordered.softmax(dim=1).cumsum(dim=1) - ordered.softmax(dim=1)
        out = torch.zeros_like(before, dtype=torch.bool).scatter(1, places, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def _sorted(words: Tensor, logp: Tensor, how: Decoding) -> Generated:
    lengths = (words != PAD).sum(dim=2).clamp(min=1)
    score = logp.sum(dim=2) / lengths**how.length_penalty
    order = score.argsort(dim=1, descending=True, stable=True)
    places = order[:, :, None].expand_as(words)
    return Generated(words.gather(1, places), logp.gather(1, places), score.gather(1, order))


def _beam(search: _Search, how: Decoding, samples: Tensor) -> Generated:
    """The `beam` best unfinished captions of each image are continued, and the `beam` best finished ones kept.

    An image is done when `beam` captions have ended and no unfinished one has a better score. A single caption is
    continued with its most likely word until the end token.
    """
    images, beam, device = len(samples), how.beam, samples.device
    words = torch.full((images, beam, 1), START, device=device)
    logp = torch.zeros(images, beam, 0, device=device)
    sums = torch.full((images, beam), -torch.inf, device=device)
    sums[:, 0] = 0.0  # all captions start equal: only the first one counts
    done = Generated(
        torch.full((images, beam, how.max_length), PAD, device=device),
        torch.zeros(images, beam, how.max_length, device=device),
        torch.full((images, beam), -torch.inf, device=device),
    )
    closed = torch.zeros(images, 1, dtype=torch.bool, device=device)
    base = torch.arange(images, device=device)[:, None]
    for place in range(1, how.max_length + 1):
        logits = search.next(words.flatten(0, 1))
        # Twice as many as are kept: at most `beam` of them end here.
        most = 2 * beam if beam > 1 else 1
        likely, number = logits.topk(min(most, logits.shape[1]), dim=1)
        if place == how.max_length:  # unfinished captions end here
            likely, number = logits[:, END, None], torch.full_like(number[:, :1], END)
        new = (likely - logits.logsumexp(dim=1, keepdim=True)).view(images, -1)
        totals = (sums[:, :, None] + new.view(images, beam, -1)).flatten(1)
        best, at = totals.topk(min(most, totals.shape[1]), dim=1)
        parent, word = at // likely.shape[1], number.view(images, -1).gather(1, at)
        ends = word == END
        words_now = torch.cat([words[base, parent], word[:, :, None]], dim=2)
        logp_now = torch.cat([logp[base, parent], new.gather(1, at)[:, :, None]], dim=2)
        ending = best.masked_fill(~ends | closed, -torch.inf)
        done = _merged(done, words_now[..., 1:], logp_now, ending, place, how)
        sums, kept = best.masked_fill(ends, -torch.inf).topk(beam, dim=1)
        closed |= sums[:, :1] / place**how.length_penalty < done.score[:, -1:]
        if closed.all():
            break
        words, logp = words_now[base, kept], logp_now[base, kept]
        search.keep((base * beam + parent.gather(1, kept)).flatten())
    length = int((done.words != PAD).sum(dim=2).max())
    return Generated(done.words[..., :length], done.logp[..., :length], done.score)


def _merged(done: Generated, words: Tensor, logp: Tensor, sums: Tensor, length: int, how: Decoding) -> Generated:
    """The best of the finished captions and those that end now."""
    if sums.isneginf().all():
        return done
    pad = how.max_length - length
    words = torch.cat([done.words, F.pad(words, (0, pad), value=PAD)], dim=1)
    logp = torch.cat([done.logp, F.pad(logp, (0, pad))], dim=1)
    score = torch.cat([done.score, sums / length**how.length_penalty], dim=1)
    score, order = score.topk(how.beam, dim=1)
    places = order[:, :, None].expand(-1, -1, how.max_length)
    return Generated(words.gather(1, places), logp.gather(1, places), score)
