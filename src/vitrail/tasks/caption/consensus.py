"""Reranks a decoder's captions by the captions of similar training images.

There are no human captions of a new image, but there are of similar images, and a caption that agrees with many of them
is rarely wrong (Devlin et al., arXiv 1505.04467; Mao et al., arXiv 1412.6632, section 8).

    N training images     K captions per image     T words at most     M n-grams     R captions
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.text import END, PAD
from vitrail.errors import UserError

MAX_NGRAM = 4
"""longest n-grams, as in CIDEr"""
NEAREST = 100
"""the similar image whose similarity is an image's `likeness`: a single one may be similar by accident"""
FEWEST = 2
"""minimum number of images per n-gram: an n-gram of a single image is too rare to be useful"""


class Consensus(nn.Module):
    """An index of the training images: their vectors, and the n-grams of their captions.

    The score of a caption is its CIDEr (arXiv 1411.5726, equations 1 to 3, times 10) with the captions of the most
    similar images as references: the mean cosine between the TF-IDF vectors of the caption and of each reference. A
    mean of products is a product with the mean, so each image needs one row for all its captions. No sentence is
    stored. Words are tokens of the vocabulary, as in all decoders. Half precision is enough for ranking.
    """

    vectors: Tensor
    """half [N, D]: unit vectors of the images"""
    codes: Tensor
    """int64 [M], sorted: the n-grams, each encoded as one number"""
    weights: Tensor
    """half [M]: log of N / (number of images with the n-gram)"""
    ends: Tensor
    """int32 [N]: end of each image's n-grams in the next two tensors"""
    places: Tensor
    """int32 [entries]: index of each n-gram in `codes`"""
    shares: Tensor
    """half [entries]: weight of each n-gram in the mean of an image's normalised captions"""

    def __init__(self, images: int, width: int, ngrams: int, entries: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("vectors", torch.zeros(images, width, dtype=torch.half))
        self.register_buffer("codes", torch.zeros(ngrams, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(ngrams, dtype=torch.half))
        self.register_buffer("ends", torch.zeros(images, dtype=torch.int32))
        self.register_buffer("places", torch.zeros(entries, dtype=torch.int32))
        self.register_buffer("shares", torch.zeros(entries, dtype=torch.half))

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that rebuild an index of the same size."""
        images, width = self.vectors.shape
        ngrams, entries = len(self.codes), len(self.places)
        named = {"images": images, "width": width, "ngrams": ngrams, "entries": entries}
        return {**named, "vocabulary": self.vocabulary}

    @classmethod
    def of(cls, vectors: Tensor, labels: Tensor, vocabulary: int) -> Consensus:
        """Build from unit vectors [N, D] and captions [N, K, T] in numbers of a vocabulary of this size."""
        if vocabulary**MAX_NGRAM >= 2**63:
            raise UserError(f"a vocabulary of {vocabulary} is too large for an index of n-grams: at most 55,000")
        vectors, labels = vectors.cpu(), labels.cpu()
        images, each = labels.shape[:2]
        caption, code, count = counted(labels.flatten(0, 1), vocabulary)
        codes, place = code.unique(return_inverse=True)
        image, present = _pairs(caption // each, place, len(codes))
        weights = math.log(images) - torch.bincount(place[present], minlength=len(codes)).log()
        value = shortened(count * weights[place], caption, code, vocabulary)
        captions = (labels[..., 0] != PAD).sum(dim=1)
        shares = torch.zeros(len(present)).index_add_(0, image, value / captions[caption // each])
        image, place = (caption // each)[present], place[present]
        kept = torch.bincount(place, minlength=len(codes)) >= FEWEST
        chosen = kept[place]
        built = cls(images, vectors.shape[1], int(kept.sum()), int(chosen.sum()), vocabulary)
        built.vectors.copy_(vectors)
        built.codes.copy_(codes[kept])
        built.weights.copy_(weights[kept])
        built.ends.copy_(torch.bincount(image[chosen], minlength=images).cumsum(0))
        built.places.copy_((kept.cumsum(0) - 1)[place[chosen]])
        built.shares.copy_(shares[chosen])
        return built

    def forward(self, images: Tensor, captions: Tensor, neighbours: int) -> Tensor:
        """Unit vectors [B, D] of images and captions [B, K, T] of each, to the captions' scores [B, K]."""
        nearest = self._nearest(images, neighbours).indices
        return torch.stack([self._scores(own, like) for own, like in zip(captions, nearest, strict=True)])

    def likeness(self, images: Tensor) -> Tensor:
        """The cosine of each image [B, D] with the 100th most similar training image (or the last of fewer), [B]."""
        return self._nearest(images, NEAREST).values[:, -1]

    def _nearest(self, images: Tensor, count: int) -> torch.return_types.topk:
        with torch.autocast(images.device.type, enabled=False):  # bf16 cannot distinguish the nearest neighbours
            cosines = images.float() @ self.vectors.float().T
        return cosines.topk(min(count, len(self.vectors)), dim=1)

    def _scores(self, captions: Tensor, images: Tensor) -> Tensor:
        """Scores [R] of captions [R, T], with the captions of these training images as references."""
        common = torch.zeros(len(self.codes), device=captions.device)
        begin, end = F.pad(self.ends, (1, 0))[images], self.ends[images]
        lengths = end - begin
        rows = torch.arange(int(lengths.sum()), device=captions.device)
        rows += (end - lengths.cumsum(0)).repeat_interleave(lengths)  # the rows of one image after those of another
        common.index_add_(0, self.places[rows], self.shares[rows].float())
        caption, code, count = counted(captions, self.vocabulary)
        if not len(self.codes):
            return torch.zeros(len(captions), device=captions.device)
        place = torch.searchsorted(self.codes, code).clamp(max=len(self.codes) - 1)
        known = self.codes[place] == code
        weight = torch.where(known, self.weights[place].float(), math.log(len(self.vectors)))
        value = shortened(count * weight, caption, code, self.vocabulary) * common[place] * known
        scores = torch.zeros(len(captions), device=captions.device).index_add_(0, caption, value)
        return 10 / MAX_NGRAM / len(images) * scores


def counted(captions: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct n-grams of captions [R, T]: the caption's row, the n-gram as one number, its count."""
    words = captions.masked_fill(captions == END, PAD)
    owners, codes = [], []
    code = torch.zeros_like(words)
    for size in range(1, min(MAX_NGRAM, words.shape[1]) + 1):
        code = code[:, : words.shape[1] - size + 1] * vocabulary + words[:, size - 1 :]
        there = words[:, size - 1 :] != PAD
        owners.append(there.nonzero()[:, 0])
        codes.append(code[there])
    different, place = torch.cat(codes).unique(return_inverse=True)
    row, count = (torch.cat(owners) * len(different) + place).unique(return_counts=True)
    return row // max(len(different), 1), different[row % max(len(different), 1)], count


def shortened(values: Tensor, caption: Tensor, code: Tensor, vocabulary: int) -> Tensor:
    """Values of the captions' n-grams, normalised to length 1 per caption and n-gram order."""
    words = torch.ones_like(code)
    for size in range(1, MAX_NGRAM):
        words += code >= vocabulary**size
    group = caption * MAX_NGRAM + words - 1
    squares = torch.zeros(int(group.max()) + 1 if len(group) else 0, device=values.device)
    squares.index_add_(0, group, values**2)
    return values / squares.sqrt().clamp(min=1e-9)[group]


def _pairs(first: Tensor, second: Tensor, seconds: int) -> tuple[Tensor, Tensor]:
    """For pairs of numbers: the index of each among the distinct pairs, and a position of each distinct pair."""
    different, which = (first * seconds + second).unique(return_inverse=True)
    where = torch.empty_like(different).scatter_(0, which, torch.arange(len(which)))
    return which, where
