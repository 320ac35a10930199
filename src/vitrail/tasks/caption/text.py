"""Captions as numbers, and the tokenizer of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.text import END, PAD, START, Tokenizer
from vitrail.errors import UserError
from vitrail.tasks.values import Checkpoint

Words = TypeVar("Words", bound=Tokenizer)


def stored_tokenizer(config: dict[str, Any], files: Checkpoint, read: Callable[[str], Words]) -> Words:
    """The tokenizer of a checkpoint. UserError if it belongs to another one, because captions would be nonsense."""
    path = files.path / "tokenizer.json"
    try:
        tokenizer = read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: it is missing or damaged, but needed for captions") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    rows = files.shapes.get("decoder.bias", (tokenizer.size,))[0]
    if tokenizer.size != rows:
        raise UserError(f"{path} has {tokenizer.size} entries, but the weights have {rows}: restore the original file")
    if config.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{path} belongs to another checkpoint, with other words: restore the original file")
    return tokenizer


def numbered(captions: Sequence[Sequence[str]], tokenizer: Tokenizer, max_length: int) -> Tensor:
    """Captions of images as int64 [N, K, T] (see `Caption`): the first `max_length` tokens, including the end token."""
    rows = [[[*tokenizer.encode(text), END][:max_length] for text in texts] for texts in captions]
    most = max((len(texts) for texts in rows), default=1)
    length = max((len(text) for texts in rows for text in texts), default=1)
    table = torch.full((len(rows), most, length), PAD)
    for i, texts in enumerate(rows):
        for k, text in enumerate(texts):
            table[i, k, : len(text)] = torch.tensor(text)
    return table


def words_before(words: Tensor) -> Tensor:
    """The input words for captions [..., T]: the start token, then the words without the end token."""
    read = F.pad(words[..., :-1], (1, 0), value=START)
    return read.masked_fill(read == END, PAD)
