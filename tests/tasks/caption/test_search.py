"""Searches against brute force, with the cache against without, batches against one by one, draws against the odds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.data.text import END, PAD, START, UNKNOWN
from vitrail.errors import UserError
from vitrail.tasks.caption import Decoding
from vitrail.tasks.caption.components import NextWords
from vitrail.tasks.caption.decoders import (
    AttentiveDecoder,
    Decoder,
    Memory,
    RecurrentDecoder,
    Step,
    TransformerDecoder,
    WordDecoder,
)
from vitrail.tasks.caption.search import Generated, Stepper, among, forbid_repeats, generate

WIDTH = 16


def made(kind: str = "transformer", vocabulary: int = 9, seed: int = 0) -> WordDecoder:
    torch.manual_seed(seed)
    builders: dict[str, Callable[[], WordDecoder]] = {
        "rnn": lambda: RecurrentDecoder("rnn", vocabulary, WIDTH, 1, WIDTH, 0.1),
        "lstm": lambda: RecurrentDecoder("lstm", vocabulary, WIDTH, 2, WIDTH, 0.1),
        "attentive": lambda: AttentiveDecoder("lstm", vocabulary, WIDTH, WIDTH, 0.1),
        "transformer": lambda: TransformerDecoder(vocabulary, WIDTH, 2, 2, WIDTH, 0.1, 30),
        "half": lambda: TransformerDecoder(vocabulary, WIDTH, 2, 2, WIDTH, 0.1, 30, 1),
    }
    decoder = builders[kind]().eval()
    with torch.no_grad():  # a fresh decoder says nearly the same whatever it read and saw
        for parameter in decoder.parameters():
            parameter.mul_(2.0)
    return decoder


def seen(images: int, seed: int = 0) -> Memory:
    draw = torch.Generator().manual_seed(seed)
    return Memory(torch.randn(images, 4, WIDTH, generator=draw), torch.randn(images, WIDTH, generator=draw))


@torch.no_grad()
def written(decoder: Decoder, memory: Memory, how: Decoding, cache: bool = True, first: int = 0) -> Generated:
    samples = torch.arange(first, first + len(memory.tokens))
    if cache:
        return generate(NextWords(decoder), decoder(memory=memory), how, samples)
    return generate(*anew(decoder, memory), how, samples)


def anew(decoder: Decoder, memory: Memory) -> tuple[Stepper, Tensor]:
    """What `generate` takes, by reading all words so far at each step: the state are these words, [R, T]."""

    def step(words: Tensor, rows: Tensor | None, state: Tensor) -> Step:
        state = torch.cat([state if rows is None else state[rows], words[:, None]], dim=1)
        logits = decoder(state.view(len(memory.tokens), -1, state.shape[1]), memory)
        return Step(logits[:, :, -1].flatten(0, 1), None, state)

    return step, torch.zeros(len(memory.tokens), 0, dtype=torch.int64)


def one(memory: Memory, i: int) -> Memory:
    return Memory(memory.tokens[i : i + 1], memory.pooled[i : i + 1])


def captions(found: Generated) -> list[list[tuple[int, ...]]]:
    """Without what fills up."""
    return [[tuple(w for w in row if w != PAD) for row in rows] for rows in found.words.tolist()]


@torch.no_grad()
def logp_of(decoder: Decoder, memory: Memory, words: list[int]) -> list[float]:
    """By reading the whole caption at once."""
    logits = decoder(torch.tensor([[[START, *words[:-1]]]]), memory)[0, 0]
    logits[:, [PAD, START, UNKNOWN]] = -torch.inf
    return logits.log_softmax(dim=-1)[torch.arange(len(words)), torch.tensor(words)].tolist()


KINDS = ["rnn", "lstm", "attentive", "transformer", "half"]
WAYS = [
    Decoding(beam=1, no_repeat_ngram_size=0, max_length=12),
    Decoding(beam=4, no_repeat_ngram_size=2, max_length=12),
    Decoding(beam=3, sample=True, no_repeat_ngram_size=3, max_length=12, top_p=0.9, temperature=0.7),
]


@pytest.mark.parametrize("how", WAYS, ids=["greedy", "beam", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_cache_as_without(kind: str, how: Decoding) -> None:
    decoder, memory = made(kind, 40), seen(5)
    fast, slow = written(decoder, memory, how), written(decoder, memory, how, cache=False)
    assert torch.equal(fast.words, slow.words)
    torch.testing.assert_close(fast.logp, slow.logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.score, slow.score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", WAYS, ids=["greedy", "beam", "sampled"])
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_a_batch_as_one_by_one(kind: str, how: Decoding) -> None:
    decoder, memory = made(kind), seen(7)
    together = written(decoder, memory, how)
    for i in range(7):
        alone = written(decoder, one(memory, i), how, first=i)
        assert captions(alone)[0] == captions(together)[i]
        torch.testing.assert_close(alone.score[0], together.score[i], atol=1e-5, rtol=1e-5)
    assert len({row[0] for row in captions(together)}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_caption_is_greedy(kind: str) -> None:
    """The likeliest word each time, until that is the end."""
    decoder, memory = made(kind), seen(6)
    found = written(decoder, memory, Decoding(beam=1, no_repeat_ngram_size=0, max_length=10))
    lengths = set()
    for i, (row,) in enumerate(captions(found)):
        words: list[int] = []
        while END not in words and len(words) < 9:
            with torch.no_grad():
                logits = decoder(torch.tensor([[[START, *words]]]), one(memory, i))[0, 0, -1]
            logits[[PAD, START, UNKNOWN]] = -torch.inf
            words.append(int(logits.argmax()))
        words += [END] * (END not in words)
        assert row == tuple(words)
        lengths.add(len(words))
    assert len(lengths) > 1, "the case needs captions of several lengths"


@pytest.mark.parametrize("power", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_a_beam_of_all_is_brute_force(kind: str, power: float) -> None:
    """Three words and the end: 120 captions of at most 5, of which the search must find the best and their order."""
    decoder, memory, max_length = made(kind, 7), seen(3, seed=3), 5
    every = [(*row, END) for n in range(max_length) for row in itertools.product((4, 5, 6), repeat=n)]
    found = written(
        decoder, memory, Decoding(beam=len(every), length_penalty=power, no_repeat_ngram_size=0, max_length=max_length)
    )
    for i in range(3):
        logps = {row: logp_of(decoder, one(memory, i), list(row)) for row in every}
        scores = {row: sum(logp) / len(row) ** power for row, logp in logps.items()}
        best = sorted(every, key=scores.__getitem__, reverse=True)
        assert found.score[i].tolist() == pytest.approx([scores[row] for row in best], abs=1e-4)
        assert captions(found)[i][:5] == best[:5]
        assert sum(found.logp[i, 0].tolist()) == pytest.approx(sum(logps[best[0]]), abs=1e-4)
        assert len({*captions(found)[i]}) == len(every) == 121


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([0.0, 0.7, 1.0]), st.integers(0, 3))
def test_what_a_beam_gives_is_in_order_and_scored_as_read(
    seed: int, beam: int, power: float, no_repeat_ngram_size: int
) -> None:
    decoder, memory = made("transformer", 8, seed % 5), seen(2, seed)
    how = Decoding(beam=beam, length_penalty=power, no_repeat_ngram_size=no_repeat_ngram_size, max_length=7)
    found = written(decoder, memory, how)
    for i, rows in enumerate(captions(found)):
        assert len({*rows}) == len(rows) == beam
        assert found.score[i].tolist() == sorted(found.score[i].tolist(), reverse=True)
        for k, row in enumerate(rows):
            assert row[-1] == END and END not in row[:-1] and not {START, UNKNOWN} & {*row} and len(row) <= 7
            logp = found.logp[i, k].sum()
            assert float(found.score[i, k]) == pytest.approx(float(logp) / len(row) ** power, abs=1e-5)
            assert not found.logp[i, k, len(row) :].any()
            if not no_repeat_ngram_size:
                expected = logp_of(decoder, one(memory, i), list(row))
                assert found.logp[i, k, : len(row)].tolist() == pytest.approx(expected, abs=1e-4)
            else:
                grams = [row[j : j + no_repeat_ngram_size] for j in range(len(row) - no_repeat_ngram_size + 1)]
                assert len({*grams}) == len(grams)


def test_longer_captions_need_their_length_counted() -> None:
    decoder, memory = made("transformer", 30, seed=1), seen(20)
    lengths = []
    for power in (0.0, 1.0, 2.0):
        rows = captions(written(decoder, memory, Decoding(beam=5, length_penalty=power, max_length=20)))
        lengths.append(sum(len(row[0]) for row in rows))
    assert lengths[0] < lengths[1] <= lengths[2]


def naive_repeats(words: list[int], size: int) -> set[int]:
    before = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    ending = tuple(words[len(words) - size + 1 :]) if size > 1 else ()
    return {word for word in range(12) if (*ending, word) in before}


@given(st.lists(st.integers(3, 6), max_size=12), st.integers(1, 4))
def test_no_row_of_words_comes_twice(words: list[int], size: int) -> None:
    logits = torch.zeros(2, 20)
    forbid_repeats(logits, torch.tensor([words, [3 + i for i in range(len(words))]], dtype=torch.int64), size)
    assert {*logits[0].isneginf().nonzero().flatten().tolist()} == naive_repeats(words, size)
    if size > 1:
        assert not logits[1].isneginf().any()


def test_a_vocabulary_that_runs_out() -> None:
    """With no word allowed twice, three words are soon used up: the end is what is left."""
    decoder, memory = made("transformer", 7), seen(4)
    with torch.no_grad():
        decoder.bias[END] = -20.0
    for how in (
        Decoding(beam=4, no_repeat_ngram_size=1, max_length=9),
        Decoding(beam=1, sample=True, no_repeat_ngram_size=1, max_length=9),
    ):
        found = written(decoder, memory, how)
        assert all(sorted(rows[0]) == [END, 4, 5, 6] for rows in captions(found))
        assert found.score.isfinite().all()
    few = written(made("transformer", 5), memory, Decoding(beam=6, no_repeat_ngram_size=0, max_length=2))
    assert few.score.isfinite().sum(dim=1).tolist() == [2] * 4, "there are two captions of at most one word"


def test_draws_follow_the_odds() -> None:
    """The first two words of 4,000 drawn captions, against their probabilities."""
    decoder, memory, count = made("attentive", 8), seen(1), 4000
    how = Decoding(beam=count, sample=True, no_repeat_ngram_size=0, max_length=2, temperature=1.3)
    found = written(decoder, memory, how)
    drawn = Counter(tuple(row) for row in found.words[0].tolist())
    with torch.no_grad():
        for first in (END, 4, 5, 6, 7):
            p = probabilities(decoder, memory, [START], 1.3)[first]
            share = sum(n for row, n in drawn.items() if row[0] == first) / count
            assert share == pytest.approx(float(p), abs=4 * float(p * (1 - p) / count) ** 0.5 + 1e-9)
            if first == END:
                continue
            after = probabilities(decoder, memory, [START, first], 1.3)
            for second in (END, 4, 5, 6, 7):
                q = float(p * after[second])
                assert drawn[first, second] / count == pytest.approx(q, abs=4 * (q * (1 - q) / count) ** 0.5 + 1e-9)
    # The probabilities that are told are the model's, whatever the temperature.
    row = found.words[0, 0].tolist()
    words = row[: row.index(END) + 1] if END in row else row
    assert found.logp[0, 0, : len(words)].tolist() == pytest.approx(logp_of(decoder, memory, words), abs=1e-4)


def probabilities(decoder: Decoder, memory: Memory, words: list[int], temperature: float) -> Tensor:
    logits = decoder(torch.tensor([[words]]), memory)[0, 0, -1]
    logits[[PAD, START, UNKNOWN]] = -torch.inf
    return (logits / temperature).softmax(dim=0)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=10, unique=True), st.integers(0, 12), st.floats(0.05, 1))
def test_among_the_likeliest(values: list[float], top_k: int, top_p: float) -> None:
    logits = torch.tensor([values])
    kept = {*among(logits, top_k, top_p)[0].isfinite().nonzero().flatten().tolist()}
    order = logits[0].argsort(descending=True, stable=True).tolist()
    expected = order[: top_k or len(order)]
    p = logits[0][expected].softmax(dim=0)
    count = 1 + int((p.cumsum(dim=0)[:-1] < top_p).sum())
    if len({*logits[0].tolist()}) == len(values) and (p.cumsum(dim=0) - top_p).abs().min() > 1e-5:
        assert kept == {*expected[:count]}
    assert order[0] in kept


def test_draws_depend_on_the_seed_and_the_image_alone() -> None:
    decoder, memory = made("transformer", 30), seen(6)
    how = Decoding(beam=3, sample=True, max_length=8)
    samples = torch.tensor([10, 3, 10**12, 7, 0, 4])
    with torch.no_grad():
        step, state = NextWords(decoder), decoder(memory=memory)
        together = captions(generate(step, state, how, samples))
        again = captions(generate(step, state, how, samples))
        other = captions(generate(step, state, replace(how, sampling_seed=1), samples))
        order = torch.tensor([4, 2, 0])
        state = decoder(memory=Memory(memory.tokens[order], memory.pooled[order]))
        some = captions(generate(step, state, how, samples[order]))
    assert together == again and some == [together[i] for i in order]
    assert together != other and len({row for rows in together for row in rows}) > 10


def test_the_narrowest_draw_is_greedy() -> None:
    decoder, memory = made("lstm"), seen(5)
    greedy = captions(written(decoder, memory, Decoding(beam=1, max_length=8)))
    for narrow in (
        Decoding(sample=True, beam=1, max_length=8, top_k=1),
        Decoding(sample=True, beam=1, top_p=1e-6, max_length=8),
    ):
        drawn = captions(written(decoder, memory, narrow))
        # A search closes a caption that becomes too long; a draw leaves it open.
        assert [rows[0][:7] for rows in drawn] == [tuple(w for w in rows[0][:7]) for rows in greedy]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"beam": 0}, {"max_length": 0}, {"top_k": -1}, {"no_repeat_ngram_size": -1}, {"length_penalty": -0.1}),
        *({"top_p": 0.0}, {"top_p": 1.1}, {"temperature": 0.0}, {"match": -1.0}, {"match": float("nan")}),
        *({"consensus": -1.0}, {"neighbours": 0}, {"beam": 10**13}, {"max_length": 10**20}),
    ],
)
def test_decodings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Decoding(**wrong)  # type: ignore[arg-type]
