"""Additional losses of captioning: contrastive matching of images and captions, and bag-of-words prediction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.text import PAD, START, UNKNOWN
from vitrail.tasks.caption.decoders import Decoder

Gather = Callable[[Tensor], Tensor]
"""concatenates the rows of all processes; gradients flow back to each process"""


class Match(nn.Module):
    """CoCa's matching of images with captions: unit vectors of both, and a learned temperature."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, text_width, bias=False)
        self.text = nn.Linear(text_width, text_width, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's (2103.00020)

    def forward(self, pooled: Tensor, texts: Tensor | None = None, gather: Gather | None = None) -> Tensor:
        """Images [..., B, D] and captions' hidden states [..., R, D] to the logits of all pairs, [..., B, R].

        Without captions, the images' unit vectors [..., B, D]. With `gather`, over the images and captions of all
        processes.
        """
        images = F.normalize(self.image(pooled), dim=-1)
        if texts is None:
            return images
        texts = F.normalize(self.text(texts), dim=-1)
        if gather is not None:
            images, texts = gather(images), gather(texts)
        with torch.autocast(images.device.type, enabled=False):  # a scale of 100 would amplify bf16's rounding errors
            return self.scale.clamp(max=math.log(100)).exp() * (images.float() @ texts.float().mT)


def text_states(decoder: Decoder, captions: Tensor) -> Tensor:
    """The hidden states [R, D] before the last token of captions [R, T]: the end token, unless truncated."""
    ends = (captions != PAD).sum(dim=1) - 1
    hidden = decoder(F.pad(captions[:, :-1], (1, 0), value=START))
    return hidden[torch.arange(ends.shape[0], device=ends.device), ends]


def contrastive_loss(logits: Tensor) -> Tensor:
    """Mean contrastive loss of both directions, of logits [B, B] with pairs on the diagonal (CoCa, equation 2)."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class BagOfWords(nn.Module):
    """Predicts the bag of words of an image's captions from its pooled vector."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary)
        nn.init.constant_(self.linear.bias, -5.0)  # an image's captions contain very few of the words

    def init_word_bias(self, labels: Tensor) -> None:
        """Initialise the bias with the fraction of the captions [N, K, T] that use each word."""
        share = sum(self.shares(some).sum(dim=0) for some in labels.split(500)) / len(labels)
        self.linear.bias.data.copy_(torch.as_tensor(share).clamp(1e-5, 1 - 1e-3).logit())

    def shares(self, labels: Tensor) -> Tensor:
        """The fraction of each image's captions [B, K, T] that use each word, [B, V]."""
        there = (labels[..., 0] != PAD).sum(dim=1, keepdim=True)
        used = torch.zeros(*labels.shape[:2], self.linear.out_features, device=labels.device).scatter_(2, labels, 1.0)
        shares = used.sum(dim=1) / there
        shares[:, : UNKNOWN + 1] = 0
        return shares

    def forward(self, pooled: Tensor, labels: Tensor, gather: Gather | None = None) -> Tensor:
        """Images [B, D] and all their captions [B, K, T] to the mean over images of the summed cross-entropies.

        The target of a word is the fraction of the image's captions that use it. With `gather`, the mean is over the
        images of all processes.
        """
        logits, shares = self.linear(pooled).float(), self.shares(labels)
        total = F.binary_cross_entropy_with_logits(logits, shares, reduction="sum")
        if gather is None:
            return total / len(labels)
        totals, counts = gather(torch.stack([total, total.new_tensor(len(labels))])[None]).sum(dim=0)
        return totals / counts
