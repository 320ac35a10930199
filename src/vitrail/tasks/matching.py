"""What an encoder learns from captions beside writing them: which are an image's own, and which words these use."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.text import PAD, START, UNKNOWN
from vitrail.tasks.decoders import TransformerDecoder


class Match(nn.Module):
    """CoCa's contrastive loss: of a batch's captions and images, which belong together."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, text_width, bias=False)
        self.text = nn.Linear(text_width, text_width, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's (2103.00020)

    def image_of(self, pooled: Tensor) -> Tensor:
        """Unit vectors [B, D] of images."""
        return F.normalize(self.image(pooled), dim=1)

    def text_of(self, decoder: TransformerDecoder, captions: Tensor) -> Tensor:
        """Unit vectors [R, D] of captions [R, T], from what the decoder knows when it has read all but the last word.

        That is the end, but of a caption that was cut off.
        """
        ends = (captions != PAD).sum(dim=1) - 1
        known = decoder.read(F.pad(captions[:, :-1], (1, 0), value=START))
        return F.normalize(self.text(known[torch.arange(len(ends), device=ends.device), ends]), dim=1)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """How well each of the images [..., B, D] matches each of the captions [..., R, D]: [..., B, R]."""
        with torch.autocast(image.device.type, enabled=False):  # a scale of 100 makes much of bf16's rounding
            return self.scale.clamp(max=math.log(100)).exp() * (image.float() @ text.float().mT)

    def forward(self, pooled: Tensor, decoder: TransformerDecoder, captions: Tensor) -> Tensor:
        """Images [B, D] and a caption of each, [B, T], to the mean loss both ways."""
        logits = self.logits(self.image_of(pooled), self.text_of(decoder, captions))
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class BagOfWords(nn.Module):
    """Which words the captions of an image use, whatever their order, told from its one vector."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary)
        nn.init.constant_(self.linear.bias, -5.0)  # nearly all words are missing from an image's captions

    def init_word_bias(self, labels: Tensor) -> None:
        """Begin with the share of images' captions [N, K, T] that use each word."""
        share = sum(self.shares(part).sum(dim=0) for part in labels.split(500)) / len(labels)
        self.linear.bias.data.copy_(torch.as_tensor(share).clamp(1e-5, 1 - 1e-3).logit())

    def shares(self, labels: Tensor) -> Tensor:
        """Of each image's captions [B, K, T] the share that uses each word, [B, V]."""
        there = (labels[..., 0] != PAD).sum(dim=1, keepdim=True)
        used = torch.zeros(*labels.shape[:2], self.linear.out_features, device=labels.device).scatter_(2, labels, 1.0)
        shares = used.sum(dim=1) / there
        shares[:, : UNKNOWN + 1] = 0
        return shares

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Images [B, D] and all their captions [B, K, T], to the mean over images of the summed cross-entropies.

        The target of a word is the share of the image's captions that use it.
        """
        logits, shares = self.linear(pooled).float(), self.shares(labels)
        return F.binary_cross_entropy_with_logits(logits, shares, reduction="sum") / len(labels)
