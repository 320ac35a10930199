"""What people said of similar images, to choose by it among the captions that a decoder found.

Nobody has written about a new image yet, but people have about images like it, and a caption that says what many of
theirs say is rarely all wrong (Devlin et al., arXiv 1505.04467; Mao et al., arXiv 1412.6632, section 8).

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
"""words of an n-gram at most, as CIDEr counts"""
FEWEST = 2
"""images that have an n-gram, or it is not kept: what one image alone has, hardly any caption will say"""


class Consensus(nn.Module):
    """An index of the training images: their vectors, and the n-grams of their captions.

    The score of a caption is its CIDEr (arXiv 1411.5726, equations 1 to 3, times 10) with the captions of the images
    most like its own as references: of the cosines between the caption's and each reference's n-grams, weighted by how
    rare they are, the mean. A mean of products is a product with the mean, so each image has one row for all of its
    captions. No sentence is stored. What is called words here are pieces of the vocabulary, as everywhere in a decoder.
    Half precision, in which it is made and saved, is fine enough for a choice.
    """

    vectors: Tensor
    """half [N, D]: unit vectors of the images"""
    codes: Tensor
    """int64 [M], rising: the n-grams, each as one number"""
    weights: Tensor
    """half [M]: the log of N over the number of images that have it"""
    ends: Tensor
    """int32 [N]: where an image's n-grams end in the following two"""
    places: Tensor
    """int32 [entries]: of n-grams among `codes`"""
    shares: Tensor
    """half [entries]: of n-grams in the mean of an image's captions, each divided by its length"""

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
        """What makes another one as large."""
        images, width = self.vectors.shape
        ngrams, entries = len(self.codes), len(self.places)
        named = {"images": images, "width": width, "ngrams": ngrams, "entries": entries}
        return {**named, "vocabulary": self.vocabulary}

    @classmethod
    def of(cls, vectors: Tensor, labels: Tensor, vocabulary: int) -> Consensus:
        """From unit vectors [N, D] and numbered captions [N, K, T], of so many words."""
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
        made = cls(images, vectors.shape[1], int(kept.sum()), int(chosen.sum()), vocabulary)
        made.vectors.copy_(vectors)
        made.codes.copy_(codes[kept])
        made.weights.copy_(weights[kept])
        made.ends.copy_(torch.bincount(image[chosen], minlength=images).cumsum(0))
        made.places.copy_((kept.cumsum(0) - 1)[place[chosen]])
        made.shares.copy_(shares[chosen])
        return made

    def forward(self, images: Tensor, captions: Tensor, neighbours: int) -> Tensor:
        """Unit vectors [B, D] of images and captions [B, K, T] of each, to the captions' scores [B, K]."""
        with torch.autocast(images.device.type, enabled=False):  # the nearest are closer to each other than bf16 tells
            likeness = images.float() @ self.vectors.float().T
        nearest = likeness.topk(min(neighbours, len(self.vectors)), dim=1).indices
        return torch.stack([self._scores(own, like) for own, like in zip(captions, nearest, strict=True)])

    def _scores(self, captions: Tensor, images: Tensor) -> Tensor:
        """Of captions [R, T] with those of the training images of these numbers as references, [R]."""
        common = torch.zeros(len(self.codes), device=captions.device)
        begin, end = F.pad(self.ends, (1, 0))[images], self.ends[images]
        lengths = end - begin
        rows = torch.arange(int(lengths.sum()), device=captions.device)
        rows += (end - lengths.cumsum(0)).repeat_interleave(lengths)  # one image's rows behind another's
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
    """The n-grams of captions [R, T], each once per caption: which caption's, the n-gram as one number, how often."""
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
    """Values of captions' n-grams, with a length of 1 of those of one caption and of as many words."""
    words = torch.ones_like(code)
    for size in range(1, MAX_NGRAM):
        words += code >= vocabulary**size
    group = caption * MAX_NGRAM + words - 1
    squares = torch.zeros(int(group.max()) + 1 if len(group) else 0, device=values.device)
    squares.index_add_(0, group, values**2)
    return values / squares.sqrt().clamp(min=1e-9)[group]


def _pairs(first: Tensor, second: Tensor, seconds: int) -> tuple[Tensor, Tensor]:
    """Of pairs of numbers, which different one each is, and a place where each different one stands."""
    different, which = (first * seconds + second).unique(return_inverse=True)
    where = torch.empty_like(different).scatter_(0, which, torch.arange(len(which)))
    return which, where
