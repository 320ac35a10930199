"""What an encoder learns from captions beside writing them: which are a picture's own, and which words these use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.text import PAD, START, UNKNOWN
from vitrail.tasks.decoders import TransformerDecoder
from vitrail.tasks.task import Batch, Prediction


class Match(nn.Module):
    """CoCa's contrastive loss: of a batch's captions and pictures, which belong together."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, text_width, bias=False)
        self.text = nn.Linear(text_width, text_width, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's (2103.00020)

    def image_of(self, pooled: Tensor) -> Tensor:
        """Unit vectors [B, D] of pictures."""
        return F.normalize(self.image(pooled), dim=1)

    def text_of(self, decoder: TransformerDecoder, captions: Tensor) -> Tensor:
        """Unit vectors [R, D] of captions [R, T], from what the decoder knows when it has read all but the last word.

        That is the end, but of a caption that was cut off.
        """
        ends = (captions != PAD).sum(dim=1) - 1
        known = decoder.read(F.pad(captions[:, :-1], (1, 0), value=START))
        return F.normalize(self.text(known[torch.arange(len(ends), device=ends.device), ends]), dim=1)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """How well each of the pictures [..., B, D] matches each of the captions [..., R, D]: [..., B, R]."""
        with torch.autocast(image.device.type, enabled=False):  # a scale of 100 makes much of bf16's rounding
            return self.scale.clamp(max=math.log(100)).exp() * (image.float() @ text.float().mT)

    def forward(self, pooled: Tensor, decoder: TransformerDecoder, captions: Tensor) -> Tensor:
        """Pictures [B, D] and a caption of each, [B, T], to the mean loss both ways."""
        logits = self.logits(self.image_of(pooled), self.text_of(decoder, captions))
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class Recall:
    """How well pictures and captions of a part find each other: the scores of a captioner that does not write yet.

    `recall1`, `recall5` and `recall10` are the shares of pictures that have one of their own captions among the nearest
    1, 5 and 10 of all captions of the part; `search1`, `search5` and `search10` those of captions whose picture is
    among the nearest. A caption or picture that is just as near counts as nearer. State is kept by sample.
    """

    NEAREST = (1, 5, 10)
    ROWS = 1000
    """that are compared at a time, for the memory"""

    def __init__(self, text_of: Callable[[list[str]], Tensor]) -> None:
        """`text_of` gives the unit vectors [R, D] of R captions."""
        self.text_of = text_of
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, batch: Batch, answers: Sequence[Prediction]) -> None:
        """Keep each sample's vector and those of its captions, a list a picture under `captions`."""
        texts = self.text_of([text for own in batch["captions"] for text in own]).cpu()
        several = texts.split([len(own) for own in batch["captions"]])
        for sample, answer, own in zip(batch["sample"].tolist(), answers, several, strict=True):
            self.rows[sample] = (torch.tensor(answer.embedding), own)

    def state(self) -> dict[str, Tensor]:
        samples = sorted(self.rows)
        images, texts = zip(*(self.rows[sample] for sample in samples), strict=True)
        counts = torch.tensor([len(own) for own in texts])
        return {
            "sample": torch.tensor(samples),
            "image": torch.stack(images),
            "text": torch.cat(texts),
            "count": counts,
        }

    def merge(self, state: dict[str, Tensor]) -> None:
        several = state["text"].split(state["count"].tolist())
        for sample, image, own in zip(state["sample"].tolist(), state["image"], several, strict=True):
            self.rows[sample] = (image, own)

    def compute(self) -> dict[str, float]:
        state = self.state()
        images, texts = state["image"], state["text"]
        numbers = torch.arange(len(images))
        owners = numbers.repeat_interleave(state["count"])
        found = {
            "recall": self._nearer(images, numbers, texts, owners),
            "search": self._nearer(texts, owners, images, numbers),
        }
        shares = {
            f"{name}{n}": (nearer < n).double().mean().item() for name, nearer in found.items() for n in self.NEAREST
        }
        return {**shares, "count": len(images)}

    def _nearer(self, asking: Tensor, askers: Tensor, asked: Tensor, owners: Tensor) -> Tensor:
        """For each of the vectors [Q, D], how many of [K, D] of other owners are as near as the nearest of its own."""
        counts = []
        for some, whose in zip(asking.split(self.ROWS), askers.split(self.ROWS), strict=True):
            near = some @ asked.T
            own = whose[:, None] == owners
            best = near.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
            counts.append((~own & ~(near < best)).sum(dim=1))  # what is no number counts as near
        return torch.cat(counts)


class BagOfWords(nn.Module):
    """Which words the captions of a picture use, whatever their order, told from its one vector."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary)
        nn.init.constant_(self.linear.bias, -5.0)  # nearly all words are missing from a picture's captions

    def expect(self, labels: Tensor) -> None:
        """Begin with the share of pictures' captions [N, K, T] that use each word."""
        share = sum(self.shares(part).sum(dim=0) for part in labels.split(500)) / len(labels)
        self.linear.bias.data.copy_(torch.as_tensor(share).clamp(1e-5, 1 - 1e-3).logit())

    def shares(self, labels: Tensor) -> Tensor:
        """Of each picture's captions [B, K, T] the share that uses each word, [B, V]."""
        there = (labels[..., 0] != PAD).sum(dim=1, keepdim=True)
        used = torch.zeros(*labels.shape[:2], self.linear.out_features, device=labels.device).scatter_(2, labels, 1.0)
        shares = used.sum(dim=1) / there
        shares[:, : UNKNOWN + 1] = 0
        return shares

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Pictures [B, D] and all their captions [B, K, T], to the mean over pictures of the summed cross-entropies.

        The target of a word is the share of the picture's captions that use it.
        """
        logits, shares = self.linear(pooled).float(), self.shares(labels)
        return F.binary_cross_entropy_with_logits(logits, shares, reduction="sum") / len(labels)
