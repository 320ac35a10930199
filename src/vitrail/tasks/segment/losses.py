"""Losses of segmentation, one number per image, so that they add up over any split of a batch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import UserError

NO_OBJECT = 0.1
"""weight of a query that matches nothing, in the loss of its class"""
CLASS, MASK, DICE = 2.0, 5.0, 5.0
"""weights of a query's losses (Mask2Former, arXiv 2112.01527)"""


def pixel_loss(logits: Tensor, mask: Tensor, weights: Tensor | None, dice: float) -> Tensor:
    """Cross-entropy, averaged over an image's pixels, plus `dice` times the dice loss: [B].

    `logits` are [B, K, h, w], `mask` int64 [B, H, W]; pixels of no class are left out. An image of such pixels alone
    has a loss of 0. `weights` [K] are those of the classes, with a mean of 1 over pixels.
    """
    logits = F.interpolate(logits.float(), mask.shape[-2:], mode="bilinear", align_corners=False)
    valid = (mask >= 0) & (mask < logits.shape[1])
    losses = F.cross_entropy(logits, mask.masked_fill(~valid, -100), weights, ignore_index=-100, reduction="none")
    found = losses.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    return found + dice * dice_loss(logits.softmax(dim=1), one_hot(mask, valid, logits.shape[1])) if dice else found


def one_hot(mask: Tensor, valid: Tensor, classes: int) -> Tensor:
    """float32 [B, K, H, W]; 0 for all classes where a pixel is not valid."""
    hot = F.one_hot(mask.masked_fill(~valid, classes), classes + 1)[..., :classes]
    return hot.permute(0, 3, 1, 2).float()


def dice_loss(p: Tensor, target: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|), averaged over the classes that an image has (arXiv 1606.04797): [B].

    Probabilities and targets are [B, K, H, W]. Pixels of no class count neither as right nor as wrong.
    """
    p = p * target.sum(dim=1, keepdim=True)
    both, size, there = (p * target).sum((2, 3)), (p + target).sum((2, 3)), target.sum((2, 3)) > 0
    losses = (1 - 2 * both / size.clamp(min=1)) * there
    return losses.sum(dim=1) / there.sum(dim=1).clamp(min=1)


def query_loss(outputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Mask2Former's loss of classes and masks, after each class of an image was matched to its best query: [B].

    Pixels of no class are left out of the masks. UserError if SciPy, which matches, is missing.
    """
    classes = outputs["classes"].float()
    masks = F.interpolate(outputs["masks"].float(), mask.shape[-2:], mode="bilinear", align_corners=False)
    count = classes.shape[-1] - 1
    valid = (mask >= 0) & (mask < count)
    return torch.stack([_of_image(c, m, t, v, count) for c, m, t, v in zip(classes, masks, mask, valid, strict=True)])


def _of_image(classes: Tensor, masks: Tensor, mask: Tensor, valid: Tensor, count: int) -> Tensor:
    """For class logits [Q, K + 1], mask logits [Q, H, W] and a mask [H, W]."""
    logits, labels = masks[:, valid], mask[valid]  # [Q, N] and [N]
    present = labels.unique()
    targets = (labels == present[:, None]).float()  # [M, N]
    if not len(present):  # void alone says nothing of any class
        return 0 * (classes.sum() + masks.sum())
    wanted = torch.full((len(classes),), count, device=classes.device)
    query, segment = _matched(_costs(classes, logits, present, targets))
    wanted[query] = present[segment]
    chosen, truth = logits[query], targets[segment]
    loss = MASK * F.binary_cross_entropy_with_logits(chosen, truth) + DICE * _dice(chosen, truth).mean()
    weights = torch.ones(count + 1, device=classes.device)
    weights[-1] = NO_OBJECT
    return loss + CLASS * F.cross_entropy(classes, wanted, weights)


def _costs(classes: Tensor, logits: Tensor, present: Tensor, targets: Tensor) -> Tensor:
    """The cost [Q, M] of giving each of M segments to each query."""
    pixels = max(1, targets.shape[1])
    p = logits.sigmoid()
    with torch.autocast(logits.device.type, enabled=False):  # in bf16, queries of nearly one cost are mistaken
        right = F.softplus(-logits) @ targets.T / pixels
        wrong = F.softplus(logits) @ (1 - targets).T / pixels
        both = p @ targets.T
    dice = 1 - (2 * both + 1) / (p.sum(dim=1, keepdim=True) + targets.sum(dim=1) + 1)
    return MASK * (right + wrong) + DICE * dice - CLASS * classes.softmax(dim=-1)[:, present]


def _dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each pair of masks, [M, N] and [M, N]."""
    p = logits.sigmoid()
    return 1 - (2 * (p * targets).sum(dim=1) + 1) / (p.sum(dim=1) + targets.sum(dim=1) + 1)


def check_matching(queries: int, classes: int) -> None:
    """Refuse to train queries without SciPy, or fewer than the classes, which an image may hold all of."""
    if find_spec("scipy") is None:
        raise UserError("the head queries is trained with SciPy: pip install 'vitrail[segment]'")
    if queries < classes:
        raise UserError(
            f"{queries} queries cannot find {classes} classes in one image: set --queries {classes} or more"
        )


def _matched(costs: Tensor) -> tuple[Tensor, Tensor]:
    """The queries and the segments of the cheapest assignment.

    SciPy refuses costs that are not finite. Any assignment will do for those: their loss is not finite either.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    rows, columns = linear_sum_assignment(costs.detach().nan_to_num().cpu().numpy())
    return torch.as_tensor(rows, device=costs.device), torch.as_tensor(columns, device=costs.device)
