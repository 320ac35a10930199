"""CIDEr-D of single captions: the reward of self-critical training."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
Ngram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The fixed tokenisation: lower case, `[a-z0-9']+`. Text in other alphabets has no words."""
    return re.findall(r"[a-z0-9']+", text.lower())


class Cider:
    """CIDEr-D (arXiv 1411.5726, sections 5 and 6) of single captions, a reward for training (arXiv 1612.00563).

    Document frequencies of n-grams are counted once, from the references. The mean over all images equals
    pycocoevalcap's `Cider`: the variant with clipped counts, a Gaussian penalty on the difference in length, and no
    stemming, times 10.
    """

    SIGMA = 6.0
    """standard deviation of the length penalty, in words"""

    def __init__(self, references: Mapping[Key, Sequence[str]], kept: int = 20_000, ends: bool = False) -> None:
        """`references` per image, by any key; the vectors of the `kept` most recently used images are cached.

        With `ends`, the end of a caption counts as a word. Self-critical training needs it: without it, "a man in a"
        scores as high as the whole sentence.
        """
        self.ends = ends
        self.references = {key: [self._words(text) for text in texts] for key, texts in references.items()}
        counts: Counter[Ngram] = Counter()
        for texts in self.references.values():
            counts.update({ngram for text in texts for ngram in ngrams(text)})
        self.most = math.log(len(self.references)) if self.references else 0.0
        """the weight of an n-gram that is in no reference"""
        self.weights = {ngram: self.most - math.log(count) for ngram, count in counts.items()}
        self._vectors: Callable[[Any], list[_Vector]] = lru_cache(kept)(
            lambda key: [self._vector(text) for text in self.references[key]]
        )

    def __call__(self, key: Hashable, caption: str, ended: bool = True) -> float:
        """The score of one caption of the image `key`; `ended` is False for a truncated caption."""
        vector = self._vector(self._words(caption, ended))
        expected = self._vectors(key)
        return 10 * sum(self._similarity(vector, other) for other in expected) / len(expected)

    def rewards(
        self, keys: Iterable[Hashable], captions: Iterable[str], ended: Iterable[bool] | None = None
    ) -> list[float]:
        """The scores of captions, each with the key of its image; without `ended`, none is truncated."""
        captions = list(captions)
        marks = [True] * len(captions) if ended is None else ended
        return [self(key, caption, end) for key, caption, end in zip(keys, captions, marks, strict=True)]

    def _words(self, text: str, ended: bool = True) -> list[str]:
        return words(text) + ["<end>"] * (self.ends and ended)

    def _vector(self, text: list[str]) -> _Vector:
        weights: dict[Ngram, float] = {}
        squares = [0.0] * 4
        for ngram, count in ngrams(text).items():
            weights[ngram] = weight = count * self.weights.get(ngram, self.most)
            squares[len(ngram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares], max(len(text) - 1, 0)

    def _similarity(self, a: _Vector, b: _Vector) -> float:
        """Equation 4 of the paper with clipping, averaged over 1- to 4-grams."""
        products = [0.0] * 4
        (weights, norms, length), (others, other_norms, other_length) = a, b
        for ngram, weight in weights.items():
            other = others.get(ngram)
            if other is not None:
                products[len(ngram) - 1] += min(weight, other) * other
        cosine = sum(
            product / (norm * other_norm)
            for product, norm, other_norm in zip(products, norms, other_norms, strict=True)
            if norm and other_norm
        )
        return cosine / 4 * math.exp(-((length - other_length) ** 2) / (2 * self.SIGMA**2))


_Vector = tuple[dict[Ngram, float], list[float], int]
"""weights of n-grams, the norms of its 1- to 4-grams, and its number of 2-grams, which the scorer uses as its length"""


def ngrams(text: list[str]) -> Counter[Ngram]:
    return Counter(tuple(text[i : i + n]) for n in range(1, 5) for i in range(len(text) - n + 1))
