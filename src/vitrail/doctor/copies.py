"""Copies of images, exact and near, within a split and between splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.doctor.finding import Finding, counted
from vitrail.doctor.survey import SIDE, Survey

ALIKE = 0.95
"""least correlation of the coarse structure of near-duplicates, by which candidates are found"""
SAME = 0.9
"""least correlation of their small grey images"""
DETAIL = 0.5
"""least correlation of their detail: images of one scene or one template share the coarse structure only"""
FLAT = 1.5
"""standard deviation of the detail below which an image has none to compare"""
SMOOTH = 0.9995
"""least correlation of images without detail"""
TINT, PALE = 0.7, 6.0
"""least cosine of their coarse colours, unless those of one are below so many levels: brightness only scales them"""
LEAST_SIDE = 16
"""pixels of a side below which images have no detail: different digits of 8x8 pixels correlate by 0.99"""
NEAREST = 4
"""candidates of an image that are compared in detail"""
BLOCK = 2048


def copies(found: Survey) -> Iterator[Finding]:
    """Exact copies, near-duplicates, copies with other labels, and copies in two splits."""
    exact = _exact(found)
    near = _joined(_near(found, exact))
    yield from _leaked(found, exact, near)
    yield from _contradicting(found, exact)
    if inside := [own for group in exact for own in _by_split(found, group) if len(own) > 1]:
        extra = sum(len(group) - 1 for group in inside)
        what = counted(extra, "image repeats another", "images repeat others")
        yield Finding(
            "duplicates",
            f"{what} of the same split, pixel for pixel",
            "keep one image of each group: copies count double in training and in scores",
            "certain",
            _names(found, inside),
        )
    if inside := [own for group in near for own in _by_split(found, group) if len(own) > 1]:
        extra = sum(len(group) - 1 for group in inside)
        what = counted(extra, "image is", "images are")
        yield Finding(
            "near-duplicates",
            f"{what} another image of the same split with another size, compression or brightness",
            "keep one image of each group, or put each group on one side of a split with --group",
            "likely",
            _names(found, inside),
        )


def _leaked(found: Survey, exact: list[list[int]], near: list[list[int]]) -> Iterator[Finding]:
    for groups, how, sure in ((exact, "pixel for pixel", "certain"), (near, "nearly", "likely")):
        across = [group for group in groups if len({int(found.split[i]) for i in group}) > 1]
        if not across:
            continue
        pairs = sorted({tuple(sorted({found.splits[found.split[i]] for i in group})) for group in across})
        where = "; ".join(" and ".join(pair) for pair in pairs)
        held = sum(int(found.split[i]) > 0 for group in across for i in group)
        yield Finding(
            "leakage",
            f"{counted(held, 'image')} of an evaluation split {'is' if held == 1 else 'are'} {how} in another split "
            f"too ({where}): scores come out too high",
            "remove these images from the training split, and train again",
            "certain" if sure == "certain" else "likely",
            _names(found, across),
        )


def _contradicting(found: Survey, exact: list[list[int]]) -> Iterator[Finding]:
    if not found.classes:
        return
    if wrong := [group for group in exact if len({int(found.labels[i]) for i in group}) > 1]:
        groups = [[f"{found.names[i]} ({found.classes[found.labels[i]]})" for i in group] for group in wrong]
        yield Finding(
            "conflicting-labels",
            f"{counted(len(wrong), 'image is', 'images are')} in the set more than once, in different classes",
            "keep each image in its right class only; if an image shows several classes, leave it out",
            "certain",
            groups,
        )


def _names(found: Survey, groups: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[found.names[i] for i in group] for group in groups]


def _by_split(found: Survey, group: Sequence[int]) -> list[list[int]]:
    sides: dict[int, list[int]] = defaultdict(list)
    for i in group:
        sides[int(found.split[i])].append(i)
    return [*sides.values()]


def _exact(found: Survey) -> list[list[int]]:
    """Groups of images with the same pixels; constant images are another finding."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i in found.good():
        if found.measured["spread"][i] > 2:
            groups[int(found.measured["pixels"][i])].append(int(i))
    return [group for group in groups.values() if len(group) > 1]


def _near(found: Survey, exact: list[list[int]]) -> list[tuple[int, int]]:
    """Pairs of images that are nearly the same: one of each group of exact copies stands for the group."""
    again = {i for group in exact for i in group[1:]}
    side = np.minimum(found.measured["height"], found.measured["width"])
    fit = (found.measured["spread"] > 2) & (side >= LEAST_SIDE)
    rows = [at for at, i in enumerate(found.compared) if fit[i] and int(i) not in again]
    if len(rows) < 2:
        return []
    numbers = found.compared[rows]
    grey, colours = found.small[rows], found.colours[rows]
    pairs = []
    for a, b in _candidates(coarse(grey)):
        same = nearly_same(grey[a], grey[b], colours[a], colours[b])
        pairs += [(int(numbers[i]), int(numbers[j])) for i, j in zip(a[same].tolist(), b[same].tolist(), strict=True)]
    return pairs


def coarse(grey: Tensor) -> Tensor:
    """Unit vectors [N, 63]: the lowest frequencies of small grey images [N, SIDE, SIDE], without their mean."""
    k, x = torch.arange(8.0)[:, None], torch.arange(SIDE) + 0.5
    basis = torch.cos(torch.pi / SIDE * k * x)  # DCT-II
    found = [basis @ block.float() @ basis.T for block in grey.split(BLOCK)]
    return F.normalize(torch.cat(found).flatten(1)[:, 1:], dim=1)


def _candidates(vectors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of rows with a high correlation, each once: at most `NEAREST` per row and block."""
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        for first in range(start, len(vectors), BLOCK):
            alike = block @ vectors[first : first + BLOCK].T
            if first == start:
                alike.tril_(-1)
            value, at = alike.topk(min(NEAREST, alike.shape[1]), dim=1)
            row, place = (value > ALIKE).nonzero(as_tuple=True)
            if len(row):
                yield row + start, at[row, place] + first


def nearly_same(a: Tensor, b: Tensor, colours_a: Tensor, colours_b: Tensor) -> Tensor:
    """Whether pairs of images are the same but for size, compression, brightness and contrast, bool [N].

    From their small grey images, uint8 [N, SIDE, SIDE], and coarse colours, uint8 [N, 3, 4, 4].
    """
    a, b = a.float(), b.float()
    whole = _correlation(a, b)
    (fine_a, strength_a), (fine_b, strength_b) = _detail(a), _detail(b)
    fine = _correlation(fine_a, fine_b)
    smooth = torch.minimum(strength_a, strength_b) < FLAT
    close = torch.where(smooth, whole > SMOOTH, (whole > SAME) & (fine > DETAIL))
    tint_a, tint_b = _tint(colours_a.float()), _tint(colours_b.float())
    pale = torch.minimum(tint_a.square().mean(1), tint_b.square().mean(1)).sqrt() < PALE
    alike = (F.normalize(tint_a, dim=1) * F.normalize(tint_b, dim=1)).sum(1)
    return close & (pale | (alike > TINT))


def _tint(colours: Tensor) -> Tensor:
    """Coarse colours [N, 3, 4, 4] less their grey, [N, 48]."""
    return (colours - colours.mean(1, keepdim=True)).flatten(1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1) for x in (a, b))
    return (a * b).sum(1)


def _detail(grey: Tensor) -> tuple[Tensor, Tensor]:
    """The detail of images [N, SIDE, SIDE], and its standard deviation [N].

    It is divided by its local strength, or else a few strong edges would decide alone.
    """
    fine = grey - _blurred(grey)
    strength = fine.flatten(1).std(1)
    return fine / (_blurred(fine.square()).sqrt() + strength[:, None, None]), strength


def _blurred(grey: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(grey[:, None], (2, 2, 2, 2), mode="replicate"), 5, 1)[:, 0]


def _joined(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The groups that pairs connect."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while (up := parent.setdefault(i, i)) != i:
            parent[i] = parent[up]
            i = up
        return i

    for a, b in pairs:
        parent[root(max(a, b))] = root(min(a, b))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in sorted(parent):
        groups[root(i)].append(i)
    return [group for group in groups.values() if len(group) > 1]
