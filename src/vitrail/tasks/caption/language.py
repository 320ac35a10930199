"""Language models of other makers, through transformers, behind the interface of `decoders.py`.

Their vocabularies have numbers of their own, and ours all begin with `<pad>`, `<start>`, `<end>` and `<unknown>`. So
number i of theirs is i + 4 here, but for the one that ends a text, which is `END`. Nothing else in the package has to
know of it: losses, searches and reports see one more vocabulary.

Shapes are those of `decoders.py`. transformers is imported where a model is made (`vitrail.hf`, and
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
"""numbers that stand before theirs"""


@dataclass(frozen=True)
class VocabMap:
    """A language model's own vocabulary, and how its numbers map to ours."""

    size: int
    """rows of its embedding"""
    start: int
    """what it reads before the first word"""
    end: int
    """what closes a text"""

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.size and 0 <= self.end < self.size):
            raise UserError(f"numbers {self.start} and {self.end} for start and end lie outside of {self.size} words")

    def to_model(self, words: Tensor) -> Tensor:
        """Our numbers as theirs. What follows an end is read as one more, and nobody looks at what comes of it."""
        own = words.new_tensor([self.end] * OWN)
        own[START] = self.start
        return torch.where(words < OWN, own[words.clamp(max=OWN - 1)], words - OWN)

    def from_model(self, logits: Tensor) -> Tensor:
        """Their logits [..., V] as ours [..., V + 4]; what they can't say is ruled out."""
        out = logits.new_full((*logits.shape[:-1], OWN + self.size), -torch.inf)
        out[..., OWN:] = logits
        out[..., END] = logits[..., self.end]
        out[..., OWN + self.end] = -torch.inf
        return out


class HFTokenizer(Tokenizer):
    """A language model's own tokenizer, of whatever kind the tokenizers library knows."""

    def __init__(self, inner: tokenizers.Tokenizer, vocabulary: VocabMap) -> None:
        # Models have a few numbers more than their tokenizer has words: rows are filled up to a round count.
        if not vocabulary.size // 2 <= (known := inner.get_vocab_size()) <= vocabulary.size:
            raise UserError(
                f"the tokenizer has {known} words and its model {vocabulary.size}: they are not of one kind"
            )
        if inner.id_to_token(vocabulary.end) is None:
            raise UserError(f"the tokenizer has no word {vocabulary.end}, which ends a text of its model")
        inner.encode_special_tokens = True  # "<|endoftext|>" within a caption is text
        inner.no_padding()
        inner.no_truncation()
        self.inner, self.vocabulary = inner, vocabulary
        self.kind: Literal["bpe", "words"] = "bpe"

    @property
    def size(self) -> int:
        return OWN + self.vocabulary.size

    def encode(self, text: str) -> list[int]:
        """Numbers without specials."""
        ids = self.inner.encode(text, add_special_tokens=False).ids
        return [END if i == self.vocabulary.end else i + OWN for i in ids]

    def spaced(self) -> list[int]:
        """Each number is itself alone, as transformers counts repeats."""
        return list(range(self.size))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """What each number adds to the text, one string each; joined they are the text.

        Tokenizers join and clean up in many ways ("do", "n't"), so a piece is what the text up to it has in common with
        the whole beyond the pieces before. Specials add nothing.
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
        # Pieces of words lose the spaces between them; transformers puts signs and short forms back to their words.
        return re.sub(r" (?=[.?!,]|n't|'m|'s|'ve|'re)", "", text.replace(" ' ", "'"))

    @classmethod
    def from_text(cls, text: str, vocabulary: VocabMap) -> HFTokenizer:
        """The inverse of `to_json`. The text is a file from outside, so a wrong one is a UserError."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"the tokenizer cannot be read: {' '.join(str(error).split())}") from None
        return cls(inner, vocabulary)

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:
        return HFTokenizer.from_text, (self.to_json(), self.vocabulary)


def _shared(a: str, b: str) -> int:
    """How many first characters two texts have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class LanguageState:
    """What is kept between words: transformers' own cache, which has one row per caption."""

    cache: Any
    """keys and values of the words so far, and of what stands before them"""
    length: int = 0
    """words read"""
    tokens: Tensor | None = None
    """of the images [R, M, D], where each step reads them"""

    def chosen(self, rows: Tensor | None) -> LanguageState:
        """The state of these rows [R']. The cache is reordered in place: nobody comes back to an earlier state."""
        if rows is None:
            return self
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        return LanguageState(self.cache, self.length, None if self.tokens is None else self.tokens[rows])


def cache_arguments(model: Any, cache: Any) -> dict[str, Any]:
    """What `model` is called with to read `cache` and to give a new one: transformers 5.24 renamed the argument."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache that a model gave with its output, under whichever name the release of transformers has."""
    return output["cache"] if "cache" in output else output["past_key_values"]


TOGETHER = 32
"""images written of at once: in transformers' cache each caption has the image's keys and values for itself, which
for a batch of hundreds would fill the memory"""


class LanguageDecoder(Decoder):
    """A model of transformers that writes. Its hidden states are its logits, unless a kind says otherwise.

    In its state no weight stands twice: one that is tied to another is left out and tied again when weights are read.
    """

    images_at_once = TOGETHER

    def __init__(self, model: nn.Module, vocabulary: VocabMap, positions: int) -> None:
        """`positions` is how many words, and vectors that stand before them, the model has places for."""
        super().__init__()
        self.model: Any = model
        self.vocabulary, self.positions, self.max_length = vocabulary, positions, positions
        self.tied = _tied(model)
        state: Any = self  # these methods have no types
        state.register_state_dict_post_hook(_leave_out_tied)
        state.register_load_state_dict_pre_hook(_fill_in_tied)
        state.register_load_state_dict_post_hook(_tie)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.vocabulary.from_model(hidden)

    def read(self, words: Tensor, before: int = 0) -> Tensor:
        """Our numbers [R, T] as the model's, after `before` others."""
        if before + words.shape[1] > self.positions:
            raise UserError(
                f"{words.shape[1]} words after {before} are more than the {self.positions} places that the model has: "
                "lower --most-words and --max-length, or the size of the images"
            )
        return self.vocabulary.to_model(words)


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are others, with the names of those."""
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
