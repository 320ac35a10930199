"""Deletion and insertion curves against a model whose score is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitrail.explain.faithful import Curves, curves


def corner(images: Tensor) -> Tensor:
    """The brightness of the upper left patch of 2 x 2 pixels."""
    return images[:, 0, :2, :2].mean(dim=(1, 2))


def test_curves_follow_the_order_of_the_map() -> None:
    images = torch.ones(2, 1, 4, 4)
    images[:, :, :2, :2] = 5.0
    maps = torch.tensor([[1.0, 0.5, 0.2, 0.1], [0.1, 0.2, 0.5, 1.0]])  # the corner first, and last
    found = curves(corner, images, maps, (2, 2), steps=4)
    assert found.deletion[0].tolist() == pytest.approx([5, 0, 0, 0, 0])
    assert found.deletion[1].tolist() == pytest.approx([5, 5, 5, 5, 0])
    assert found.insertion[0, 1:].tolist() == pytest.approx([5, 5, 5, 5])
    assert (found.insertion[1, :4] < 3).all() and float(found.insertion[1, 4]) == pytest.approx(5)
    deletion, insertion = found.areas()
    assert float(deletion[0]) == pytest.approx(5 / 8) and float(deletion[1]) == pytest.approx(5 * 7 / 8)
    assert insertion[0] > insertion[1]


def test_areas_are_means_over_the_share_of_changed_patches() -> None:
    line = torch.linspace(0, 1, 11)[None]
    deletion, insertion = Curves(line, torch.ones(1, 11)).areas()
    assert float(deletion) == pytest.approx(0.5) and float(insertion) == pytest.approx(1)


def test_steps_are_at_most_the_patches_and_end_with_all_of_them() -> None:
    images = torch.randn(1, 3, 6, 6)
    found = curves(corner, images, torch.rand(1, 9), (3, 3), steps=100)
    assert found.deletion.shape == (1, 10)
    assert float(found.deletion[0, 0]) == pytest.approx(float(corner(images)))
    assert float(found.deletion[0, -1]) == 0
    assert float(found.insertion[0, -1]) == pytest.approx(float(corner(images)))
    assert curves(corner, images, torch.rand(1, 9), (3, 3), steps=4).deletion.shape == (1, 5)
