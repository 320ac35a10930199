"""Caption decoders: recurrent, with and without attention, and Transformer, all with one interface.

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
    """The image features that a decoder reads, for B images."""

    tokens: Tensor
    """[B, M, D]"""
    pooled: Tensor
    """[B, D]"""


class State(NamedTuple):
    """The state of a decoder between words. A search with several captions per image never copies `image`."""

    words: list[Tensor]
    """tensors for the words so far: one entry per row"""
    image: list[Tensor]
    """tensors of the images: each [B, ...]"""


class Step(NamedTuple):
    """The result of one decoding step."""

    logits: Tensor
    """logits [R, V] of the next word"""
    attention: Tensor | None
    """attention over the image's tokens [R, M], mean over layers and heads; None for a decoder without attention"""
    state: Any
    """a `State`, or a decoder's own type"""


class Decoder(nn.Module):
    """Words and images in, logits of the next words out.

    Everything goes through `__call__`, so that hooks on calls (FSDP's) always run. The arguments select the operation:

    - `words` [B, K, T] and `memory`: logits of the word after each, [B, K, T, V], or [n, V] for the n positions that
    are True in `counted` [B, K, T] (teacher forcing)
    - `memory`: the state before the first word, with one row per image
    - `words` [R] and `state`: a `Step`; row r continues row `rows[r]` of the state, or row r without `rows`
    - `words` [R, T]: hidden states [R, T, D] of the layers that read only text, if there are any
    """

    max_length: int | None = None
    """maximum caption length, if the decoder has its own limit"""
    images_at_once: int | None = None
    """maximum number of images per batch of a search, if more would need too much memory"""
    frozen: Sequence[nn.Module] = ()
    """modules that are not trained"""

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
        if counted is not None:
            hidden = hidden[counted]
        return self._logits(hidden)

    def within_limit(self, max_length: int) -> int:
        """`max_length`, or the decoder's own limit if that is lower."""
        return min(max_length, self.max_length or max_length)

    def description(self) -> dict[str, Any]:
        """What `config.json` needs besides the settings to rebuild the decoder."""
        return {}

    def init_word_bias(self, logits: Tensor) -> None:
        """Initialise the output bias with these logits [V], which give the word frequencies."""

    @abstractmethod
    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        """Words [B, K, T] to the hidden states after each word, [B, K, T, D]."""

    @abstractmethod
    def _start(self, memory: Memory) -> Any:
        """The state before the first word, with one row per image."""

    @abstractmethod
    def _step(self, words: Tensor, rows: Tensor | None, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        """The next word of each caption, [R], to the hidden states after it [R, D], attention and new state."""

    @abstractmethod
    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V]."""

    def _words_alone(self, words: Tensor) -> Tensor:
        raise UserError("this decoder has no text-only layers: train caption-match for such a decoder")


class WordDecoder(Decoder):
    """A decoder with a learned embedding of its own vocabulary."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        # Input and output embeddings are tied (arXiv 1608.05859). This scale gives input vectors a norm of about 1.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def init_word_bias(self, logits: Tensor) -> None:
        self.bias.data.copy_(logits)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight, self.bias)


class RecurrentDecoder(WordDecoder):
    """Show and Tell (arXiv 1411.4555): a recurrent network reads the image as its first input, then the words."""

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
    """Show, Attend and Tell (arXiv 1502.03044), with soft attention over the image before each word.

    e_i = v . tanh(W a_i + U h), weights softmax(e) (equations 4 and 5); the weighted mean of V a_i, times a gate
    computed from the state (section 4.2.1), is read together with the word. Differences from the paper: the tokens a_i
    are projected by V, the gate has one number per channel instead of one, and the sum of equation 7 goes through a
    tanh.
    """

    def __init__(
        self, cell: str, vocabulary: int, width: int, memory_width: int, dropout: float, pooled_width: int | None = None
    ) -> None:
        """`pooled_width` is the width of the pooled image vector, if it differs from the tokens'."""
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
        queries = self.query(before[0]).view(keys.shape[0], -1, 1, self.width)
        weights = self.score(torch.tanh(keys[:, None] + queries)).squeeze(-1).softmax(dim=-1)  # [B, K, M]
        seen = (weights @ values).flatten(0, 1) * torch.sigmoid(self.gate(before[0]))
        read = self.dropout(self.embedding(words) * self.width**0.5)
        after = self.cell(torch.cat([read, seen], dim=1), before)
        # The deep output of equation 7: word, state and attended features predict the next word together.
        hidden = torch.tanh(self.out(self.dropout(torch.cat([read, after[0], seen], dim=1))))
        return self.dropout(hidden), weights.flatten(0, 1), State(list(after), state.image)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the image, and an MLP, each with pre-norm and a residual path.

    Without `look` there is no cross-attention, as in the lower half of CoCa's decoder (arXiv 2205.01917). As in
    `Decoder`, the arguments select the operation:

    - `x` [R, T, D], whole captions, and the image's `tokens` [B, M, D]: [R, T, D], with causal masking
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
            # All captions of an image query the same keys, which are not copied.
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
            images, (count, length, width) = image[0].shape[0], x.shape
            (q,) = self.look.project(self.norm2(x).view(images, -1, width), 0, 1)
            # For few words this is as fast as fused attention, which never computes the matrix.
            matrix = attention_weights(q, image[0])
            weights = matrix.transpose(1, 2).reshape(count, self.look.heads, -1)
            seen = (matrix @ image[1]).transpose(1, 2).reshape(count, length, width)
            x = x + self.dropout(self.look.out(seen))
        return x + self.dropout(self.mlp(self.norm3(x))), past, weights


class TransformerDecoder(WordDecoder):
    """The decoder of *Attention is all you need* (arXiv 1706.03762) with pre-norm, over the image's tokens."""

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
        """The first `text_depth` of the `depth` blocks read only text; `max_length` limits a caption."""
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
            # Contiguous in the order in which each step reads them, which is several times as fast.
            image += [keys.mT.contiguous().mT, values.contiguous()]
        empty = tokens.new_empty(0, tokens.shape[0], self.heads, self.width // self.heads)
        return State([empty] * (2 * len(self.blocks)), image)

    @torch.no_grad()
    def _step(self, words: Tensor, rows: Tensor | None, state: State) -> tuple[Tensor, Tensor, State]:
        """`state.words` holds each block's keys and values of the words so far, [T, R, heads, d]."""
        x = self._embed(words[:, None], state.words[0].shape[0])
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
            raise UserError(f"a caption of {last} words exceeds the model's limit of {len(self.positions)}")
        return self.dropout(self.embedding(words) * self.width**0.5 + self.positions[first:last])


def decoder_for(config: Captioning, vocabulary: int, memory_width: int, pooled_width: int) -> Decoder:
    """A new decoder with its own vocabulary, for an image's tokens and its pooled vector."""
    c = config
    if c.decoder == "recurrent":
        return RecurrentDecoder(c.cell, vocabulary, c.decoder_width, c.decoder_depth, pooled_width, c.decoder_dropout)
    if c.decoder == "attentive":
        return AttentiveDecoder(c.cell, vocabulary, c.decoder_width, memory_width, c.decoder_dropout, pooled_width)
    assert c.decoder == "transformer", "a language model is not built from scratch"
    shape = (c.decoder_width, c.decoder_depth, c.decoder_heads, memory_width, c.decoder_dropout)
    return TransformerDecoder(vocabulary, *shape, c.most_words, c.text_depth)


def _chosen(tensors: list[Tensor], rows: Tensor | None) -> list[Tensor]:
    return tensors if rows is None else [tensor[rows] for tensor in tensors]


def _grouped(tensors: list[Tensor], layers: int) -> tuple[CellState, ...]:
    """The tensors of all layers, stacked."""
    size = len(tensors) // layers
    return tuple(tuple(tensors[i * size : (i + 1) * size]) for i in range(layers))


def _extended(before: Tensor, new: Tensor, rows: Tensor | None) -> Tensor:
    """Keys or values [T, R', heads, d] of the words so far, for the chosen rows, with the next word's [R, heads, 1, d].

    Choosing rows and appending is one copy instead of two, and with words as the first axis it copies whole blocks.
    """
    new = new.permute(2, 0, 1, 3)
    if isinstance(before.shape[0], torch.SymInt):  # an export, where any number of words come before
        return torch.cat([before if rows is None else before[:, rows], new])
    if not len(before):
        return new.contiguous()
    together = before.new_empty(len(before) + 1, *new.shape[1:])
    if rows is None:
        together[:-1] = before
    else:
        torch.index_select(before, 1, rows, out=together[:-1])
    together[-1:] = new
    return together
