"""What a captioner reads in a step of training, and what it loses by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.random import uniform
from vitrail.data.text import PAD, START, UNKNOWN
from vitrail.tasks.caption.decoders import Decoder, Memory
from vitrail.tasks.caption.text import words_before
from vitrail.tasks.task import Batch


def captions_of_epoch(batch: Batch, most: int) -> Tensor:
    """At most so many of each image's captions, [B, K, T]: the next ones each epoch, starting at an offset that
    depends on the image."""
    labels = batch["label"]
    there = (labels[..., 0] != PAD).sum(dim=1)
    count = min(most, int(there.max()))
    first = (uniform(0, 0, batch["sample"], 1)[:, 0] * there).long() + batch["epoch"] * most
    places = (first[:, None] + torch.arange(count, device=labels.device)) % there[:, None]
    chosen = labels[torch.arange(len(labels), device=labels.device)[:, None], places]
    # An image with fewer captions reads each of them once.
    chosen = chosen.masked_fill((torch.arange(count, device=labels.device) >= there[:, None])[..., None], PAD)
    return chosen[..., : int((chosen != PAD).any(dim=0).any(dim=0).sum())]


def drop_words(words: Tensor, rate: float) -> Tensor:
    """The words, each with this probability replaced by `UNKNOWN`; drawn by torch's generator."""
    out = torch.rand(words.shape, device=words.device) < rate
    return words.masked_fill(out & (words > UNKNOWN), UNKNOWN)


def caption_loss(
    decoder: Decoder, memory: Memory, words: Tensor, labels: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """From the words [B, K, T] that are read, the summed cross-entropy of each next one of the captions [B, K, T], and
    how many are the likeliest one."""
    counted = labels != PAD
    logits, targets = decoder(words, memory, counted=counted).float(), labels[counted]
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    return loss, (logits.argmax(dim=1) == targets).sum()


def log_probabilities(decoder: Decoder, memory: Memory, words: Tensor, temperature: float = 1.0) -> Tensor:
    """Of each word of captions [B, K, T], given the words before it, among those that may be written."""
    logits = decoder(words_before(words), memory).float() / temperature
    logits[..., [PAD, START, UNKNOWN]] = -torch.inf
    logp = logits.log_softmax(dim=-1).gather(3, words[..., None])[..., 0]
    # What fills a caption up is masked and not multiplied: a language model cannot say it, and 0 times -inf is nan.
    return logp.masked_fill(words == PAD, 0.0)
