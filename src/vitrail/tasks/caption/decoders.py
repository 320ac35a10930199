"""Decoders of captions: recurrent ones, with attention or without, and the Transformer's, all behind one interface.

Shapes: B images, K captions per image, R = B * K rows, T words, M tokens per image, D width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.baselines.rnn import CELLS, Recurrent
from vitrail.baselines.rnn import State as CellState
from vitrail.data.text import PAD
from vitrail.errors import UserError
from vitrail.ops import attend
from vitrail.tasks.caption.settings import Captioning
from vitrail.vit import MLP, Attention, attention_weights


class Memory(NamedTuple):
    """What a decoder sees of B images."""

    tokens: Tensor
    """[B, M, D]"""
    pooled: Tensor
    """[B, D]"""


class State(NamedTuple):
    """What a decoder keeps between words. A search with several captions per image never copies `image`."""

    words: list[Tensor]
    """of the words so far: each has one entry per row"""
    image: list[Tensor]
    """of the images: each [B, ...]"""


class Step(NamedTuple):
    """What follows from one more word of each caption."""

    logits: Tensor
    """[R, V], of the word after it"""
    attention: Tensor | None
    """over the image's tokens [R, M], the mean over layers and heads; None for a decoder without"""
    state: Any
    """a `State`, or a decoder's own kind"""


class Decoder(nn.Module):
    """Words and images in, logits of the next words out.

    All work goes through the call of the module, so that hooks on calls (FSDP's) always run. What is given says what is
    asked for:

    - `words` [B, K, T] and `memory`: logits of the word after each, [B, K, T, V], or [n, V] of the n places that are
      True in `counted` [B, K, T] (teacher forcing)
    - `memory`: the state before the first word, with one row per image
    - `words` [R] and `state`: a `Step`; row r continues row `rows[r]` of the state, or row r where `rows` is left out
    - `words` [R, T]: hidden states [R, T, D] of the layers that read words without the image, where there are some
    """

    max_length: int | None = None
    """words of a caption at most, where the decoder has a limit of its own"""
    images_at_once: int | None = None
    """images to write captions of in one go, where more would need too much memory"""
    frozen: Sequence[nn.Module] = ()
    """modules that do not learn"""

    def forward(
        self,
        words: Tensor | None = None,
        memory: Memory | None = None,
        state: Any = None,
        rows: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Any:
        if words is None:
            assert memory is not None
            return self._start(memory)
        if state is not None:
            hidden, attention, state = self._step(words, rows, state)
            return Step(self._logits(hidden), attention, state)
        if memory is None:
            return self._words_alone(words)
        hidden = self._captions(words, memory)
        return self._logits(hidden if counted is None else hidden[counted])

    def within_limit(self, max_length: int) -> int:
        """So many words, or as many as the decoder can write at most."""
        return min(max_length, self.max_length or max_length)

    def description(self) -> dict[str, Any]:
        """What a checkpoint's `config.json` needs beside the settings to make the decoder again."""
        return {}

    def init_word_bias(self, logits: Tensor) -> None:
        """Start with these logits [V] whatever the image, in a decoder that has yet to learn how common words are."""

    @abstractmethod
    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        """Words [B, K, T] to the hidden states after each, [B, K, T, D]."""

    @abstractmethod
    def _start(self, memory: Memory) -> Any:
        """The state before the first word, with one row per image."""

    @abstractmethod
    def _step(self, words: Tensor, rows: Tensor | None, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        """The next word of each caption, [R], to the hidden states after it [R, D], the attention and the new state."""

    @abstractmethod
    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V]."""

    def _words_alone(self, words: Tensor) -> Tensor:
        raise UserError("this decoder has no layers that read words without the image: train caption-match for some")


class WordDecoder(Decoder):
    """A decoder that learns an embedding of its own vocabulary."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        # Words enter at the size of a unit normal over the width, and leave through the same matrix (1608.05859).
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def init_word_bias(self, logits: Tensor) -> None:
        self.bias.data.copy_(logits)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight, self.bias)


class RecurrentDecoder(WordDecoder):
    """Show and Tell (1411.4555): the image is the first thing that a recurrent network reads, the words follow."""

    def __init__(self, cell: str, vocabulary: int, width: int, depth: int, pooled_width: int, dropout: float) -> None:
        super().__init__(vocabulary, width, dropout)
        self.image = nn.Linear(pooled_width, width)
        self.layers = Recurrent(CELLS[cell], width, width, depth, dropout)

    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        images, captions, length = words.shape
        first = self.image(memory.pooled).repeat_interleave(captions, dim=0)[:, None]
        read = self.dropout(self.embedding(words.flatten(0, 1)) * self.width**0.5)
        shown, _ = self.layers(torch.cat([first, read], dim=1))
        return self.dropout(shown[:, 1:]).view(images, captions, length, -1)

    def _start(self, memory: Memory) -> State:
        _, cells = self.layers(self.image(memory.pooled)[:, None])
        return State([tensor for cell in cells for tensor in cell], [])

    def _step(self, words: Tensor, rows: Tensor | None, state: State) -> tuple[Tensor, None, State]:
        before = _grouped(_chosen(state.words, rows), len(self.layers.cells))
        shown, after = self.layers((self.embedding(words) * self.width**0.5)[:, None], before)
        return shown[:, 0], None, State([tensor for cell in after for tensor in cell], [])


class AttentiveDecoder(WordDecoder):
    """Show, Attend and Tell (1502.03044), with soft attention: before each word, look at the image anew.

    e_i = v . tanh(W a_i + U h), weights softmax(e) (equations 4 and 5); the weighted mean of V a_i, times a gate that
    the state sets (section 4.2.1), is read together with the word. Other than there, the tokens a_i go through V first,
    the gate has one number per channel in place of one, and a tanh is around the sum of equation 7.
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

    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        first, image = self._start(memory)
        state, hidden = State([tensor.repeat_interleave(words.shape[1], dim=0) for tensor in first], image), []
        for column in words.flatten(0, 1).unbind(1):
            after, _, state = self._step(column, None, state)
            hidden.append(after)
        return torch.stack(hidden, dim=1).view(*words.shape, -1)

    def _start(self, memory: Memory) -> State:
        cell = torch.tanh(self.begin(memory.pooled))
        image = [self.keys(memory.tokens), self.values(memory.tokens)]
        return State(list(cell.chunk(self.cell.states, dim=1)), image)

    def _step(self, words: Tensor, rows: Tensor | None, state: State) -> tuple[Tensor, Tensor, State]:
        keys, values = state.image
        before = tuple(_chosen(state.words, rows))
        queries = self.query(before[0]).view(len(keys), -1, 1, self.width)
        weights = self.score(torch.tanh(keys[:, None] + queries)).squeeze(-1).softmax(dim=-1)  # [B, K, M]
        seen = (weights @ values).flatten(0, 1) * torch.sigmoid(self.gate(before[0]))
        read = self.dropout(self.embedding(words) * self.width**0.5)
        after = self.cell(torch.cat([read, seen], dim=1), before)
        # The deep output, as in equation 7: word, state and what was seen together choose the next word.
        hidden = torch.tanh(self.out(self.dropout(torch.cat([read, after[0], seen], dim=1))))
        return self.dropout(hidden), weights.flatten(0, 1), State(list(after), state.image)


class DecoderBlock(nn.Module):
    """Attention to the words before, attention to the image, MLP, each behind a norm and beside a residual path.

    Without `look` the image is left out, as in the lower half of CoCa's decoder (2205.01917). As in `Decoder`, what is
    given says what is asked for:

    - `x` [R, T, D], whole captions, and the image's `tokens` [B, M, D]: [R, T, D], of which no word sees a later one
    - `tokens`: their keys and values, [B, heads, M, d] each, which are the same at every step
    - `x` [R, 1, D], the next words, with `image` (keys and values of the tokens) and `past` (those of the words before,
      [T, R', heads, d], of which row r continues `rows[r]`): the words' states, `past` with their own keys and values,
      and the attention over the image, [R, heads, M]
    """

    def __init__(self, width: int, heads: int, dropout: float, look: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width) if look else None
        self.look = Attention(width, heads) if look else None
        self.norm3, self.mlp = nn.LayerNorm(width), MLP(width, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor | None = None,
        tokens: Tensor | None = None,
        image: Sequence[Tensor] = (),
        past: Sequence[Tensor] = (),
        rows: Tensor | None = None,
    ) -> Any:
        if x is None:
            assert self.look is not None and tokens is not None
            return self.look.project(tokens, 1, 3)
        if past:
            return self._step(x, image, past, rows)
        x = x + self.dropout(self.attention(self.norm1(x), is_causal=True))
        if self.look is not None and self.norm2 is not None and tokens is not None:
            # The captions of an image are so many more queries to the same keys, which are not copied.
            queries = self.norm2(x).view(len(tokens), -1, x.shape[-1])
            x = x + self.dropout(self.look(queries, tokens).view_as(x))
        return x + self.dropout(self.mlp(self.norm3(x)))

    def _step(
        self, x: Tensor, image: Sequence[Tensor], past: Sequence[Tensor], rows: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        q, *new = self.attention.project(self.norm1(x))
        past = [_extended(before, own, rows) for before, own in zip(past, new, strict=True)]
        keys, values = (tensor.permute(1, 2, 0, 3) for tensor in past)
        mixed = attend(q, keys, values)
        x = x + self.dropout(self.attention.out(mixed.transpose(1, 2).flatten(2)))
        weights = None
        if self.look is not None and self.norm2 is not None:
            images, (count, length, width) = len(image[0]), x.shape
            (q,) = self.look.project(self.norm2(x).view(images, -1, width), 0, 1)
            # For few words this is no slower than fused attention, which never forms the matrix.
            matrix = attention_weights(q, image[0])
            weights = matrix.transpose(1, 2).reshape(count, self.look.heads, -1)
            seen = (matrix @ image[1]).transpose(1, 2).reshape(count, length, width)
            x = x + self.dropout(self.look.out(seen))
        return x + self.dropout(self.mlp(self.norm3(x))), past, weights


class TransformerDecoder(WordDecoder):
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
        self.heads = heads
        self.text_depth = text_depth
        self.max_length = max_length
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        x = self._embed(words.flatten(0, 1), 0)
        tokens = self.memory(memory.tokens)
        for block in self.blocks:
            x = block(x, tokens)
        return self.norm(x).view(*words.shape, -1)

    def _words_alone(self, words: Tensor) -> Tensor:
        if not self.text_depth:
            return super()._words_alone(words)
        x = self._embed(words, 0)
        for block in self.blocks[: self.text_depth]:
            x = block(x)
        return x

    def _start(self, memory: Memory) -> State:
        tokens = self.memory(memory.tokens)
        image: list[Tensor] = []
        for block in self.blocks[self.text_depth :]:
            keys, values = block(tokens=tokens)
            # In memory as each step's products read them, which makes these several times as fast.
            image += [keys.mT.contiguous().mT, values.contiguous()]
        empty = tokens.new_empty(0, len(tokens), self.heads, self.width // self.heads)
        return State([empty] * (2 * len(self.blocks)), image)

    @torch.no_grad()
    def _step(self, words: Tensor, rows: Tensor | None, state: State) -> tuple[Tensor, Tensor, State]:
        """`state.words` holds each block's keys and values of the words so far, [T, R, heads, d]."""
        x = self._embed(words[:, None], len(state.words[0]))
        image, after, found = iter(state.image), [], []
        for i, block in enumerate(self.blocks):
            own = () if i < self.text_depth else (next(image), next(image))
            x, past, weights = block(x, image=own, past=state.words[2 * i : 2 * i + 2], rows=rows)
            after += past
            if weights is not None:
                found.append(weights)
        attention = torch.stack(found).mean(dim=0).mean(dim=1)
        return self.norm(x)[:, 0], attention, State(after, state.image)

    def _embed(self, words: Tensor, first: int) -> Tensor:
        last = first + words.shape[1]
        if last > len(self.positions):
            raise UserError(f"a caption of {last} words is longer than the {len(self.positions)} that the model knows")
        return self.dropout(self.embedding(words) * self.width**0.5 + self.positions[first:last])


def decoder_for(config: Captioning, vocabulary: int, memory_width: int, pooled_width: int) -> Decoder:
    """A fresh decoder of its own vocabulary, for an image's tokens and its one vector."""
    c = config
    if c.decoder == "recurrent":
        return RecurrentDecoder(c.cell, vocabulary, c.decoder_width, c.decoder_depth, pooled_width, c.decoder_dropout)
    if c.decoder == "attentive":
        return AttentiveDecoder(c.cell, vocabulary, c.decoder_width, memory_width, c.decoder_dropout, pooled_width)
    assert c.decoder == "transformer", "a language model is not made afresh"
    return TransformerDecoder(
        vocabulary,
        c.decoder_width,
        c.decoder_depth,
        c.decoder_heads,
        memory_width,
        c.decoder_dropout,
        c.most_words,
        c.text_depth,
    )


def _chosen(tensors: list[Tensor], rows: Tensor | None) -> list[Tensor]:
    return tensors if rows is None else [tensor[rows] for tensor in tensors]


def _grouped(tensors: list[Tensor], layers: int) -> tuple[CellState, ...]:
    """Each layer's tensors together."""
    size = len(tensors) // layers
    return tuple(tuple(tensors[i * size : (i + 1) * size]) for i in range(layers))


def _extended(before: Tensor, new: Tensor, rows: Tensor | None) -> Tensor:
    """Keys or values [T, R', heads, d] of the words so far, of the chosen rows, with the next word's [R, heads, 1, d].

    Choosing rows and adding a word are so one copy and not two, and with words first it is one of whole pieces.
    """
    new = new.permute(2, 0, 1, 3)
    if not len(before):
        return new.contiguous()
    together = before.new_empty(len(before) + 1, *new.shape[1:])
    if rows is None:
        together[:-1] = before
    else:
        torch.index_select(before, 1, rows, out=together[:-1])
    together[-1:] = new
    return together
