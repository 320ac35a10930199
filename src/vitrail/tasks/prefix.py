"""Captions from a pre-trained language model that reads the image as a prefix (ClipCap, arXiv 2111.09734).

`image → encoder → join → M vectors as wide as the language model's words → language model → words`

Encoder and language model come trained. What is between them learns, and the language model with it where that is
wanted. Shapes are those of `decoders.py`, with W for the width of the encoder and D for that of the language model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import gcd
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vitrail.data.decode import Preprocess
from vitrail.data.sets import Splits
from vitrail.errors import UserError
from vitrail.plain import describe
from vitrail.tasks.caption import Caption, Captioning
from vitrail.tasks.caption_scores import check_scorers
from vitrail.tasks.decoders import DecoderState, Memory
from vitrail.tasks.encoder import KINDS, Encoder, pooled_width, token_width
from vitrail.tasks.language import (
    HFTokenizer,
    Language,
    LanguageState,
    VocabMap,
    cache_arguments,
    cache_of,
    in_parts,
)
from vitrail.tasks.search import Decoding, Written
from vitrail.tasks.task import Batch, Settings
from vitrail.vit import Block, Tokens, ViTConfig

HEAD = 64
"""width of a head in the joining Transformer, where the language model's own divides so"""


@dataclass(frozen=True)
class Prefixed(Settings):
    """The language model, how the image reaches it, and what learns: fields of a run."""

    name = "prefix"
    any_encoder = True

    language_model: str = "openai-community/gpt2"
    """a causal language model that transformers loads: a Hub id or a folder"""
    tune_language: bool = False
    """let the language model learn too; else it stays as it is"""
    join: Literal["transformer", "mlp", "projection"] = "transformer"
    """transformer: learned queries read all of the image's tokens, for a frozen language model (section 3.3 of
    ClipCap); mlp: the image's one vector through a hidden layer, for a tuned one (section 3.3); projection: each of
    the image's tokens through one linear layer, so that words can be traced to places"""
    prefix_length: int = 10
    """vectors that stand for the image; with `projection` there are as many as the image has tokens"""
    join_depth: int = 8
    """blocks of the joining Transformer"""
    most_words: int = 40
    """words of a caption at most, its end included"""
    captions: int = 2
    """of each image's captions, how many a step reads"""
    self_critical: float = 0.0
    """weight of the reward, CIDEr, of sampled captions over the mean of the others (1612.00563); 0 for none"""
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        if min(self.prefix_length, self.join_depth, self.captions, self.most_words) < 1:
            raise UserError("prefix_length, join_depth, captions and most_words must be at least 1")

    @property
    def captioning(self) -> Captioning:
        """The same in the terms of captioning. No smoothing: a part would go to words that the model cannot say."""
        return Captioning(
            captions=self.captions,
            most_words=self.most_words,
            self_critical=self.self_critical,
            smoothing=0.0,
            lower=False,
            decoding=self.decoding,
        )


class PrefixCaption(Caption):
    """An encoder, a language model and what joins them. Keys of a batch are those of `Caption`."""

    settings = Prefixed  # type: ignore[assignment]

    def __init__(
        self,
        encoder: Encoder,
        config: Prefixed,
        model: Any,
        numbers: VocabMap,
        tokenizer: HFTokenizer,
        preprocess: Preprocess,
    ) -> None:
        """`model` is a causal language model of transformers."""
        self.description = json.loads(model.config.to_json_string(use_diff=False))
        self.numbers = numbers
        width = model.get_input_embeddings().embedding_dim
        looks = config.join == "projection"
        decoder = LanguageModel(model, numbers, 0 if looks else config.prefix_length, looks)
        super().__init__(encoder, config.captioning, tokenizer, preprocess, decoder)
        self.prefixed = config
        self.join = join_for(config, encoder, width)
        if not config.tune_language:
            # Gradients pass through it to the prefix, and none stays in it.
            decoder.requires_grad_(False)
            self.frozen = [decoder]

    def merge_config(self, config: Any) -> Prefixed:
        """`config` with the language model and the join that are in these weights."""
        if not isinstance(config, Prefixed):
            raise UserError("this captioner has a language model: go on with it by the recipe caption-prefix")
        own = ("language_model", "join", "prefix_length", "join_depth", "tune_language", "most_words")
        return replace(config, **{name: getattr(self.prefixed, name) for name in own})

    def configure(self, config: Any) -> None:
        self.prefixed = self.merge_config(config)
        self.captioning, self.option = self.prefixed.captioning, config.decoding

    @classmethod
    def create(cls, settings: Any, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        """A new join between an encoder and the language model that the settings name."""
        from vitrail.zoo.captioners import language_model

        check_scorers()
        if settings.self_critical:
            raise UserError("self-critical training continues from a captioner: name one with --init")
        return cls(encoder, settings, *language_model(settings.language_model), preprocess)

    def memory(self, images: Tensor, keep: Tensor | None = None) -> Memory:
        """The prefix, [B, M, D], and the image's vector."""
        tokens = self.encoder(images) if keep is None else self.encoder(images, keep)
        pooled = self.pooled(tokens)
        return Memory(self.join(tokens, pooled), pooled)

    def write(self, batch: Batch) -> Written:
        return in_parts(super().write, batch)

    def config(self) -> dict[str, Any]:
        return {
            "encoder": describe(self.encoder.config, KINDS),
            "language": {"transformers": self.description, "numbers": asdict(self.numbers)},
            "prefixed": asdict(replace(self.prefixed, decoding=self.option)),
            "tokenizer": self.tokenizer.fingerprint,
        }


class LanguageModel(Language):
    """A causal language model that reads the prefix, its start and then the words.

    `known` is what it knows after each word, [..., D]; its last layer makes logits of that.
    """

    def __init__(self, model: Any, numbers: VocabMap, prefix: int = 0, looks: bool = False) -> None:
        """`prefix` vectors stand before the words; `looks` says that they are places, with attention worth forming."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        super().__init__(model, numbers, positions)
        self.max_length, self.looks = positions - prefix, looks
        if self.max_length < 2:
            raise UserError(f"the language model has {positions} places: lower --prefix-length from {prefix}")

    @staticmethod
    def check(model: Any, name: str) -> None:
        """Raises UserError for a model that does more to its logits than its last layer, which we would not do."""
        ids = torch.zeros(1, 2, dtype=torch.int64)
        with torch.no_grad():
            own = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
            if not torch.allclose(own, model(input_ids=ids).logits, atol=1e-4):
                raise UserError(f"{name} changes its logits after its last layer: choose another language model")

    def logits(self, hidden: Tensor) -> Tensor:
        return self.numbers.ours(self.model.get_output_embeddings()(hidden))

    def forward(self, words: Tensor, memory: Memory) -> Tensor:
        prefix = memory.tokens
        read = self._embed(words.flatten(0, 1), prefix.shape[1])
        rows = torch.cat([prefix.repeat_interleave(words.shape[1], dim=0), read], dim=1)
        known = self.model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return known[:, prefix.shape[1] :].unflatten(0, words.shape[:2])

    def start(self, memory: Memory, captions: int = 1) -> LanguageState:
        cache = cache_of(self.model.base_model(inputs_embeds=memory.tokens, use_cache=True))
        cache.batch_repeat_interleave(captions)
        return LanguageState([], [], cache=cache, prefix=memory.tokens.shape[1])

    def step(self, words: Tensor, state: DecoderState) -> tuple[Tensor, LanguageState]:
        assert isinstance(state, LanguageState)
        read = self._embed(words[:, None], state.prefix + state.length)
        with self._attention_formed():
            out = self.model.base_model(
                inputs_embeds=read,
                output_attentions=self.looks,
                **cache_arguments(self.model.base_model, state.cache),
            )
        looked = []
        if self.looks and out.attentions:
            layers = [layer[:, :, -1, : state.prefix].float().mean(dim=1) for layer in out.attentions]
            looked = [torch.stack(layers).mean(dim=0)]
        after = LanguageState([], [], state.length + 1, looked, cache_of(out), state.prefix)
        return out.last_hidden_state[:, -1], after

    def _embed(self, words: Tensor, before: int) -> Tensor:
        return self.model.get_input_embeddings()(self.read(words, before))

    @contextmanager
    def _attention_formed(self) -> Iterator[None]:
        """Fused attention never forms its matrix; for a step at a time the other costs little."""
        if not self.looks:
            yield
            return
        fused = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(fused)


class MLPJoin(nn.Module):
    """The image's vector through one hidden layer to all vectors of the prefix at once (section 3.3)."""

    def __init__(self, pooled: int, width: int, length: int) -> None:
        super().__init__()
        hidden = width * length // 2
        self.layers = nn.Sequential(nn.Linear(pooled, hidden), nn.Tanh(), nn.Linear(hidden, width * length))
        self.length = length

    def forward(self, tokens: Tokens, pooled: Tensor) -> Tensor:
        """To [B, M, D]."""
        return self.layers(pooled).unflatten(1, (self.length, -1))


class TransformerJoin(nn.Module):
    """Learned queries stand beside the image's tokens in a Transformer, and what becomes of them is the prefix.

    In section 3.3 they stand beside several projections of CLIP's one vector; all tokens say where things are too.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("queries",)

    def __init__(self, seen: int, width: int, length: int, depth: int) -> None:
        super().__init__()
        heads = gcd(width, max(1, width // HEAD))
        block = ViTConfig(width=width, depth=depth, heads=heads, mlp_ratio=2.0)
        self.project = nn.Linear(seen, width)
        self.queries = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(block) for _ in range(depth))

    def forward(self, tokens: Tokens, pooled: Tensor) -> Tensor:
        """To [B, M, D]."""
        seen = self.project(torch.cat([tokens.prefix, tokens.patches], dim=1))
        x = torch.cat([self.queries.expand(len(seen), -1, -1), seen], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, : len(self.queries)]


class ProjectionJoin(nn.Module):
    """Each of the image's tokens through one linear layer: the prefix has a vector a place."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(seen, width)

    def forward(self, tokens: Tokens, pooled: Tensor) -> Tensor:
        """To [B, P + N, D]."""
        return self.project(torch.cat([tokens.prefix, tokens.patches], dim=1))


def join_for(config: Prefixed, encoder: Encoder, width: int) -> nn.Module:
    """What stands between an encoder and a language model `width` wide."""
    if config.join == "mlp":
        return MLPJoin(pooled_width(encoder.config), width, config.prefix_length)
    if config.join == "transformer":
        return TransformerJoin(token_width(encoder.config), width, config.prefix_length, config.join_depth)
    return ProjectionJoin(token_width(encoder.config), width)
