"""Norms, colours, similarity and nearest images against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitrail.explain.tokens import nearest, outliers, patch_similarity, pca_colours, token_norms


def test_norms_are_lengths() -> None:
    hidden = [torch.randn(2, 5, 3), torch.randn(2, 5, 3)]
    found = token_norms(hidden)
    assert found.shape == (2, 2, 5)
    assert float(found[1, 0, 3]) == pytest.approx(math.sqrt(sum(float(x) ** 2 for x in hidden[1][0, 3])))


def test_outliers_are_several_times_longer_than_the_median() -> None:
    norms = torch.tensor([[1.0, 2.0, 2.0, 6.1, 2.0], [6.0, 2.0, 2.0, 2.0, 100.0]])
    assert outliers(norms).tolist() == [[False, False, False, True, False], [False, False, False, False, True]]
    assert not outliers(torch.zeros(4)).any()


def test_colours_are_principal_components() -> None:
    """Numpy's eigenvectors of the covariance give the same order of patches, up to the sign."""
    patches = torch.randn(2, 40, 6) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1])
    colours, shares = pca_colours(patches)
    assert colours.shape == (2, 40, 3) and colours.min() >= 0 and colours.max() <= 1
    flat = patches.flatten(0, 1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    np.testing.assert_allclose(shares, values[::-1][:3] / values.sum(), rtol=1e-4)
    for component in range(3):
        expected = (flat - flat.mean(0)) @ vectors[:, -1 - component]
        middle = (colours.flatten(0, 1)[:, component] > 0) & (colours.flatten(0, 1)[:, component] < 1)
        assert abs(np.corrcoef(expected[middle], colours.flatten(0, 1)[middle, component])[0, 1]) > 0.999


def test_colours_of_few_or_equal_patches() -> None:
    colours, shares = pca_colours(torch.ones(1, 4, 8))
    assert (colours == 0.5).all() and not shares.any()
    colours, shares = pca_colours(torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]))
    assert colours[..., 2].eq(0.5).all() and shares.tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    assert colours[0, :, 0].sort().values.tolist() == pytest.approx([0, 1])


def test_similarity_is_the_cosine() -> None:
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    found = patch_similarity(a, b)
    expected = float(a[2] @ b[4]) / math.sqrt(float(a[2] @ a[2]) * float(b[4] @ b[4]))
    assert found.shape == (3, 5) and float(found[2, 4]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(patch_similarity(a, a).diagonal(), torch.ones(3))


def test_nearest_is_sorted_by_similarity() -> None:
    gallery = torch.tensor([[0.0, 1.0], [2.0, 0.1], [-1.0, 0.0], [5.0, 5.0]])
    places, scores = nearest(torch.tensor([3.0, 0.0]), gallery, 3)
    assert places == [1, 3, 0]
    assert scores == pytest.approx([2 / math.hypot(2, 0.1), math.sqrt(0.5), 0], abs=1e-6)
