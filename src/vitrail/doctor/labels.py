"""Labels that images contradict, and what simple models score: by features that never saw these labels.

Every image is judged by two classifiers that have not seen its label: kernel ridge regression, whose leave-one-out
predictions have a closed form, on patches of the images themselves (Coates, Lee and Ng 2011) and on the features of the
bundled captioner, which learned from photos and sentences. The idea is that of confident learning (arXiv 1911.00068).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail import zoo
from vitrail.data.decode import BadImage, resize
from vitrail.data.pixels import to_bytes, with_channels
from vitrail.doctor.finding import Finding, counted
from vitrail.doctor.survey import SIDE, Survey
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig

IMAGES = 2_000
"""images whose labels are judged; the time grows with them, and the memory with their square"""
ENCODER = "caption"
"""bundled weights that saw no labels of any class"""
RIDGE = 0.5
LISTED = 0.05
"""fraction of the judged images that are listed at most"""
GOOD = 0.9
"""accuracy of classifiers that are right about most images"""
OWN, OTHER = (0.1, 0.02), (0.6, 0.9)
"""probability of the label, at most, and of another class, at least, of an image without which nothing is listed: for
good classifiers, and for others"""
WEIGHTS: Sequence[float] = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
"""of the probabilities by patches, beside those by the captioner"""
FEWEST = 40
"""images below which nothing is judged"""
BATCH = 64
SMALL = 64
"""pixels of a side at which the captioner sees images that are smaller than that"""


@dataclass
class Judged:
    """The images whose labels were judged, and probabilities of their classes without their own label."""

    numbers: np.ndarray
    labels: Tensor
    probabilities: Tensor
    """[N, K]"""
    contradicted: Tensor
    """bool [N]: neither classifier chooses the label"""
    classes: list[str]
    baselines: dict[str, float]
    """top-1 accuracy by name"""
    total: int

    @property
    def order(self) -> Tensor:
        """The images, from the one whose label is the least probable."""
        return self._of_label().argsort()

    def _of_label(self) -> Tensor:
        return self.probabilities.gather(1, self.labels[:, None])[:, 0]

    def findings(self, found: Survey) -> Iterator[Finding]:
        highest, best = self.probabilities.max(1)
        good = self.baselines["simple features"] >= GOOD
        own, other = (OWN[0], OTHER[0]) if good else (OWN[1], OTHER[1])
        sure = (self._of_label() <= own) & (highest >= other) & self.contradicted
        if not sure.any():
            return
        # In the order of suspicion: the sure ones, and as many of the others as people may want to see.
        count = max(int(sure.sum()), min(int((best != self.labels).sum()), int(LISTED * len(best))))
        chosen = self.order[:count].tolist()
        judged = "" if len(best) == self.total else f" of the {len(best):,} that were judged"
        yield Finding(
            "mislabelled",
            f"the labels of {counted(count, 'image')}{judged} may be wrong, most suspect first",
            "look at the first ones, and correct or remove what is wrong; stop where labels begin to be right",
            "likely" if good else "possible",
            [
                (f"{found.names[self.numbers[i]]} ({self.classes[self.labels[i]]}; {self.classes[best[i]]}?)",)
                for i in chosen
            ],
        )

    def notes(self, found: Survey) -> list[str]:
        lines = [f"{name} {value:.1%}" for name, value in self.baselines.items()]
        notes = [f"baselines, which a trained model should beat: {', '.join(lines)}"]
        if len(self.numbers) < self.total:
            notes.append(f"labels were judged for {len(self.numbers):,} of {self.total:,} images, evenly spaced")
        return notes

    def facts(self) -> dict[str, Any]:
        return {"judged": len(self.numbers), "baselines": self.baselines}


def refusal(found: Survey, images: int) -> str | None:
    """Why the labels of at most so many images cannot be judged; None if they can."""
    if images < FEWEST:
        return f"--images is {images}, and at least {FEWEST} are needed"
    if len(found.good()) < FEWEST:
        return f"the set has fewer than {FEWEST} images that can be read"
    if (channels := found.sets[0].channels) not in (1, 3):
        return f"images of {channels} channels are not supported"
    if len(np.unique(found.labels[found.good()])) < 2:
        return "all images have the same label"
    return None


def judge(found: Survey, images: int) -> Judged | None:
    """Judge the labels of at most so many images; None if too few images or labels are left when they are read again.

    `refusal` must be None.
    """
    good = found.good()
    chosen = good[np.linspace(0, len(good) - 1, min(len(good), images)).round().astype(int)]
    side = np.sqrt(found.measured["height"][chosen].astype(float) * found.measured["width"][chosen])
    task = zoo.load(ENCODER, image_size=SMALL if np.median(side) < SMALL else None)
    kept, pixels, small = _read(found, chosen, task)
    labels = torch.from_numpy(found.labels[kept])
    if len(labels) < FEWEST or len(labels.unique()) < 2:
        return None
    count = len(found.classes)
    patches = out_of_fold(kernel(patch_features(small)), labels, count)
    pretrained = out_of_fold(kernel(encoder_features(task, pixels)), labels, count)
    random = out_of_fold(kernel(_untrained(small)), labels, count)
    probabilities = stacked(patches, pretrained, labels)
    baselines = {
        "most frequent class": labels.bincount().max().item() / len(labels),
        "random weights": _accuracy(random, labels),
        "simple features": _accuracy(probabilities, labels),
    }
    contradicted = (patches.argmax(1) != labels) & (pretrained.argmax(1) != labels)
    return Judged(kept, labels, probabilities, contradicted, found.classes, baselines, len(good))


def _accuracy(probabilities: Tensor, labels: Tensor) -> float:
    return (probabilities.argmax(1) == labels).double().mean().item()


def _read(found: Survey, numbers: np.ndarray, task: Task) -> tuple[np.ndarray, Tensor, Tensor]:
    """The numbers of the images that can still be read, as the task takes them, and as [N, 3, SIDE, SIDE]."""
    kept, pixels, small = [], [], []
    for i in numbers.tolist():
        try:
            opened = found.open(i)
            image = with_channels(to_bytes(opened), 3) if isinstance(opened, Tensor) else opened.pixels(3)
        except BadImage:
            continue
        kept.append(i)
        pixels.append(task.preprocess.prepare(image))
        small.append(resize(image, (SIDE, SIDE), "bilinear"))
    return np.array(kept), torch.stack(pixels), torch.stack(small)


@torch.inference_mode()
def encoder_features(task: Task, pixels: Tensor) -> Tensor:
    """The hidden states after every block, as means of the image's quarters and deviations, [N, D], standardised."""
    encoder, rows = task.encoder, []
    for batch in map(task.preprocess.normalise, pixels.split(BATCH)):
        tokens, grid = encoder.embed(batch)
        _, states = encoder.encode(tokens, grid, layers=range(len(encoder.blocks)))
        maps = [state[:, encoder.config.prefix_tokens :].mT.unflatten(2, grid) for state in states]
        own = [(F.adaptive_avg_pool2d(found, 2).flatten(1), found.flatten(2).std(2)) for found in maps]
        rows.append(torch.cat([values for pair in own for values in pair], 1))
    return standardised(torch.cat(rows))


@torch.inference_mode()
def _untrained(small: Tensor) -> Tensor:
    """The features of a network with random weights."""
    torch.manual_seed(0)
    encoder = encoder_for(VariantConfig(width=96, depth=2, heads=3, patch=4, image_size=(SIDE, SIDE), stem=(24, 48)))
    rows: list[Tensor] = [encoder.pool(encoder(batch.float() / 127.5 - 1)) for batch in small.split(BATCH)]
    return standardised(torch.cat(rows))


PATCH, FILTERS, LEARNED_FROM = 6, 800, 20_000
"""side of a patch, number of filters, and patches from which whitening is learned"""
POOLED = 3
"""regions of the image, per side, over which a filter's answers are averaged"""
THRESHOLD = 0.2


@torch.inference_mode()
def patch_features(small: Tensor) -> Tensor:
    """The cosine of each patch with random whitened patches of the same images, above a threshold and pooled, [N, D].

    `small` is uint8 [N, 3, SIDE, SIDE]. Nothing but the images is learned from, and no labels.
    """
    draw = torch.Generator().manual_seed(0)
    images = small.float() / 255
    which = torch.randint(len(images), (LEARNED_FROM,), generator=draw).tolist()
    corner = torch.randint(SIDE - PATCH + 1, (LEARNED_FROM, 2), generator=draw).tolist()
    patches = _contrast(
        torch.stack(
            [images[i, :, y : y + PATCH, x : x + PATCH].flatten() for i, (y, x) in zip(which, corner, strict=True)]
        )
    )
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    whiten = vectors @ torch.diag((values.clamp(min=0) + 0.1).rsqrt()) @ vectors.T
    filters = F.normalize((patches[torch.randperm(len(patches), generator=draw)[:FILTERS]] - mean) @ whiten, dim=1)
    side = SIDE - PATCH + 1
    rows = []
    for batch in images.split(BATCH):
        white = (_contrast(F.unfold(batch, PATCH).mT) - mean) @ whiten
        cosine = F.normalize(white, dim=2) @ filters.T
        both = torch.cat([(cosine - THRESHOLD).relu(), (-cosine - THRESHOLD).relu()], 2)
        rows.append(F.adaptive_avg_pool2d(both.mT.unflatten(2, (side, side)), POOLED).flatten(1))
    return standardised(torch.cat(rows).sqrt())


def _contrast(patches: Tensor) -> Tensor:
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def standardised(vectors: Tensor) -> Tensor:
    """Features [N, D] with a mean of 0 and a standard deviation of 1."""
    return (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-3)


def kernel(vectors: Tensor) -> Tensor:
    """exp(-d^2 / median d^2) of all pairs, float64 [N, N]."""
    distance = torch.cdist(vectors, vectors).square().double()
    return torch.exp(-distance / distance.median().clamp(min=1e-12))


TEMPERATURES: Sequence[float] = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24)


def out_of_fold(kernel: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Probabilities [N, K] of each image's classes from all other images: leave-one-out kernel ridge regression.

    The prediction without image i is y_i - a_i / H_ii, where H is the inverse of kernel + ridge and a = H y. The
    temperature of the softmax is the one under which the labels are most probable.
    """
    targets = F.one_hot(labels, classes).double() * 2 - 1
    inverse = torch.linalg.inv(kernel + RIDGE * torch.eye(len(kernel), dtype=kernel.dtype))
    scores = targets - (inverse @ targets) / inverse.diagonal()[:, None]
    best = min(TEMPERATURES, key=lambda t: F.cross_entropy(scores * t, labels).item())
    return (scores * best).softmax(1)


def stacked(patches: Tensor, pretrained: Tensor, labels: Tensor) -> Tensor:
    """The weighted mean of two classifiers' probabilities [N, K] under which the labels are most probable."""
    mixed = [weight * patches + (1 - weight) * pretrained for weight in WEIGHTS]
    return min(mixed, key=lambda each: F.nll_loss(each.clamp(min=1e-12).log(), labels).item())
