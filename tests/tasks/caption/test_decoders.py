"""Decoders: word by word as all at once, nothing from later words, and every weight learns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.text import PAD, START
from vitrail.errors import UserError
from vitrail.tasks.decoders import (
    AttentiveDecoder,
    Cache,
    Decoder,
    DecoderBlock,
    Memory,
    RecurrentDecoder,
    TransformerDecoder,
)

VOCABULARY, WIDTH, SEEN, POOLED, LONGEST = 13, 16, 12, 20, 9

DECODERS: dict[str, Callable[[], Decoder]] = {
    "rnn": lambda: RecurrentDecoder("rnn", VOCABULARY, WIDTH, 1, POOLED, 0.3),
    "gru": lambda: RecurrentDecoder("gru", VOCABULARY, WIDTH, 2, POOLED, 0.3),
    "lstm": lambda: RecurrentDecoder("lstm", VOCABULARY, WIDTH, 2, POOLED, 0.3),
    "attentive rnn": lambda: AttentiveDecoder("rnn", VOCABULARY, WIDTH, SEEN, 0.3, POOLED),
    "attentive lstm": lambda: AttentiveDecoder("lstm", VOCABULARY, WIDTH, SEEN, 0.3, POOLED),
    "transformer": lambda: TransformerDecoder(VOCABULARY, WIDTH, 3, 4, SEEN, 0.3, LONGEST),
    "transformer with a half for words": lambda: TransformerDecoder(VOCABULARY, WIDTH, 3, 2, SEEN, 0.3, LONGEST, 2),
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    made = DECODERS[request.param]()
    with torch.no_grad():  # biases start at zero, which would hide one that is left out
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def memory(images: int = 3, seed: int = 0) -> Memory:
    draw = torch.Generator().manual_seed(seed)
    return Memory(torch.randn(images, 5, SEEN, generator=draw), torch.randn(images, POOLED, generator=draw))


def words(images: int = 3, captions: int = 2, length: int = 6) -> Tensor:
    chosen = torch.randint(4, VOCABULARY, (images, captions, length), generator=torch.Generator().manual_seed(1))
    chosen[..., 0] = START
    return chosen


@torch.no_grad()
def test_word_by_word_is_as_all_at_once(decoder: Decoder) -> None:
    decoder.eval()
    seen, read = memory(), words()
    state, known = decoder.start(seen, 2), []
    for column in read.flatten(0, 1).unbind(1):
        after, state = decoder.step(column, state)
        known.append(after)
    together = decoder(read, seen).flatten(0, 1)
    torch.testing.assert_close(torch.stack(known, dim=1), together, atol=1e-5, rtol=1e-5)
    assert state.length == read.shape[2] and decoder.logits(together).shape == (6, 6, VOCABULARY)
    if state.looked:
        assert state.looked[0].shape == (6, 5)
        torch.testing.assert_close(state.looked[0].sum(dim=1), torch.ones(6))


@torch.no_grad()
def test_a_state_of_chosen_captions_goes_on_as_these(decoder: Decoder) -> None:
    """Captions may be dropped and doubled among those of an image."""
    decoder.eval()
    seen, read = memory(2), words(2, 3)
    state = decoder.start(seen, 3)
    for column in read[..., :4].flatten(0, 1).unbind(1):
        _, state = decoder.step(column, state)
    rows = torch.tensor([2, 2, 0, 4, 3, 3])
    after, _ = decoder.step(read.flatten(0, 1)[:, 4], state.chosen(rows))
    again = read.flatten(0, 1)[rows]
    again[:, 4] = read.flatten(0, 1)[:, 4]
    expected = decoder(again[:, :5].view(2, 3, 5), seen)[:, :, -1].flatten(0, 1)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_word_knows_of_a_later_one_or_of_another_caption(decoder: Decoder) -> None:
    decoder.eval()
    seen, read = memory(), words()
    before = decoder(read, seen)
    changed = read.clone()
    changed[1, 0, 4] = 4 if read[1, 0, 4] != 4 else 5
    after = decoder(changed, seen)
    assert torch.equal(before[1, 0, :4], after[1, 0, :4])
    assert not torch.allclose(before[1, 0, 4], after[1, 0, 4])
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = False
    torch.testing.assert_close(before[others], after[others])
    # What fills a caption up has no part in what stands before it.
    filled = F.pad(read, (0, 2), value=PAD)
    torch.testing.assert_close(decoder(filled, seen)[:, :, :6], before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_caption_depends_on_its_own_image(decoder: Decoder) -> None:
    decoder.eval()
    seen, read = memory(), words()
    together = decoder(read, seen)
    for i in range(3):
        alone = decoder(read[i : i + 1], Memory(seen.tokens[i : i + 1], seen.pooled[i : i + 1]))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
    other = decoder(read, memory(seed=5))
    assert not torch.allclose(other[0, 0, 0], together[0, 0, 0])


def test_every_parameter_learns(decoder: Decoder) -> None:
    seen, read = memory(), words()
    F.cross_entropy(decoder.logits(decoder(read, seen)).flatten(0, 2), read.flatten()).backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@torch.no_grad()
def test_formed_attention_is_fused_attention() -> None:
    torch.manual_seed(0)
    block = DecoderBlock(WIDTH, 4, 0.0, look=True).eval()
    x, image = torch.randn(6, 1, WIDTH), block.image(torch.randn(3, 5, WIDTH))
    fused = block(x, image)
    formed, _, weights = block.step(x, image, Cache([], image), 0)
    assert weights.shape == (6, 4, 5)
    torch.testing.assert_close(fused, formed, atol=1e-6, rtol=1e-5)
    # Row r belongs to image r // 2, head by head.
    q = block.look.project(block.norm2(x + block.attention(block.norm1(x))), 0, 1)[0]
    own = image[0].repeat_interleave(2, dim=0)
    torch.testing.assert_close((q @ own.transpose(-2, -1) / 2).softmax(dim=-1)[:, :, 0], weights)


@torch.no_grad()
def test_soft_attention_written_out() -> None:
    """Equations 4, 5 and 13 of Show, Attend and Tell with the class's own gate and output, for a first word."""
    torch.manual_seed(0)
    d, seen = AttentiveDecoder("lstm", VOCABULARY, WIDTH, SEEN, 0.0, POOLED).eval(), memory(1)
    h, c = torch.tanh(d.begin(seen.pooled))[0].chunk(2)
    scores = [float(d.score(torch.tanh(d.keys(a) + d.query(h)))) for a in seen.tokens[0]]
    weights = torch.tensor(scores).softmax(dim=0)
    z = sum(w * d.values(a) for w, a in zip(weights, seen.tokens[0], strict=True)) * torch.sigmoid(d.gate(h))
    read = d.embedding(torch.tensor(START)) * WIDTH**0.5
    h, c = d.cell(torch.cat([read, z])[None], (h[None], c[None]))
    expected = torch.tanh(d.out(torch.cat([read[None], h, z[None]], dim=1)))
    after, state = d.step(torch.tensor([START]), d.start(seen))
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(state.looked[0][0], weights)


def test_words_alone_do_not_see_the_image() -> None:
    torch.manual_seed(0)
    decoder = DECODERS["transformer with a half for words"]().eval()
    assert isinstance(decoder, TransformerDecoder)
    read = words()[:, 0]
    known = decoder.read(read)
    assert known.shape == (3, 6, WIDTH)
    known.sum().backward()
    assert all(p.grad is None for p in decoder.blocks[2].parameters()) and decoder.memory.weight.grad is None


def test_more_words_than_positions() -> None:
    decoder = DECODERS["transformer"]()
    with pytest.raises(UserError, match="a caption of 10 words is longer than the 9 that the model knows"):
        decoder(words(length=10), memory())
    assert decoder.max_length == 9 and DECODERS["lstm"]().max_length is None
