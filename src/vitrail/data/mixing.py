"""Mixup (arXiv 1710.09412) and cutmix (1905.04899) of neighbours in a batch, each image with its own share."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.data.augment import MIX, Augment, boxes_mask
from vitrail.data.random import uniform

BETA_TRIES = 16


def mix_pairs(images: Tensor, samples: Tensor, keys: Tensor, augment: Augment) -> tuple[Tensor, Tensor, Tensor]:
    """Mixup or cutmix of uint8 [B, C, H, W]: the mixed images, their partners int64 [B] and their shares [B].

    Images 2k and 2k + 1 are partners. Each draws its own share, so that the result for an image depends only on
    (seed, epoch, sample) and on its partner. With an odd count the last image has no partner and stays unchanged.
    `samples` and `keys` are those of an `Augmenter`.
    """
    places = torch.arange(len(images), device=images.device)
    partner = (places ^ 1).clamp(max=len(images) - 1)
    draws = uniform(keys[MIX], samples, 4 * BETA_TRIES + 3)
    mixed, share = mix(images, partner, draws, augment)
    return mixed, partner, torch.where(partner == places, 1.0, share)


def mix(images: Tensor, partner: Tensor, draws: Tensor, augment: Augment) -> tuple[Tensor, Tensor]:
    """uint8 [B, C, H, W] mixed with their partners (indices [B]), and the share [B] that each keeps of itself."""
    if augment.mixup and augment.cutmix:
        cut = draws[:, -1] < 0.5
    else:
        cut = torch.full_like(draws[:, -1], augment.cutmix > 0, dtype=torch.bool)
    blend = _beta(draws[:, : 2 * BETA_TRIES], augment.mixup or 1.0)
    keep = _beta(draws[:, 2 * BETA_TRIES : 4 * BETA_TRIES], augment.cutmix or 1.0)
    height, width = images.shape[-2:]
    h, w = ((1 - keep).sqrt() * height).round(), ((1 - keep).sqrt() * width).round()
    box = boxes_mask(images, draws[:, -3] * (height - h + 1), draws[:, -2] * (width - w + 1), h, w)
    share = torch.where(cut, 1 - h * w / (height * width), blend)
    other = images[partner]
    weight = share[:, None, None, None]
    blended = (images * weight + other * (1 - weight)).round().to(torch.uint8)
    return torch.where(cut[:, None, None, None], torch.where(box, other, images), blended), share


def _beta(draws: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) [B] for alpha of at most 1, from draws [B, 2 T]: the first of T tries of Joehnk's method."""
    x, y = (draws.clamp(min=2.0**-25) ** (1 / alpha)).chunk(2, dim=1)
    total = x + y
    good = (total <= 1) & (total > 0)
    first = good.to(torch.uint8).argmax(dim=1, keepdim=True)
    # All 16 tries fail for at most one image in 65,000: it stays unmixed.
    return torch.where(good.any(dim=1), (x / total.clamp(min=1e-38)).gather(1, first)[:, 0], 1.0)
