"""Pretrained language models through transformers, with the interface of `decoders.py`.

Our vocabularies all start with `<pad>`, `<start>`, `<end>` and `<unknown>`. So token i of a language model is i + 4
here, except its end token, which is `END`. The rest of the package does not depend on this: for losses, searches and
reports it is one more vocabulary.

Shapes are those of `decoders.py`. transformers is imported when a model is built (`vitrail.hf`, and
`vitrail.zoo.captioners` for pretrained ones).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
import torch
from tokenizers import decoders
from torch import Tensor, nn

from vitrail.data.text import END, SPECIALS, START, Tokenizer
from vitrail.errors import UserError
from vitrail.tasks.caption.decoders import Decoder

OWN = len(SPECIALS)
"""number of our special tokens before the model's tokens"""


@dataclass(frozen=True)
class VocabMap:
    """A language model's vocabulary, and the mapping of its token numbers to ours."""

    size: int
    """number of rows of its embedding"""
    start: int
    """its start token"""
    end: int
    """its end token"""

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.size and 0 <= self.end < self.size):
            raise UserError(f"numbers {self.start} and {self.end} for start and end lie outside of {self.size} words")

    def to_model(self, words: Tensor) -> Tensor:
        """Our token numbers as the model's. Tokens after the end become end tokens, whose outputs are not used."""
        own = words.new_tensor([self.end] * OWN)
        own[START] = self.start
        return torch.where(words < OWN, own[words.clamp(max=OWN - 1)], words - OWN)

    def from_model(self, logits: Tensor) -> Tensor:
        """The model's logits [..., V] as ours [..., V + 4]; tokens that it does not have get -inf."""
        out = logits.new_full((*logits.shape[:-1], OWN + self.size), -torch.inf)
        out[..., OWN:] = logits
        out[..., END] = logits[..., self.end]
        out[..., OWN + self.end] = -torch.inf
        return out


class HFTokenizer(Tokenizer):
    """A language model's tokenizer, of any kind that the tokenizers library supports."""

    def __init__(self, inner: tokenizers.Tokenizer, vocabulary: VocabMap) -> None:
        # A model may have a few more tokens than its tokenizer: embeddings are padded to a round size.
        if not vocabulary.size // 2 <= (known := inner.get_vocab_size()) <= vocabulary.size:
            raise UserError(
                f"the tokenizer has {known} words but its model {vocabulary.size}: they do not belong together"
            )
        if inner.id_to_token(vocabulary.end) is None:
            raise UserError(f"the tokenizer has no word {vocabulary.end}, which is the end token of its model")
        inner.encode_special_tokens = True  # "<|endoftext|>" within a caption is text
        inner.no_padding()
        inner.no_truncation()
        self.inner, self.vocabulary = inner, vocabulary
        self.kind: Literal["bpe", "words"] = "bpe"

    @property
    def size(self) -> int:
        return OWN + self.vocabulary.size

    def encode(self, text: str) -> list[int]:
        """Token numbers without special tokens."""
        ids = self.inner.encode(text, add_special_tokens=False).ids
        return [END if i == self.vocabulary.end else i + OWN for i in ids]

    def spaced(self) -> list[int]:
        """Each token counts as itself, as in transformers' repeated n-grams."""
        return list(range(self.size))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds, one string each; joined they are the whole text.

        Tokenizers join and clean up text in many ways ("do", "n't"), so a piece is the common prefix of the text so far
        and the whole text, without the earlier pieces. Special tokens add nothing.
        """
        theirs = [[i - OWN] if i >= OWN else [] for i in ids]
        whole = self._text(theirs)
        pieces, done = [], 0
        for place in range(1, len(theirs) + 1):
            text = whole if place == len(theirs) else self._text(theirs[:place])
            now = max(done, _shared(text, whole))
            pieces.append(whole[done:now])
            done = now
        return pieces

    def _text(self, rows: Iterable[list[int]]) -> str:
        text = self.inner.decode([i for row in rows for i in row], skip_special_tokens=True)
        if not isinstance(self.inner.decoder, decoders.WordPiece):
            return text
        # Subwords are joined without spaces; like transformers, attach punctuation and contractions to their words.
        return re.sub(r" (?=[.?!,]|n't|'m|'s|'ve|'re)", "", text.replace(" ' ", "'"))

    @classmethod
    def from_text(cls, text: str, vocabulary: VocabMap) -> HFTokenizer:
        """The inverse of `to_json`. The text comes from a file of the user, so invalid text is a UserError."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a plain Exception
            raise UserError(f"the tokenizer cannot be read: {' '.join(str(error).split())}") from None
        return cls(inner, vocabulary)

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:
        return HFTokenizer.from_text, (self.to_json(), self.vocabulary)


def _shared(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class LanguageState:
    """The state between words: transformers' cache, with one row per caption."""

    cache: Any
    """keys and values of the words so far, and of the prefix"""
    length: int = 0
    """number of words read"""
    tokens: Tensor | None = None
    """image tokens [R, M, D], if each step reads them"""

    def chosen(self, rows: Tensor | None) -> LanguageState:
        """The state of these rows [R']. The cache is reordered in place, because no earlier state is used again."""
        if rows is None:
            return self
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        return LanguageState(self.cache, self.length, None if self.tokens is None else self.tokens[rows])


def cache_arguments(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments with which `model` uses `cache` and returns a new one: transformers 5.24 renamed one."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache in a model's output, under the name that the installed transformers uses."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def last_word_attention(layers: Sequence[Tensor]) -> Tensor:
    """Attention of the last word [R, M]: the mean over layers, each [R, heads, T, M], and over their heads."""
    return torch.stack([layer[:, :, -1].float().mean(dim=1) for layer in layers]).mean(dim=0)


TOGETHER = 32
"""images per batch of a search: in transformers' cache each caption has its own copy of the image's keys and values,
which for hundreds of images would exhaust memory"""


class LanguageDecoder(Decoder):
    """A generative model of transformers. Its hidden states are its logits, unless a subclass changes that.

    Tied weights are in the state dict once; they are tied again when weights are loaded.
    """

    images_at_once = TOGETHER

    def __init__(self, model: nn.Module, vocabulary: VocabMap, positions: int) -> None:
        """`positions` is the model's maximum number of words and prefix vectors."""
        super().__init__()
        self.model: Any = model
        self.vocabulary, self.positions, self.max_length = vocabulary, positions, positions
        self.tied = _tied(model)
        state: Any = self  # these methods are untyped
        state.register_state_dict_post_hook(_leave_out_tied)
        state.register_load_state_dict_pre_hook(_fill_in_tied)
        state.register_load_state_dict_post_hook(_tie)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.vocabulary.from_model(hidden)

    def read(self, words: Tensor, before: int = 0) -> Tensor:
        """Our token numbers [R, T] as the model's; `before` tokens precede them."""
        if before + words.shape[1] > self.positions:
            raise UserError(
                f"{words.shape[1]} words after {before} exceed the {self.positions} positions of the model: "
                "lower --most-words and --max-length, or the size of the images"
            )
        return self.vocabulary.to_model(words)


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of tied parameters, with the names of the parameters that they are tied to."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(parameter), name)) != name:
            tied[name] = other
    return tied


def _leave_out_tied(module: LanguageDecoder, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module.tied:
        state.pop(f"{prefix}model.{name}", None)


def _fill_in_tied(module: LanguageDecoder, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, other in module.tied.items():
        if f"{prefix}model.{other}" in state:
            state.setdefault(f"{prefix}model.{name}", state[f"{prefix}model.{other}"])


def _tie(module: LanguageDecoder, keys: Any) -> None:
    for name, other in module.tied.items():
        home, _, last = name.rpartition(".")
        setattr(module.model.get_submodule(home), last, module.model.get_parameter(other))
