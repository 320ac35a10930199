"""Decoders of captions: recurrent ones, with attention or without, and the Transformer's, all behind one interface.

Shapes: B images, K captions an image, R = B * K rows, T words, M tokens of an image, D width, V vocabulary.

`forward` reads whole captions at once (teacher forcing). `start` and `step` write them word by word; what a step needs
of the steps before it is in a state, whose `words` tensors have a row a caption and whose `image` tensors have a row
an image, so that a search with several captions an image never copies the image's part.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.baselines.rnn import CELLS, Recurrent, State
from vitrail.data.text import PAD
from vitrail.errors import UserError
from vitrail.ops import attend
from vitrail.vit import MLP, Attention, attention_weights


@dataclass
class Memory:
    """What a decoder sees of B images."""

    tokens: Tensor
    """[B, M, D]"""
    pooled: Tensor
    """[B, D]"""


@dataclass
class DecoderState:
    """What is known after some words."""

    words: list[Tensor]
    """each [R, ...]"""
    image: list[Tensor]
    """each [B, ...]"""
    length: int = 0
    """words read"""
    looked: list[Tensor] = field(default_factory=list)
    """attention of the last step over the image's tokens, [R, M]; empty for a decoder without attention"""

    def chosen(self, rows: Tensor) -> DecoderState:
        """The state of these rows [R'], for a search that keeps some captions and drops others."""
        return DecoderState([tensor[rows] for tensor in self.words], self.image, self.length)


@dataclass
class Cache(DecoderState):
    """Keys and values of the words so far, each [T, R, heads, d]; which rows go on is bundled out with the next word.

    Choosing rows and adding a word are so one copy and not two, and with words first it is one of whole pieces.
    """

    rows: Tensor | None = None

    def chosen(self, rows: Tensor) -> Cache:
        rows = rows if self.rows is None else self.rows[rows]
        return Cache(self.words, self.image, self.length, rows=rows)

    def extended(self, place: int, new: Tensor) -> Tensor:
        """The tensor at `place` with the next word's [R, heads, 1, d] behind it."""
        new = new.permute(2, 0, 1, 3)
        if not self.words:
            return new.contiguous()
        before = self.words[place]
        together = before.new_empty(len(before) + 1, *new.shape[1:])
        if self.rows is None:
            together[:-1] = before
        else:
            torch.index_select(before, 1, self.rows, out=together[:-1])
        together[-1:] = new
        return together


class Decoder(nn.Module):
    """Words and an image in, what is known after each word out."""

    max_length: int | None = None
    """words of a caption at most, where the decoder has a limit of its own"""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        # Words enter at the size of a unit normal over the width, and leave through the same matrix (1608.05859).
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def logits(self, hidden: Tensor) -> Tensor:
        """What is known [..., D] to logits [..., V]."""
        return F.linear(hidden, self.embedding.weight, self.bias)

    @abstractmethod
    def forward(self, words: Tensor, memory: Memory) -> Tensor:
        """Words [B, K, T] of K captions for each image to what is known after each, [B, K, T, D]."""

    @abstractmethod
    def start(self, memory: Memory, captions: int = 1) -> DecoderState:
        """The state before the first word, with room for `captions` captions an image."""

    @abstractmethod
    def step(self, words: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """The next word of each caption, [R], to what is known after it, [R, D], and the state then."""


class RecurrentDecoder(Decoder):
    """Show and Tell (1411.4555): the image is the first thing that a recurrent network reads, the words follow."""

    def __init__(self, cell: str, vocabulary: int, width: int, depth: int, pooled_width: int, dropout: float) -> None:
        super().__init__(vocabulary, width, dropout)
        self.image = nn.Linear(pooled_width, width)
        self.layers = Recurrent(CELLS[cell], width, width, depth, dropout)

    def forward(self, words: Tensor, memory: Memory) -> Tensor:
        images, captions, length = words.shape
        first = self.image(memory.pooled).repeat_interleave(captions, dim=0)[:, None]
        read = self.dropout(self.embedding(words.flatten(0, 1)) * self.width**0.5)
        shown, _ = self.layers(torch.cat([first, read], dim=1))
        return self.dropout(shown[:, 1:]).view(images, captions, length, -1)

    def start(self, memory: Memory, captions: int = 1) -> DecoderState:
        first = self.image(memory.pooled).repeat_interleave(captions, dim=0)
        return DecoderState(_flat(self.layers.step(first, self.layers.start(len(first)))), [])

    def step(self, words: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        cells = _cells(state.words, len(self.layers.cells))
        after = self.layers.step(self.embedding(words) * self.width**0.5, cells)
        return after[-1][0], DecoderState(_flat(after), [], state.length + 1)


class AttentiveDecoder(Decoder):
    """Show, Attend and Tell (1502.03044), with soft attention: before each word, look at the image anew.

    e_i = v . tanh(W a_i + U h), weights softmax(e) (equations 4 and 5); the weighted mean of V a_i, times a gate that
    the state sets (section 4.2.1), is read together with the word. Other than there, the tokens a_i go through V first,
    the gate has a number a channel in place of one, and a tanh is around the sum of equation 7.
    """

    def __init__(
        self, cell: str, vocabulary: int, width: int, memory_width: int, dropout: float, pooled_width: int | None = None
    ) -> None:
        """`pooled_width` is that of an image's one vector, where it is another than its tokens'."""
        super().__init__(vocabulary, width, dropout)
        self.keys = nn.Linear(memory_width, width)
        self.values = nn.Linear(memory_width, width)
        self.query = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)
        self.gate = nn.Linear(width, width)
        self.begin = nn.Linear(pooled_width or memory_width, CELLS[cell].states * width)
        self.cell = CELLS[cell](2 * width, width)
        self.out = nn.Linear(3 * width, width)

    def forward(self, words: Tensor, memory: Memory) -> Tensor:
        state, known = self.start(memory, words.shape[1]), []
        for column in words.flatten(0, 1).unbind(1):
            after, state = self.step(column, state)
            known.append(after)
        return torch.stack(known, dim=1).view(*words.shape, -1)

    def start(self, memory: Memory, captions: int = 1) -> DecoderState:
        cell = torch.tanh(self.begin(memory.pooled)).repeat_interleave(captions, dim=0)
        image = [self.keys(memory.tokens), self.values(memory.tokens)]
        return DecoderState(list(cell.chunk(self.cell.states, dim=1)), image)

    def step(self, words: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        keys, values = state.image
        hidden = state.words[0]
        queries = self.query(hidden).view(len(keys), -1, 1, self.width)
        weights = self.score(torch.tanh(keys[:, None] + queries)).squeeze(-1).softmax(dim=-1)  # [B, K, M]
        seen = (weights @ values).flatten(0, 1) * torch.sigmoid(self.gate(hidden))
        read = self.dropout(self.embedding(words) * self.width**0.5)
        after = self.cell(torch.cat([read, seen], dim=1), tuple(state.words))
        # The deep output, as in equation 7: word, state and what was seen together choose the next word.
        known = torch.tanh(self.out(self.dropout(torch.cat([read, after[0], seen], dim=1))))
        return self.dropout(known), DecoderState(list(after), state.image, state.length + 1, [weights.flatten(0, 1)])


class DecoderBlock(nn.Module):
    """Attention to the words before, attention to the image, MLP, each behind a norm and beside a residual path.

    Without `look` the image is left out, as in the lower half of CoCa's decoder (2205.01917).
    """

    def __init__(self, width: int, heads: int, dropout: float, look: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width) if look else None
        self.look = Attention(width, heads) if look else None
        self.norm3, self.mlp = nn.LayerNorm(width), MLP(width, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def image(self, memory: Tensor) -> list[Tensor]:
        """Keys and values [B, heads, M, d] of the image's tokens: the same at every step."""
        return [] if self.look is None else list(self.look.project(memory, 1, 3))

    def forward(self, x: Tensor, image: list[Tensor]) -> Tensor:
        """Whole captions [R, T, D], of which no word sees a later one."""
        q, k, v = self.attention.project(self.norm1(x))
        return self._after(x, attend(q, k, v, is_causal=True), image)[0]

    def step(self, x: Tensor, image: list[Tensor], cache: Cache, place: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """The next word [R, 1, D], with keys and values at `place` of the cache, to what becomes of the word, the keys
        and values with its own, and the attention over the image [R, heads, M]."""
        q, k, v = self.attention.project(self.norm1(x))
        kept = [cache.extended(place, k), cache.extended(place + 1, v)]
        keys, values = (part.permute(1, 2, 0, 3) for part in kept)
        mixed = attend(q, keys, values)
        x, looked = self._after(x, mixed, image, weights=True)
        return x, kept, looked

    def _after(self, x: Tensor, mixed: Tensor, image: list[Tensor], weights: bool = False) -> tuple[Tensor, Tensor]:
        """What follows the attention to the words: that to the image, and the MLP."""
        x = x + self.dropout(self.attention.out(mixed.transpose(1, 2).flatten(2)))
        looked = x.new_empty(0)
        if self.look is not None and self.norm2 is not None:
            # The captions of an image are so many more queries to the same keys, which are not copied.
            images, (rows, length, width) = len(image[0]), x.shape
            (q,) = self.look.project(self.norm2(x).view(images, -1, width), 0, 1)
            if weights:  # for few words this is no slower than fused attention, which never forms the matrix
                matrix = attention_weights(q, image[0])
                looked = matrix.transpose(1, 2).reshape(rows, self.look.heads, -1)
                seen = matrix @ image[1]
            else:
                seen = attend(q, image[0], image[1])
            seen = seen.transpose(1, 2).reshape(rows, length, width)
            x = x + self.dropout(self.look.out(seen))
        return x + self.dropout(self.mlp(self.norm3(x))), looked


class TransformerDecoder(Decoder):
    """The decoder of *Attention is all you need* (1706.03762) with norms first, over the image's tokens."""

    no_decay: ClassVar[tuple[str, ...]] = ("positions",)

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        memory_width: int,
        dropout: float,
        max_length: int,
        text_depth: int = 0,
    ) -> None:
        """The first `text_depth` of the `depth` blocks read words alone; `max_length` limits a caption."""
        super().__init__(vocabulary, width, dropout)
        self.memory = nn.Linear(memory_width, width) if memory_width != width else nn.Identity()
        self.positions = nn.Parameter(torch.empty(max_length, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, dropout, look=i >= text_depth) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.text_depth = text_depth
        self.max_length = max_length
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, words: Tensor, memory: Memory) -> Tensor:
        x = self._embed(words.flatten(0, 1), 0)
        tokens = self.memory(memory.tokens)
        for block in self._blocks():
            x = block(x, block.image(tokens))
        return self.norm(x).view(*words.shape, -1)

    def read(self, words: Tensor) -> Tensor:
        """Captions [R, T] alone to what the blocks without the image make of them, [R, T, D]."""
        x = self._embed(words, 0)
        for block in self._blocks()[: self.text_depth]:
            x = block(x, [])
        return x

    def start(self, memory: Memory, captions: int = 1) -> DecoderState:
        tokens = self.memory(memory.tokens)
        parts: list[Tensor] = []
        for block in self._blocks():
            if block.look is not None:
                keys, values = block.image(tokens)
                # In memory as each step's products read them, which makes these several times as fast.
                parts += [keys.mT.contiguous().mT, values.contiguous()]
        return Cache([], parts)

    @torch.no_grad()
    def step(self, words: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        assert isinstance(state, Cache)
        x = self._embed(words[:, None], state.length)
        image, after, looked = iter(state.image), [], []
        for i, block in enumerate(self._blocks()):
            own = [] if block.look is None else [next(image), next(image)]
            x, kept, weights = block.step(x, own, state, 2 * i)
            after += kept
            if own:
                looked.append(weights)
        seen = torch.stack(looked).mean(dim=0).mean(dim=1)
        return self.norm(x)[:, 0], Cache(after, state.image, state.length + 1, [seen])

    def _blocks(self) -> list[DecoderBlock]:
        return cast(list[DecoderBlock], list(self.blocks))

    def _embed(self, words: Tensor, first: int) -> Tensor:
        last = first + words.shape[1]
        if last > len(self.positions):
            raise UserError(f"a caption of {last} words is longer than the {len(self.positions)} that the model knows")
        return self.dropout(self.embedding(words) * self.width**0.5 + self.positions[first:last])


def _flat(states: tuple[State, ...]) -> list[Tensor]:
    return [tensor for state in states for tensor in state]


def _cells(tensors: list[Tensor], layers: int) -> tuple[State, ...]:
    size = len(tensors) // layers
    return tuple(tuple(tensors[i * size : (i + 1) * size]) for i in range(layers))
