"""Features of images in classes that overlap."""

from __future__ import annotations

import torch

from vitrail.tasks.values import Features


def clouds(count: int, classes: int, width: int, seed: int = 0, spread: float = 2.0) -> Features:
    """One cloud per class, overlapping, with axes of very different scale; the centres are the same for every seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    vectors = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return Features(vectors * torch.logspace(-2, 2, width) + 3, labels)
