"""Text as numbers: byte-level BPE (Sennrich et al. 2016, 1508.07909, over bytes) and word vocabularies.

The `tokenizers` library trains and applies them. Four numbers are the same in every vocabulary: `<pad>` 0, `<start>` 1,
`<end>` 2 and `<unknown>` 3. Text never turns into one of the first three: a caption that reads "<end>" is plain text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from vitrail.errors import UserError

SPECIALS = ("<pad>", "<start>", "<end>", "<unknown>")
PAD, START, END, UNKNOWN = range(4)
WORD = r"\w+(?:['\u2019]\w+)*|[!-/:-@\[-`{-~]|[^\w\s!-/:-@\[-`{-~]+"
"""what is a word: letters, marks and digits with apostrophes inside; one sign of ASCII; a run of other signs"""
SPACE = "\u0120"
"""how byte-level BPE writes a space"""
LEAST_BPE = len(SPECIALS) + 256
"""the specials and every byte, so that any text has numbers"""


class Tokenizer:
    """Text to numbers and back. `train` makes one, `to_json` and `from_json` carry it inside a checkpoint."""

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
        """A vocabulary of at most `size` entries, specials included: a function of the captions alone.

        `lower` makes all text lower case; with it off, BPE gives any text back to the bit.
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
        with _one_thread():
            inner.train_from_iterator(captions, trainer)
        return cls(inner)

    @property
    def size(self) -> int:
        """Entries of the vocabulary, specials included: every number is below it."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Numbers without specials; a word that is not in a word vocabulary is `UNKNOWN`."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the numbers up to the first `END`, without specials."""
        kept = []
        for i in ids:
            if i == END:
                break
            if i not in (PAD, START, UNKNOWN):
                kept.append(i)
        return "".join(self.tokens(kept))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """What each number adds to the text, one string each; joined they are the text, spaces included.

        A character whose bytes lie in several pieces stands at the last of them, and the others are empty. Specials
        have their names.
        """
        if self.kind == "words":
            return [" " * (i > UNKNOWN and place > 0) + self._piece(i) for place, i in enumerate(ids)]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = []
        for i in ids:
            if i <= UNKNOWN:
                # A special ends what stands before it; half a character shows as U+FFFD.
                pieces.append(decoder.decode(b"", final=True) + SPECIALS[i])
                decoder.reset()
            else:
                pieces.append(decoder.decode(bytes(_BYTES[c] for c in self._piece(i))))
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def spaced(self) -> list[int]:
        """Of each number, that of its piece with a space before it, and the number itself where there is none.

        A caption begins without a space, so in byte-level BPE a word has another number there than further on.
        """
        numbers = self.inner.get_vocab() if self.kind == "bpe" else {}
        return [numbers.get(SPACE + self._piece(i), i) for i in range(self.size)]

    @property
    def fingerprint(self) -> str:
        """Of the entries in their order: weights that were learned for one vocabulary are nonsense with another."""
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
            raise UserError(f"a tokenizer of the kind {type(inner.model).__name__} is not one that vitrail trained")
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
    inner.decoder = decoders.ByteLevel()  # for others who read tokenizer.json
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
    """Byte-level BPE writes printable bytes as themselves, and the others in order as the characters from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = (byte for byte in range(256) if chr(byte) not in own)
    return own | dict(zip((c for c in alphabet if c not in own), others, strict=True))


_BYTES = _byte_of_each()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Training on several threads would make the library warn in every loader worker that is forked later."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
