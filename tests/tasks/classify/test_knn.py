"""k nearest neighbours, against a plain reference and scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from checked import checked
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from tasks.classify.clouds import clouds
from torch import Tensor

import vitrail
from vitrail.data.sets import open_data
from vitrail.tasks.classify import Classes, Classify
from vitrail.tasks.classify.knn import Neighbours
from vitrail.tasks.classify.probe import knn
from vitrail.tasks.values import Features
from vitrail.train.loaders import evaluation_loader
from vitrail.train.probe import features

CPU = torch.device("cpu")


def dino_knn(train: Features, vectors: Tensor, classes: int, k: int = 20, temperature: float = 0.07) -> Tensor:
    """One image and one neighbour at a time."""
    votes = torch.zeros(len(vectors), classes)
    for i, vector in enumerate(vectors):
        similar = [(float(F.cosine_similarity(vector, other, dim=0)), j) for j, other in enumerate(train.vectors)]
        for similarity, j in sorted(similar, reverse=True)[:k]:
            votes[i, int(train.labels[j])] += np.exp(similarity / temperature)
    return votes / votes.sum(dim=1, keepdim=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(2, 5), st.integers(2, 9), st.integers(0, 99))
def test_knn_counts_votes_as_the_plain_reference(images: int, classes: int, width: int, seed: int) -> None:
    train, queries = clouds(images, classes, width, seed), clouds(7, classes, width, seed + 1)
    votes = knn(train, queries.vectors, classes).exp()
    torch.testing.assert_close(votes, dino_knn(train, queries.vectors, classes), rtol=1e-3, atol=1e-4)


def test_knn_answers_as_scikit_learn() -> None:
    train, queries = clouds(300, 4, 16, 1), clouds(200, 4, 16, 2)
    units = [F.normalize(split.vectors, dim=1).double().numpy() for split in (train, queries)]

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances**2 / 2) / 0.07)  # of unit vectors, |a - b|^2 = 2 - 2 cos

    peer = KNeighborsClassifier(20, weights=weights).fit(units[0], train.labels.numpy())
    ours = knn(train, queries.vectors, 4).argmax(dim=1)
    assert (ours.numpy() == peer.predict(units[1])).mean() > 0.99


def test_one_neighbour_and_its_own_image() -> None:
    train = clouds(50, 3, 8)
    head = Neighbours(8, 3, 50, k=1)
    head.build_index(*train)
    assert torch.equal(head(train.vectors).argmax(dim=1), train.labels)
    assert head(train.vectors[:0]).shape == (0, 3)


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
    splits = open_data("digits")
    assert splits.test is not None
    train, queries = splits.train.subset(range(200)), splits.test.subset(range(50))
    # `predict` answers in fp32; by default the probe reads in bf16 if the processor has it.
    known, wanted = (features(encoder, evaluation_loader(encoder, split, CPU), "fp32") for split in (train, queries))
    task = Classify(encoder.encoder, train.classes, encoder.preprocess, neighbours=len(train))
    checked(Neighbours, task.head).build_index(*known)
    answers = [checked(Classes, answer).labels for answer in task.predict([queries.image(i) for i in range(50)])]
    chosen = torch.tensor([train.classes.index(labels[0]["label"]) for labels in answers])
    assert could_win(known, wanted, chosen).all()
    assert could_win(known, wanted, knn(known, wanted.vectors, 10).argmax(1)).all()
    # The check is not empty: two classes could win for almost no image.
    others = [could_win(known, wanted, torch.full((50,), i)) for i in range(10)]
    assert torch.stack(others).sum() <= 55
    assert sum(label["score"] for label in answers[0]) <= 1 + 1e-5
