"""Inputs and losses of a captioner's training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.random import seed_for, uniform
from vitrail.data.text import PAD, START, UNKNOWN
from vitrail.tasks.caption.decoders import Decoder, Memory
from vitrail.tasks.caption.text import words_before
from vitrail.tasks.values import Batch

OFFSETS = seed_for(0, 0, 0)
"""the key of the draws of an image's first caption"""


def captions_of_epoch(batch: Batch, most: int) -> Tensor:
    """At most `most` captions of each image, [B, K, T]: the next ones in each epoch, from an offset that depends on
    the image."""
    labels = batch["label"]
    there = (labels[..., 0] != PAD).sum(dim=1)
    count = min(most, int(there.max()))
    first = (uniform(OFFSETS, batch["sample"], 1)[:, 0] * there).long() + batch["epoch"] * most
    places = (first[:, None] + torch.arange(count, device=labels.device)) % there[:, None]
    chosen = labels[torch.arange(len(labels), device=labels.device)[:, None], places]
    # An image with fewer captions uses each of them once.
    chosen = chosen.masked_fill((torch.arange(count, device=labels.device) >= there[:, None])[..., None], PAD)
    return chosen[..., : int((chosen != PAD).any(dim=0).any(dim=0).sum())]


def drop_words(words: Tensor, rate: float) -> Tensor:
    """The words, each replaced by `UNKNOWN` with this probability, by torch's generator."""
    out = torch.rand(words.shape, device=words.device) < rate
    return words.masked_fill(out & (words > UNKNOWN), UNKNOWN)


def caption_loss(
    decoder: Decoder, memory: Memory, words: Tensor, labels: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of the captions' next words [B, K, T], given the input words [B, K, T], and the number
    of words that are predicted correctly."""
    counted = labels != PAD
    logits, targets = decoder(words, memory, counted=counted).float(), labels[counted]
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    return loss, (logits.argmax(dim=1) == targets).sum()


def log_probabilities(decoder: Decoder, memory: Memory, words: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of each word of captions [B, K, T], given the words before it."""
    logits = decoder(words_before(words), memory).float() / temperature
    logits[..., [PAD, START, UNKNOWN]] = -torch.inf
    logp = logits.log_softmax(dim=-1).gather(3, words[..., None])[..., 0]
    # Padding is masked, not multiplied by 0: a language model gives it -inf, and 0 * -inf is nan.
    return logp.masked_fill(words == PAD, 0.0)
