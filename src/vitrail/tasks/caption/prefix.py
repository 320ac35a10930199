"""A caption decoder with a pretrained language model that reads the image as a prefix (ClipCap, arXiv 2111.09734).

`image → encoder → join → M vectors as wide as the language model's words → language model → words`

Encoder and language model are pretrained. The mapping between them is trained, and optionally the language model.
Shapes are those of `decoders.py`, with W for the width of the encoder and D for that of the language model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.tasks.caption.decoders import Memory
from vitrail.tasks.caption.language import (
    HFTokenizer,
    LanguageDecoder,
    LanguageState,
    VocabMap,
    cache_arguments,
    cache_of,
    last_word_attention,
)
from vitrail.tasks.caption.settings import LanguageSettings
from vitrail.tasks.encoder import EncoderConfig, pooled_width, token_width
from vitrail.vit import Block, ViTConfig

HEAD = 64
"""head width of the mapping Transformer, if it divides the language model's width"""


class PrefixDecoder(LanguageDecoder):
    """A causal language model that reads the prefix, its start token and then the words.

    Hidden states are those of the model, [..., D]; its last layer maps them to logits.
    """

    def __init__(self, model: Any, vocabulary: VocabMap, settings: LanguageSettings, encoder: EncoderConfig) -> None:
        """`model` is a causal language model of transformers, `encoder` the config of the image encoder."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        super().__init__(model, vocabulary, positions)
        self.transformers = json.loads(model.config.to_json_string(use_diff=False))
        self.has_places = settings.join == "projection"
        self.max_length = positions - (0 if self.has_places else settings.prefix_length)
        if self.max_length < 2:
            raise UserError(
                f"the language model has {positions} positions: lower --prefix-length from {settings.prefix_length}"
            )
        if not settings.tune_language:
            # Gradients pass through it to the prefix; its own weights get none.
            model.requires_grad_(False)
            self.frozen = [model]
        self.join = join_for(settings, encoder, model.get_input_embeddings().embedding_dim)

    @staticmethod
    def check(model: Any, name: str) -> None:
        """Raises UserError for a model that changes its logits after the last layer, which we do not reproduce."""
        ids = torch.zeros(1, 2, dtype=torch.int64)
        with torch.no_grad():
            own = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
            if not torch.allclose(own, model(input_ids=ids).logits, atol=1e-4):
                raise UserError(f"{name} changes its logits after its last layer: choose another language model")

    def description(self) -> dict[str, Any]:
        return {"language_model": {"transformers": self.transformers, "vocabulary": asdict(self.vocabulary)}}

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.vocabulary.from_model(self.model.get_output_embeddings()(hidden))

    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        prefix = self.join(memory)
        read = self._embed(words.flatten(0, 1), prefix.shape[1])
        rows = torch.cat([prefix.repeat_interleave(words.shape[1], dim=0), read], dim=1)
        hidden = self.model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return hidden[:, prefix.shape[1] :].unflatten(0, words.shape[:2])

    def _start(self, memory: Memory) -> LanguageState:
        return LanguageState(cache_of(self.model.base_model(inputs_embeds=self.join(memory), use_cache=True)))

    def _step(
        self, words: Tensor, rows: Tensor | None, state: LanguageState
    ) -> tuple[Tensor, Tensor | None, LanguageState]:
        state = state.chosen(rows)
        read = self._embed(words[:, None], state.cache.get_seq_length())
        with self._attention_formed():
            out = self.model.base_model(
                inputs_embeds=read,
                output_attentions=self.has_places,
                **cache_arguments(self.model.base_model, state.cache),
            )
        attention = None
        if self.has_places and out.attentions:
            # All positions before the words, including the current one, belong to the image.
            attention = last_word_attention(out.attentions)[:, : -(state.length + 1)]
        return out.last_hidden_state[:, -1], attention, LanguageState(cache_of(out), state.length + 1)

    def _embed(self, words: Tensor, before: int) -> Tensor:
        return self.model.get_input_embeddings()(self.read(words, before))

    @contextmanager
    def _attention_formed(self) -> Iterator[None]:
        """Fused attention never computes the matrix; for one word at a time the explicit one costs little."""
        if not self.has_places:
            yield
            return
        fused = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(fused)


class MLPJoin(nn.Module):
    """Maps the image vector through one hidden layer to all prefix vectors (section 3.3)."""

    def __init__(self, pooled: int, width: int, length: int) -> None:
        super().__init__()
        hidden = width * length // 2
        self.layers = nn.Sequential(nn.Linear(pooled, hidden), nn.Tanh(), nn.Linear(hidden, width * length))
        self.length = length

    def forward(self, memory: Memory) -> Tensor:
        """To [B, M, D]."""
        return self.layers(memory.pooled).unflatten(1, (self.length, -1))


class TransformerJoin(nn.Module):
    """A Transformer over learned queries and the image tokens; the outputs of the queries are the prefix.

    In section 3.3 the queries come with several projections of CLIP's single vector; all tokens keep spatial
    information.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("queries",)

    def __init__(self, seen: int, width: int, length: int, depth: int) -> None:
        super().__init__()
        heads = gcd(width, max(1, width // HEAD))
        block = ViTConfig(width=width, depth=depth, heads=heads, mlp_ratio=2.0)
        self.project = nn.Linear(seen, width)
        self.queries = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(block) for _ in range(depth))

    def forward(self, memory: Memory) -> Tensor:
        """To [B, M, D]."""
        seen = self.project(memory.tokens)
        x = torch.cat([self.queries.expand(seen.shape[0], -1, -1), seen], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, : len(self.queries)]


class ProjectionJoin(nn.Module):
    """Each image token through one linear layer: the prefix has one vector per token."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(seen, width)

    def forward(self, memory: Memory) -> Tensor:
        """To [B, P + N, D]."""
        return self.project(memory.tokens)


def join_for(settings: LanguageSettings, encoder: EncoderConfig, width: int) -> nn.Module:
    """The mapping from an encoder to a language model of width `width`."""
    if settings.join == "mlp":
        return MLPJoin(pooled_width(encoder), width, settings.prefix_length)
    if settings.join == "transformer":
        return TransformerJoin(token_width(encoder), width, settings.prefix_length, settings.join_depth)
    return ProjectionJoin(token_width(encoder), width)


def pretrained(source: str) -> tuple[Any, VocabMap, HFTokenizer]:
    """The language model of a Hub id or folder, its vocabulary and its tokenizer.

    The only place where a task imports `zoo`, which reads files: only these settings name another checkpoint.
    """
    from vitrail.zoo.captioners import language_model

    return language_model(source)
