"""The linear probe, against scikit-learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tasks.classify.clouds import clouds

from vitrail.tasks.classify.linear_probe import STRENGTHS, linear_probe, logistic_regression, scores_of


@pytest.mark.parametrize("classes, strength", [(3, 0.1), (5, 1e-3), (2, 1e-2)])
def test_logistic_regression_reaches_scikit_learns_optimum(classes: int, strength: float) -> None:
    split = clouds(240, classes, 12)
    x = split.vectors.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = logistic_regression(
        x, split.labels, torch.zeros(classes, 12).double(), torch.zeros(classes).double(), strength
    )
    # For two classes scikit-learn has one vector w where we have w / 2 and -w / 2, whose squares sum to half of its.
    c = 1 / (strength * len(x)) * (2 if classes == 2 else 1)
    peer = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x.numpy(), split.labels.numpy())
    ours = F.linear(x, weight, bias).softmax(dim=1)
    torch.testing.assert_close(ours, torch.from_numpy(peer.predict_proba(x.numpy())), rtol=0, atol=1e-5)
    if classes > 2:
        torch.testing.assert_close(weight, torch.from_numpy(peer.coef_), rtol=0, atol=1e-5)


def test_the_initial_weights_of_the_solver_do_not_matter() -> None:
    split = clouds(100, 3, 6)
    x = F.normalize(split.vectors.double(), dim=0) * 10
    zero = torch.zeros(3, 6).double(), torch.zeros(3).double()
    other = torch.randn(3, 6).double(), torch.zeros(3).double()
    for a, b in zip(
        logistic_regression(x, split.labels, *zero, 0.01),
        logistic_regression(x, split.labels, *other, 0.01),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_probe_is_scikit_learns_on_standardised_features() -> None:
    train, val, test = (clouds(n, 4, 10, seed) for n, seed in ((200, 1), (100, 2), (150, 3)))
    found = linear_probe(train, val, 4)
    mean, std = train.vectors.double().mean(0), train.vectors.double().std(0, correction=0)
    x, z = ((split.vectors.double() - mean) / std for split in (train, test))
    peer = LogisticRegression(C=1 / (found.strength * len(x)), tol=1e-10, max_iter=10_000)
    peer.fit(x.numpy(), train.labels.numpy())
    theirs = torch.from_numpy(peer.predict_log_proba(z.numpy()))
    torch.testing.assert_close(found(test.vectors).log_softmax(1).double(), theirs, rtol=1e-3, atol=1e-3)


def test_the_strength_is_the_best_on_the_validation_split() -> None:
    train, val = clouds(60, 3, 30, 1, spread=3), clouds(90, 3, 30, 2, spread=3)
    found = linear_probe(train, val, 3)
    tried = {row["strength"]: row["cross_entropy"] for row in found.tried}
    assert list(tried) == list(STRENGTHS[: len(tried)])
    assert min(tried, key=lambda strength: tried[strength]) == found.strength
    assert len(tried) < len(STRENGTHS), "weak penalties overfit here, and are left out"
    assert scores_of(found(val.vectors), val.labels)["cross_entropy"] == pytest.approx(tried[found.strength], rel=1e-4)


def test_a_feature_without_spread_does_no_harm() -> None:
    train, val = clouds(60, 3, 5, 1), clouds(60, 3, 5, 2)
    for split in (train, val):
        split.vectors[:, 2] = 4.0
    found = linear_probe(train, val, 3)
    assert found.weight.isfinite().all() and found.bias.isfinite().all()
