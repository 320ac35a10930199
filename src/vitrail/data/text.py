"""Tokenizers: byte-level BPE (Sennrich et al. 2016, 1508.07909, over bytes) and word vocabularies.

The `tokenizers` library trains and applies them. Four ids are the same in every vocabulary: `<pad>` 0, `<start>` 1,
`<end>` 2 and `<unknown>` 3. Text is never encoded as one of the first three: "<end>" in a caption is plain text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from vitrail.errors import UserError
from vitrail.process import environment

SPECIALS = ("<pad>", "<start>", "<end>", "<unknown>")
PAD, START, END, UNKNOWN = range(4)
WORD = r"\w+(?:['\u2019]\w+)*|[!-/:-@\[-`{-~]|[^\w\s!-/:-@\[-`{-~]+"
"""a word: letters, marks and digits with apostrophes inside; one ASCII punctuation mark; a run of other symbols"""
SPACE = "\u0120"
"""a space in byte-level BPE"""
LEAST_BPE = len(SPECIALS) + 256
"""the special tokens and every byte, so that any text can be encoded"""


class Tokenizer:
    """Text to token ids and back. `train` creates one; `to_json` and `from_json` store it in a checkpoint."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        if [inner.id_to_token(i) for i in range(4)] != list(SPECIALS):
            raise UserError(f"the tokenizer does not begin with {', '.join(SPECIALS)}: use one that vitrail trained")
        inner.encode_special_tokens = True  # "<end>" within a caption is text
        self.inner = inner
        self.kind: Literal["bpe", "words"] = "bpe" if isinstance(inner.model, models.BPE) else "words"

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        kind: Literal["bpe", "words"] = "bpe",
        size: int = 4096,
        *,
        lower: bool = False,
    ) -> Tokenizer:
        """Train a vocabulary of at most `size` entries, special tokens included. It depends on the captions alone.

        `lower` converts all text to lower case; without it, BPE decodes any text exactly.
        """
        captions = list(captions)
        if not any(caption.strip() for caption in captions):
            raise UserError("there are no captions to train a tokenizer on")
        least = LEAST_BPE if kind == "bpe" else len(SPECIALS) + 1
        if size < least:
            raise UserError(f"a vocabulary of {size} is too small: with {kind} it has at least {least} entries")
        inner, trainer = _bpe(size) if kind == "bpe" else _words(size)
        if lower:
            inner.normalizer = normalizers.Lowercase()
        # On one thread: otherwise the library would warn in every loader worker that is forked later.
        with environment("TOKENIZERS_PARALLELISM", "false"):
            inner.train_from_iterator(captions, trainer)
        return cls(inner)

    @property
    def size(self) -> int:
        """Entries of the vocabulary, special tokens included: every id is below it."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens; a word that is not in a word vocabulary is `UNKNOWN`."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the first `END`, without special tokens."""
        kept = []
        for i in ids:
            if i == END:
                break
            if i not in (PAD, START, UNKNOWN):
                kept.append(i)
        return "".join(self.tokens(kept))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, one string each; joined they are the text, spaces included.

        A character whose bytes are in several tokens belongs to the last of them, and the others are empty. Special
        tokens have their names.
        """
        if self.kind == "words":
            return [" " * (i > UNKNOWN and place > 0) + self._piece(i) for place, i in enumerate(ids)]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = []
        for i in ids:
            if i <= UNKNOWN:
                # A special token ends the text before it; an incomplete character becomes U+FFFD.
                pieces.append(decoder.decode(b"", final=True) + SPECIALS[i])
                decoder.reset()
            else:
                pieces.append(decoder.decode(bytes(_BYTES[c] for c in self._piece(i))))
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def spaced(self) -> list[int]:
        """For each id the id of its token with a leading space, or the id itself if there is none.

        A caption begins without a space, so in byte-level BPE its first word has another id than the same word later.
        """
        numbers = self.inner.get_vocab() if self.kind == "bpe" else {}
        return [numbers.get(SPACE + self._piece(i), i) for i in range(self.size)]

    @property
    def fingerprint(self) -> str:
        """A hash of the entries in order: weights that were trained with one vocabulary are useless with another."""
        entries = json.dumps([self.inner.id_to_token(i) for i in range(self.inner.get_vocab_size())])
        return hashlib.blake2b(entries.encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        """The content of a checkpoint's `tokenizer.json`, in the format of the `tokenizers` library."""
        return self.inner.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of `to_json`. The text is a file from outside, so a wrong one is a UserError."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"the tokenizer cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(inner.model, models.BPE | models.WordLevel):
            raise UserError(
                f"a tokenizer of type {type(inner.model).__name__} cannot be read: use one that vitrail trained"
            )
        return cls(inner)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Tokenizer.from_json, (self.to_json(),)

    def _piece(self, i: int) -> str:
        piece = self.inner.id_to_token(i)
        if piece is None:
            raise ValueError(f"{i} is not in a vocabulary of {self.size}")
        return piece


def _bpe(size: int) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()  # for other readers of tokenizer.json
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return inner, trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )


def _words(size: int) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token=SPECIALS[UNKNOWN]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    return inner, trainers.WordLevelTrainer(
        vocab_size=size, min_frequency=1, special_tokens=list(SPECIALS), show_progress=False
    )


def _byte_of_each() -> dict[str, int]:
    """The byte of each character of byte-level BPE: printable bytes are themselves, others count from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = (byte for byte in range(256) if chr(byte) not in own)
    return own | dict(zip((c for c in alphabet if c not in own), others, strict=True))


_BYTES = _byte_of_each()
