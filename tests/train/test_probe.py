"""k nearest neighbours and the linear probe, each beside a plain reference and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import checked
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import vitrail
from vitrail.data.sets import open_data
from vitrail.tasks.classify import Classes, Classify
from vitrail.tasks.knn import Neighbours
from vitrail.tasks.linear_probe import STRENGTHS, linear_probe, logistic_regression, scores_of
from vitrail.tasks.values import Features
from vitrail.train.build import evaluation_loader
from vitrail.train.probe import features, knn

CPU = torch.device("cpu")


def clouds(count: int, classes: int, width: int, seed: int = 0, spread: float = 2.0) -> Features:
    """A cloud a class, overlapping, with axes of very different scale; the centres are the same for every seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    vectors = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return Features(vectors * torch.logspace(-2, 2, width) + 3, labels)


def dino_knn(train: Features, vectors: Tensor, classes: int, k: int = 20, temperature: float = 0.07) -> Tensor:
    """An image and a neighbour at a time."""
    votes = torch.zeros(len(vectors), classes)
    for i, vector in enumerate(vectors):
        similar = [(float(F.cosine_similarity(vector, other, dim=0)), j) for j, other in enumerate(train.vectors)]
        for similarity, j in sorted(similar, reverse=True)[:k]:
            votes[i, int(train.labels[j])] += np.exp(similarity / temperature)
    return votes / votes.sum(dim=1, keepdim=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(2, 5), st.integers(2, 9), st.integers(0, 99))
def test_knn_counts_votes_as_the_plain_reference(images: int, classes: int, width: int, seed: int) -> None:
    train, asked = clouds(images, classes, width, seed), clouds(7, classes, width, seed + 1)
    votes = knn(train, asked.vectors, classes).exp()
    torch.testing.assert_close(votes, dino_knn(train, asked.vectors, classes), rtol=1e-3, atol=1e-4)


def test_knn_answers_as_scikit_learn() -> None:
    train, asked = clouds(300, 4, 16, 1), clouds(200, 4, 16, 2)
    units = [F.normalize(part.vectors, dim=1).double().numpy() for part in (train, asked)]

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances**2 / 2) / 0.07)  # of unit vectors, |a - b|^2 = 2 - 2 cos

    peer = KNeighborsClassifier(20, weights=weights).fit(units[0], train.labels.numpy())
    ours = knn(train, asked.vectors, 4).argmax(dim=1)
    assert (ours.numpy() == peer.predict(units[1])).mean() > 0.99


def test_one_neighbour_and_its_own_image() -> None:
    train = clouds(50, 3, 8)
    head = Neighbours(8, 3, 50, k=1)
    head.build_index(*train)
    assert torch.equal(head(train.vectors).argmax(dim=1), train.labels)
    assert head(train.vectors[:0]).shape == (0, 3)


@pytest.mark.parametrize("classes, strength", [(3, 0.1), (5, 1e-3), (2, 1e-2)])
def test_logistic_regression_reaches_scikit_learns_optimum(classes: int, strength: float) -> None:
    part = clouds(240, classes, 12)
    x = part.vectors.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = logistic_regression(
        x, part.labels, torch.zeros(classes, 12).double(), torch.zeros(classes).double(), strength
    )
    # For two classes scikit-learn has one vector w where we have w / 2 and -w / 2, whose squares sum to half of its.
    c = 1 / (strength * len(x)) * (2 if classes == 2 else 1)
    peer = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x.numpy(), part.labels.numpy())
    ours = F.linear(x, weight, bias).softmax(dim=1)
    torch.testing.assert_close(ours, torch.from_numpy(peer.predict_proba(x.numpy())), rtol=0, atol=1e-5)
    if classes > 2:
        torch.testing.assert_close(weight, torch.from_numpy(peer.coef_), rtol=0, atol=1e-5)


def test_where_the_solver_begins_does_not_matter() -> None:
    part = clouds(100, 3, 6)
    x = F.normalize(part.vectors.double(), dim=0) * 10
    zero = torch.zeros(3, 6).double(), torch.zeros(3).double()
    other = torch.randn(3, 6).double(), torch.zeros(3).double()
    for a, b in zip(
        logistic_regression(x, part.labels, *zero, 0.01),
        logistic_regression(x, part.labels, *other, 0.01),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_probe_is_scikit_learns_on_standardised_features_and_takes_them_as_they_are() -> None:
    train, val, asked = (clouds(n, 4, 10, seed) for n, seed in ((200, 1), (100, 2), (150, 3)))
    found = linear_probe(train, val, 4)
    mean, std = train.vectors.double().mean(0), train.vectors.double().std(0, correction=0)
    x, z = ((part.vectors.double() - mean) / std for part in (train, asked))
    peer = LogisticRegression(C=1 / (found.strength * len(x)), tol=1e-10, max_iter=10_000)
    peer.fit(x.numpy(), train.labels.numpy())
    theirs = torch.from_numpy(peer.predict_log_proba(z.numpy()))
    torch.testing.assert_close(found(asked.vectors).log_softmax(1).double(), theirs, rtol=1e-3, atol=1e-3)


def test_the_strength_is_the_best_on_the_validation_part() -> None:
    train, val = clouds(60, 3, 30, 1, spread=3), clouds(90, 3, 30, 2, spread=3)
    found = linear_probe(train, val, 3)
    tried = {row["strength"]: row["cross_entropy"] for row in found.tried}
    assert list(tried) == list(STRENGTHS[: len(tried)])
    assert min(tried, key=lambda strength: tried[strength]) == found.strength
    assert len(tried) < len(STRENGTHS), "weak penalties overfit here, and are left out"
    assert scores_of(found(val.vectors), val.labels)["cross_entropy"] == pytest.approx(tried[found.strength], rel=1e-4)


def test_a_feature_without_spread_does_no_harm() -> None:
    train, val = clouds(60, 3, 5, 1), clouds(60, 3, 5, 2)
    for part in (train, val):
        part.vectors[:, 2] = 4.0
    found = linear_probe(train, val, 3)
    assert found.weight.isfinite().all() and found.bias.isfinite().all()


def test_features_are_what_enters_the_head_read_once_in_order() -> None:
    torch.manual_seed(0)
    task = vitrail.create("nano/2", classes=10, channels=1)
    torch.nn.init.normal_(task.get_parameter("head.linear.weight"))
    test = open_data("digits").test
    assert test is not None
    part = test.subset(range(300))
    found = features(task, evaluation_loader(task, part, CPU), "fp32")
    assert torch.equal(found.labels, part.labels) and found.vectors.shape == (300, 64)
    images = torch.stack([task.preprocess(part.image(i)) for i in range(300)])
    with torch.no_grad():
        torch.testing.assert_close(task.get_submodule("head")(found.vectors), task(images), rtol=1e-4, atol=1e-5)


def could_win(known: Features, wanted: Features, chosen: Tensor) -> Tensor:
    """Whether the classes `chosen` [N] have the most votes of the 20 nearest, where rounding may decide which these are
    and which of two classes with as many votes is first, [N]."""
    cosines = F.normalize(wanted.vectors.double(), dim=1) @ F.normalize(known.vectors.double(), dim=1).T
    last = cosines.topk(20, dim=1).values[:, -1:]
    votes = F.one_hot(known.labels, 10).double()
    weights = (cosines / 0.07).exp()
    most = (weights * (cosines > last - 1e-5)) @ votes
    least = (weights * (cosines > last + 1e-5)) @ votes
    return most.gather(1, chosen[:, None])[:, 0] > least.max(1).values * (1 - 1e-4)


def test_the_bundled_head_answers_as_the_probe(tmp_path: object) -> None:
    torch.manual_seed(0)
    encoder = vitrail.create("nano/2", channels=1)
    parts = open_data("digits")
    assert parts.test is not None
    train, asked = parts.train.subset(range(200)), parts.test.subset(range(50))
    # `predict` answers in fp32; left to itself the probe reads in bf16 where the processor has that.
    known, wanted = (features(encoder, evaluation_loader(encoder, part, CPU), "fp32") for part in (train, asked))
    task = Classify(encoder.encoder, train.classes, encoder.preprocess, neighbours=len(train))
    checked(Neighbours, task.head).build_index(*known)
    answers = [checked(Classes, answer).labels for answer in task.predict([asked.image(i) for i in range(50)])]
    chosen = torch.tensor([train.classes.index(labels[0]["label"]) for labels in answers])
    assert could_win(known, wanted, chosen).all()
    assert could_win(known, wanted, knn(known, wanted.vectors, 10).argmax(1)).all()
    # A class chosen blindly would be found out: of almost no image could two win.
    others = [could_win(known, wanted, torch.full((50,), i)) for i in range(10)]
    assert torch.stack(others).sum() <= 55
    assert sum(label["score"] for label in answers[0]) <= 1 + 1e-5
