"""Writing captions: greedy, beam and sampled, over any decoder, several captions of many images at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrail.data.random import uniform
from vitrail.data.text import END, PAD, START, UNKNOWN
from vitrail.errors import UserError
from vitrail.tasks.decoders import Decoder, DecoderState, Memory

MOST = 10_000
"""captions at a time, or pieces of one, far above any use: more would only ask for memory that no machine has"""


@dataclass(frozen=True)
class Decoding:
    """How captions are written. It travels with a checkpoint: its score was taken so."""

    beam: int = 3
    """captions kept at each word; 1 is greedy"""
    length_penalty: float = 0.7
    """a caption's log-probability is divided by its length to this power, or short ones would always win"""
    sample: bool = False
    """draw words by their probabilities in place of a search; `beam` is then how many captions are drawn"""
    temperature: float = 1.0
    top_k: int = 0
    """draw among this many likeliest words; 0 for all"""
    top_p: float = 1.0
    """draw among the likeliest words that hold this share of the probability (1904.09751)"""
    sampling_seed: int = 0
    no_repeat_ngram_size: int = 3
    """no row of this many pieces comes twice in a caption; 0 allows it. A rare word is several pieces"""
    max_length: int = 40
    """pieces of a caption at most, its end included"""
    match: float = 0.0
    """how much a finished caption's match with its image counts, in a captioner that has learned to match them: the
    logit of its contrastive loss times this is added to the score, and the best of the `beam` captions comes first"""
    consensus: float = 0.0
    """the same for its CIDEr with the captions of like training images, in a captioner that remembers these"""
    neighbours: int = 100
    """how many images that are"""

    def __post_init__(self) -> None:
        if (
            self.beam < 1
            or self.max_length < 1
            or self.top_k < 0
            or self.no_repeat_ngram_size < 0
            or self.length_penalty < 0
        ):
            raise UserError(
                "beam and max_length must be at least 1, top_k, no_repeat_ngram_size and length_penalty at least 0"
            )
        if max(self.beam, self.max_length) > MOST:
            raise UserError(f"beam and max_length must be at most {MOST:,}")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p must be above 0 and at most 1")
        if not self.length_penalty <= 10 or not 0.01 <= self.temperature <= 100:
            raise UserError("length_penalty must be at most 10, and temperature from 0.01 to 100")
        if not (0 <= self.match <= 100 and 0 <= self.consensus <= 100):
            raise UserError(f"match and consensus must be from 0 to 100, got {self.match} and {self.consensus}")
        if self.neighbours < 1:
            raise UserError(f"neighbours must be at least 1, got {self.neighbours}")


@dataclass
class Written:
    """Captions of B images, K each, best first."""

    words: Tensor
    """int64 [B, K, T]: `END` closes a caption and `PAD` fills up"""
    logp: Tensor
    """[B, K, T] log-probability of each word; 0 after the end"""
    score: Tensor
    """[B, K] sum of `logp` over the length to the power `length_penalty`, and what `match` and `consensus` add"""

    def ranked(self) -> Written:
        """The same captions, the best first again."""
        score, order = self.score.sort(dim=1, descending=True, stable=True)
        places = order[:, :, None].expand_as(self.words)
        return Written(self.words.gather(1, places), self.logp.gather(1, places), score)


class _Writer:
    """Logits of the next word, with a cache or, to compare with, by reading all words anew each time."""

    def __init__(
        self, decoder: Decoder, memory: Memory, captions: int, cache: bool, spaced: Tensor | None = None
    ) -> None:
        self.decoder, self.memory, self.captions, self.spaced = decoder, memory, captions, spaced
        self.state: DecoderState | None = decoder.start(memory, captions) if cache else None

    def next(self, words: Tensor, no_repeat_ngram_size: int) -> Tensor:
        """[R, T] words so far, `START` first, to logits [R, V] of the next; a word that may not come has -inf."""
        if self.state is not None:
            known, self.state = self.decoder.step(words[:, -1], self.state)
        else:
            rows = words.view(len(self.memory.tokens), -1, words.shape[1])
            known = self.decoder(rows, self.memory)[:, :, -1].flatten(0, 1)
        logits = self.decoder.logits(known).float()
        for special in (PAD, START, UNKNOWN):
            logits[:, special] = -torch.inf
        if no_repeat_ngram_size:
            said = words[:, 1:].clone()
            if self.spaced is not None:
                said[:, :1] = self.spaced[said[:, :1]]  # the first word is the same as the same word later
            forbid_repeats(logits, said, no_repeat_ngram_size)
        return logits

    def keep(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.chosen(rows)


def forbid_repeats(logits: Tensor, words: Tensor, size: int) -> None:
    """Rule out, in place, each word that would close a row of `size` words that a caption [R, T] has already.

    The end of a caption is always allowed, so that there is a next word whatever came before.
    """
    if words.shape[1] < size:
        return
    rows = words.unfold(1, size, 1)  # [R, T - size + 1, size]
    ending = words[:, words.shape[1] - size + 1 :]
    same = (rows[..., :-1] == ending[:, None]).all(dim=-1) & (rows[..., -1] != END)
    places, windows = same.nonzero(as_tuple=True)
    logits[places, rows[places, windows, -1]] = -torch.inf


def write(
    decoder: Decoder,
    memory: Memory,
    how: Decoding,
    samples: Tensor,
    cache: bool = True,
    spaced: Tensor | None = None,
) -> Written:
    """Captions for the images of `memory`, whose sample numbers [B] their draws depend on.

    Where the decoder knows fewer words than `how.longest`, captions are no longer than that. `spaced` [V] is what
    `Tokenizer.spaced` gives.
    """
    how = replace(how, max_length=min(how.max_length, decoder.max_length or how.max_length))
    writer = _Writer(decoder, memory, how.beam, cache, spaced)
    return _sample(writer, how, samples) if how.sample else _beam(writer, how)


def _sample(writer: _Writer, how: Decoding, samples: Tensor) -> Written:
    memory, captions = writer.memory, how.beam
    images = len(memory.tokens)
    words = torch.full((images * captions, 1), START, device=memory.tokens.device)
    logps, ended = [], torch.zeros(len(words), dtype=torch.bool, device=words.device)
    for place in range(how.max_length):
        logp = writer.next(words, how.no_repeat_ngram_size).log_softmax(dim=-1)
        allowed = among(logp / how.temperature, how.top_k, how.top_p)
        draws = uniform(how.sampling_seed, place, samples, captions, stream=_STREAM).flatten()
        below = allowed.softmax(dim=-1).cumsum(dim=-1)
        # Rounding can leave the last sum a little under a draw, so the draw is scaled to it.
        chosen = torch.searchsorted(below, (draws[:, None] * below[:, -1:]), right=True)
        chosen = chosen.clamp(max=below.shape[1] - 1).masked_fill(ended[:, None], PAD)
        logps.append(logp.gather(1, chosen).masked_fill(ended[:, None], 0.0))
        words, ended = torch.cat([words, chosen], dim=1), ended | (chosen[:, 0] == END)
        if ended.all():
            break
    shape = (images, captions, -1)
    return _sorted(words[:, 1:].view(shape), torch.cat(logps, dim=1).view(shape), how)


_STREAM = 71


def among(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [R, V] with all words but the likeliest ruled out."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, places = logits.sort(dim=1, descending=True)
        before = ordered.softmax(dim=1).cumsum(dim=1) - ordered.softmax(dim=1)
        out = torch.zeros_like(before, dtype=torch.bool).scatter(1, places, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def _sorted(words: Tensor, logp: Tensor, how: Decoding) -> Written:
    lengths = (words != PAD).sum(dim=2).clamp(min=1)
    score = logp.sum(dim=2) / lengths**how.length_penalty
    order = score.argsort(dim=1, descending=True, stable=True)
    places = order[:, :, None].expand_as(words)
    return Written(words.gather(1, places), logp.gather(1, places), score.gather(1, order))


def _beam(writer: _Writer, how: Decoding) -> Written:
    """Of each image, `beam` unfinished captions go on, and the best `beam` finished ones are kept.

    An image is done when that many have ended and no unfinished one scores better as it stands. A single caption goes
    on with its likeliest word until that is the end.
    """
    tokens, beam = writer.memory.tokens, how.beam
    images, device = len(tokens), tokens.device
    words = torch.full((images, beam, 1), START, device=device)
    logp = torch.zeros(images, beam, 0, device=device)
    sums = torch.full((images, beam), -torch.inf, device=device)
    sums[:, 0] = 0.0  # all captions begin alike: only the first one counts
    done = Written(
        torch.full((images, beam, how.max_length), PAD, device=device),
        torch.zeros(images, beam, how.max_length, device=device),
        torch.full((images, beam), -torch.inf, device=device),
    )
    closed = torch.zeros(images, 1, dtype=torch.bool, device=device)
    base = torch.arange(images, device=device)[:, None]
    for place in range(1, how.max_length + 1):
        logits = writer.next(words.flatten(0, 1), how.no_repeat_ngram_size)
        # Twice as many as go on: at most `beam` of them end here.
        most = 2 * beam if beam > 1 else 1
        likely, number = logits.topk(min(most, logits.shape[1]), dim=1)
        if place == how.max_length:  # what has not ended by now ends here
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
        writer.keep((base * beam + parent.gather(1, kept)).flatten())
    length = int((done.words != PAD).sum(dim=2).max())
    return Written(done.words[..., :length], done.logp[..., :length], done.score)


def _merged(done: Written, words: Tensor, logp: Tensor, sums: Tensor, length: int, how: Decoding) -> Written:
    """The best of the finished captions and of those that end now."""
    if sums.isneginf().all():
        return done
    pad = how.max_length - length
    words = torch.cat([done.words, torch.nn.functional.pad(words, (0, pad), value=PAD)], dim=1)
    logp = torch.cat([done.logp, torch.nn.functional.pad(logp, (0, pad))], dim=1)
    score = torch.cat([done.score, sums / length**how.length_penalty], dim=1)
    score, order = score.topk(how.beam, dim=1)
    places = order[:, :, None].expand(-1, -1, how.max_length)
    return Written(words.gather(1, places), logp.gather(1, places), score)
