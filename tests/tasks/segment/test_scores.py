"""Losses and scores of segmentation against formulas written another way."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.data.masks import Mask, Masks
from vitrail.data.sets import ImageSet
from vitrail.errors import UserError
from vitrail.tasks.segment.losses import dice_loss, one_hot, pixel_loss, query_loss
from vitrail.tasks.segment.metric import SegmentMetric
from vitrail.tasks.segment.task import log_weights


def batch_of(*masks: torch.Tensor, first: int = 0) -> dict[str, Any]:
    truth = [Mask(str(i), mask) for i, mask in enumerate(masks)]
    return {"sample": torch.arange(first, first + len(masks)), "truth": truth}


def answers_of(*masks: torch.Tensor) -> list[Any]:
    return [SimpleNamespace(mask=mask) for mask in masks]


def test_the_loss_of_an_image_is_the_mean_over_its_pixels_without_void() -> None:
    logits = torch.randn(2, 3, 4, 4)
    mask = torch.randint(0, 3, (2, 4, 4))
    mask[0, :2] = 255
    weights = torch.tensor([0.5, 1.0, 2.0])
    found = pixel_loss(logits, mask, weights, dice=0.0)
    pixels = [(i, y, x) for i in range(2) for y in range(4) for x in range(4) if mask[i, y, x] != 255]
    for i in range(2):
        own = [-logits[p[0], :, p[1], p[2]].log_softmax(0)[mask[p]] * weights[mask[p]] for p in pixels if p[0] == i]
        assert float(found[i]) == pytest.approx(float(sum(own) / len(own)), rel=1e-5)


def test_an_image_of_void_alone_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 8, 8), 255), None, dice=1.0)
    loss.sum().backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()
    outputs = {"classes": torch.randn(1, 2, 4), "masks": torch.randn(1, 2, 4, 4)}
    assert float(query_loss(outputs, torch.full((1, 8, 8), 255))) == 0


def test_dice_counts_each_class_of_an_image_equally() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, 0, 0] = 1
    right = one_hot(mask, mask >= 0, 3)
    assert float(dice_loss(right, right)) == pytest.approx(0)
    background = torch.zeros_like(right)
    background[:, 0] = 1
    # Class 0: 2 * 15 / (16 + 15); class 1, of one pixel, is missed; class 2 does not occur.
    assert float(dice_loss(background, right)) == pytest.approx(((1 - 30 / 31) + 1) / 2)


def test_queries_that_are_right_have_a_lower_loss_and_void_does_not_matter() -> None:
    pytest.importorskip("scipy")
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, :, 2:] = 1
    right = {"classes": torch.full((1, 3, 3), -9.0), "masks": torch.full((1, 3, 4, 4), -9.0)}
    for query, k in ((2, 0), (0, 1)):
        right["classes"][0, query, k] = 9.0
        right["masks"][0, query] = torch.where(mask[0] == k, 9.0, -9.0)
    right["classes"][0, 1, 2] = 9.0  # no object
    assert float(query_loss(right, mask)) < 0.01
    swapped = {**right, "classes": right["classes"][:, [2, 1, 0]]}
    assert float(query_loss(swapped, mask)) > 1
    void = mask.clone()
    void[0, 0] = 255
    changed = right["masks"].clone()
    changed[0, :, 0] = 3.0
    torch.testing.assert_close(query_loss({**right, "masks": changed}, void), query_loss(right, void))


def test_queries_are_matched_in_float32_under_autocast() -> None:
    """In bf16, about one in ten of these queries would be given another class."""
    pytest.importorskip("scipy")
    generator = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(8, 20, 7, generator=generator), torch.randn(8, 20, 16, 16, generator=generator)
    outputs = {"classes": 0.3 * classes, "masks": 0.5 * masks}
    mask = torch.randint(6, (8, 4, 4), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = query_loss(outputs, mask)
    torch.testing.assert_close(found, query_loss(outputs, mask))


def test_outputs_that_are_not_finite_give_a_loss_that_is_not_for_a_step_to_be_skipped() -> None:
    pytest.importorskip("scipy")
    outputs = {"classes": torch.full((1, 3, 3), math.nan), "masks": torch.full((1, 3, 4, 4), math.nan)}
    assert not query_loss(outputs, torch.zeros(1, 4, 4, dtype=torch.int64)).isfinite().any()


def test_miou_is_the_mean_over_classes_of_one_confusion_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    truths = [torch.randint(0, 4, (5, 7), generator=generator) for _ in range(3)]
    found = [torch.randint(0, 3, (5, 7), generator=generator) for _ in range(3)]
    truths[0][truths[0] == 3] = 255
    truths[1][truths[1] == 3] = 255
    truths[2][truths[2] == 3] = 255
    metric = SegmentMetric(["a", "b", "c", "never"])
    metric.update(batch_of(*truths), answers_of(*found))
    scores = metric.compute()
    t, p = (torch.cat([mask.flatten() for mask in masks]).numpy() for masks in (truths, found))
    t, p = t[t != 255], p[t != 255]
    wanted = [float(np.sum((t == k) & (p == k)) / np.sum((t == k) | (p == k))) for k in range(3)]
    assert scores["iou"][:3] == pytest.approx(wanted) and scores["iou"][3] is None
    assert scores["miou"] == pytest.approx(sum(wanted) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(float(np.mean(t == p)))
    assert scores["count"] == 3 and sum(map(sum, scores["confusion"])) == len(t)


def test_classes_of_the_data_may_have_another_order_and_must_be_known() -> None:
    metric = SegmentMetric(["road", "sky"], ["sky", "road"])
    metric.update(batch_of(torch.tensor([[0, 1]])), answers_of(torch.tensor([[1, 0]])))
    assert metric.compute()["miou"] == 1.0
    with pytest.raises(UserError, match="tree"):
        SegmentMetric(["road", "sky"], ["sky", "tree"])


def test_the_worst_images_are_those_with_the_fewest_right_pixels() -> None:
    metric = SegmentMetric(["a", "b"])
    truth = torch.tensor([[0, 0, 0, 1]])
    answers = ([[0, 0, 0, 1]], [[1, 1, 0, 1]], [[1, 1, 1, 0]], [[1, 0, 0, 1]])  # 0, 2, 4 and 1 are wrong
    for sample, answer in enumerate(answers):
        metric.update(batch_of(truth, first=sample), answers_of(torch.tensor(answer)))
    assert metric.compute()["worst"] == [2, 1, 3]


def test_an_image_of_void_alone_is_counted_and_changes_no_score() -> None:
    one, other = SegmentMetric(["a", "b"]), SegmentMetric(["a", "b"])
    one.update(batch_of(torch.full((2, 2), 255), first=7), answers_of(torch.zeros(2, 2)))
    other.update(batch_of(torch.tensor([[0, 1]])), answers_of(torch.tensor([[0, 0]])))
    other.merge(one.state())
    scores = other.compute()
    assert scores["count"] == 2 and scores["iou"] == [0.5, 0.0]
    assert one.compute()["miou"] is None and one.compute()["pixel_accuracy"] is None


@given(sizes=st.lists(st.integers(1, 30), min_size=3, max_size=3))
@settings(max_examples=20)
def test_class_weights_have_a_mean_of_one_over_pixels(sizes: list[int]) -> None:
    mask = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])[None].to(torch.uint8)
    images = ImageSet("x", ["0"], [torch.zeros(3, *mask.shape)], Masks([mask], ["0"], ["a", "b", "c"]))
    weights = log_weights(images)
    share = torch.tensor(sizes) / sum(sizes)
    assert float((weights * share).sum()) == pytest.approx(1, abs=1e-5)
    ratio = math.log(1.02 + float(share[1])) / math.log(1.02 + float(share[0]))
    assert float(weights[0] / weights[1]) == pytest.approx(ratio, rel=1e-4)


def test_gradients_of_the_loss_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (2, 4, 4))
    logits = torch.randn(2, 3, 2, 2, dtype=torch.float32)

    def of(values: torch.Tensor) -> torch.Tensor:
        return pixel_loss(values, mask, None, dice=0.7).sum()

    (analytic,) = torch.autograd.grad(of(logits.requires_grad_()), logits)
    step = 1e-2
    for place in [(0, 0, 0, 0), (1, 2, 1, 0)]:
        up, down = logits.detach().clone(), logits.detach().clone()
        up[place] += step
        down[place] -= step
        numeric = float(of(up) - of(down)) / (2 * step)
        assert float(analytic[place]) == pytest.approx(numeric, rel=2e-2, abs=1e-4)
