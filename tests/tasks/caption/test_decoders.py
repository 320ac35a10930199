"""Decoders: word by word as all at once, nothing from later words, and every weight learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.text import PAD, START
from vitrail.errors import UserError
from vitrail.tasks.caption.decoders import (
    AttentiveDecoder,
    Decoder,
    DecoderBlock,
    Memory,
    RecurrentDecoder,
    TransformerDecoder,
)

VOCABULARY, WIDTH, SEEN, POOLED, MAX_LENGTH = 13, 16, 12, 20, 9

DECODERS: dict[str, Callable[[], Decoder]] = {
    "rnn": lambda: RecurrentDecoder("rnn", VOCABULARY, WIDTH, 1, POOLED, 0.3),
    "gru": lambda: RecurrentDecoder("gru", VOCABULARY, WIDTH, 2, POOLED, 0.3),
    "lstm": lambda: RecurrentDecoder("lstm", VOCABULARY, WIDTH, 2, POOLED, 0.3),
    "attentive rnn": lambda: AttentiveDecoder("rnn", VOCABULARY, WIDTH, SEEN, 0.3, POOLED),
    "attentive lstm": lambda: AttentiveDecoder("lstm", VOCABULARY, WIDTH, SEEN, 0.3, POOLED),
    "transformer": lambda: TransformerDecoder(VOCABULARY, WIDTH, 3, 4, SEEN, 0.3, MAX_LENGTH),
    "transformer with a half for words": lambda: TransformerDecoder(VOCABULARY, WIDTH, 3, 2, SEEN, 0.3, MAX_LENGTH, 2),
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    made = DECODERS[request.param]()
    with torch.no_grad():  # biases start at zero, which would hide one that is left out
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
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
    state, rows, found = decoder(memory=seen), torch.arange(3).repeat_interleave(2), []
    for place, column in enumerate(read.flatten(0, 1).unbind(1)):
        logits, attention, state = decoder(column, state=state, rows=None if place else rows)
        found.append(logits)
    together = decoder(read, seen).flatten(0, 1)
    assert together.shape == (6, 6, VOCABULARY)
    torch.testing.assert_close(torch.stack(found, dim=1), together, atol=1e-5, rtol=1e-5)
    if attention is not None:
        assert attention.shape == (6, 5)
        torch.testing.assert_close(attention.sum(dim=1), torch.ones(6))


@torch.no_grad()
def test_logits_of_counted_places_alone(decoder: Decoder) -> None:
    decoder.eval()
    seen, read = memory(), words()
    counted = torch.rand(read.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.testing.assert_close(decoder(read, seen, counted=counted), decoder(read, seen)[counted])


@torch.no_grad()
def test_chosen_rows_of_a_state_continue_as_these(decoder: Decoder) -> None:
    """Captions may be dropped and doubled among those of an image, at any word."""
    decoder.eval()
    seen, read = memory(2), words(2, 3).flatten(0, 1)
    state, rows = decoder(memory=seen), torch.arange(2).repeat_interleave(3)
    for place in range(4):
        _, _, state = decoder(read[:, place], state=state, rows=None if place else rows)
    rows = torch.tensor([2, 2, 0, 4, 3, 3])
    _, _, state = decoder(read[:, 4], state=state, rows=rows)
    again = read[rows]
    again[:, 4] = read[:, 4]
    second = torch.tensor([1, 0, 1, 5, 5, 4])
    after, _, _ = decoder(read[:, 5], state=state, rows=second)
    again = again[second]
    again[:, 5] = read[:, 5]
    torch.testing.assert_close(after, decoder(again.view(2, 3, 6), seen)[:, :, -1].flatten(0, 1), atol=1e-5, rtol=1e-5)


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
    # What fills a caption up does not change what is before it.
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
    F.cross_entropy(decoder(read, seen).flatten(0, 2), read.flatten()).backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@torch.no_grad()
def test_a_block_written_out_in_plain_attention() -> None:
    """Whole captions at once, and a first word with its keys, values and formed attention."""
    torch.manual_seed(0)
    block = DecoderBlock(WIDTH, 4, 0.0, look=True).eval()
    assert block.look is not None and block.norm2 is not None
    x, tokens = torch.randn(6, 1, WIDTH), torch.randn(3, 5, WIDTH)
    fused, image = block(x, tokens), block(tokens=tokens)
    empty = torch.empty(0, 6, 4, WIDTH // 4)
    formed, past, weights = block(x, image=image, past=[empty, empty])
    assert [tuple(tensor.shape) for tensor in past] == [(1, 6, 4, 4)] * 2 and weights.shape == (6, 4, 5)
    torch.testing.assert_close(fused, formed, atol=1e-6, rtol=1e-5)
    # Row r belongs to image r // 2, head by head.
    assert block.look is not None and block.norm2 is not None
    q = block.look.project(block.norm2(x + block.attention(block.norm1(x))), 0, 1)[0]
    own = image[0].repeat_interleave(2, dim=0)
    torch.testing.assert_close((q @ own.transpose(-2, -1) / 2).softmax(dim=-1)[:, :, 0], weights)


@pytest.mark.parametrize("name", ["transformer", "transformer with a half for words"])
def test_hooks_on_blocks_run_whatever_is_requested(name: str) -> None:
    """FSDP gathers the weights of a module in hooks on its call, so nothing may go around it."""
    decoder = DECODERS[name]().eval()
    called: list[nn.Module] = []
    modules = [decoder, *decoder.get_submodule("blocks").children()]
    for module in modules:
        module.register_forward_pre_hook(lambda module, inputs: called.append(module))
    seen, read = memory(), words()

    def calls(*given: Any, **named: Any) -> list[int]:
        called.clear()
        decoder(*given, **named)
        return [modules.index(module) for module in called]

    assert calls(read, seen) == [0, 1, 2, 3]
    first = 1 if name == "transformer" else 3
    assert calls(memory=seen) == [0, *range(first, 4)], "those that read the image"
    assert calls(read[:, 0, 0], state=decoder(memory=seen)) == [0, 1, 2, 3]
    if first == 3:
        assert calls(read[:, 0]) == [0, 1, 2], "those that read words alone"


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
    after, attention, _ = d(torch.tensor([START]), state=d(memory=seen))
    torch.testing.assert_close(after, F.linear(expected, d.embedding.weight, d.bias))
    torch.testing.assert_close(attention[0], weights)


def test_words_alone_do_not_see_the_image() -> None:
    torch.manual_seed(0)
    decoder = DECODERS["transformer with a half for words"]().eval()
    assert isinstance(decoder, TransformerDecoder)
    read = words()[:, 0]
    hidden = decoder(read)
    assert hidden.shape == (3, 6, WIDTH)
    hidden.sum().backward()
    assert all(p.grad is None for p in decoder.blocks[2].parameters())
    assert decoder.get_parameter("memory.weight").grad is None
    with pytest.raises(UserError, match="no text-only layers"):
        DECODERS["transformer"]()(read)


def test_more_words_than_positions() -> None:
    decoder = DECODERS["transformer"]()
    with pytest.raises(UserError, match="a caption of 10 words exceeds the model's limit of 9"):
        decoder(words(length=10), memory())
    assert decoder.max_length == 9 and DECODERS["lstm"]().max_length is None
