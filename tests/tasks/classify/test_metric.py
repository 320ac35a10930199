"""Scores of a classifier against scikit-learn's and hand-made ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.sizes import SIZES
from vitrail.tasks.classify import Classify
from vitrail.tasks.classify.metric import ClassifyMetric, calibration_error
from vitrail.vit import ViT

NANO = SIZES["nano/2"]


def test_scores_equal_scikit_learns_and_a_repeated_sample_counts_once() -> None:
    torch.manual_seed(3)
    classes, count = 7, 50
    task = Classify(ViT(NANO), [str(i) for i in range(classes)], Preprocess(size=(8, 8)))
    logits, labels = torch.randn(count, classes), torch.randint(0, classes, (count,))
    labels[labels == 6] = 5  # a class without an image
    metric, other = task.metric(), task.metric()
    for rows in (slice(0, 20), slice(10, 32)):  # ten samples twice
        metric.update({"label": labels[rows], "sample": torch.arange(count)[rows]}, logits[rows])
    other.update({"label": labels[30:], "sample": torch.arange(count)[30:]}, logits[30:])
    metric.merge(other.state())
    scores = metric.compute()
    assert scores["count"] == count
    kinds = range(classes)
    assert scores["top1"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1, labels=kinds))
    assert scores["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=kinds))
    assert scores["confusion"] == confusion_matrix(labels, logits.argmax(1), labels=kinds).tolist()
    assert scores["per_class"][6] is None
    assert scores["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_scores_of_data_with_some_of_the_models_classes_in_another_order() -> None:
    """No output is masked: the scores are those of all the model's classes, in its order."""
    torch.manual_seed(4)
    own, data, count = ["ant", "bee", "cat", "dog", "elk"], ["Dog", "ant", "CAT"], 60
    task = Classify(ViT(NANO), own, Preprocess(size=(8, 8)))
    logits, labels = torch.randn(count, 5), torch.randint(0, 3, (count,))
    metric = ClassifyMetric(task, data)
    metric.update({"label": labels, "sample": torch.arange(count)}, logits)
    scores = metric.compute()
    right, guess = torch.tensor([3, 0, 2])[labels], logits.argmax(1)
    assert scores["classes"] == own
    assert scores["confusion"] == confusion_matrix(right, guess, labels=range(5)).tolist()
    assert scores["top1"] == pytest.approx((guess == right).double().mean().item())
    assert [scores["per_class"][i] is None for i in range(5)] == [False, True, False, False, True]
    assert scores["per_class"][3] == pytest.approx((guess[right == 3] == 3).double().mean().item())
    assert scores["cross_entropy"] == pytest.approx(F.cross_entropy(logits, right).item(), rel=1e-5)
    with pytest.raises(UserError, match="does not know 'fox'"):
        ClassifyMetric(task, ["ant", "fox"])


def test_calibration_error_of_known_cases() -> None:
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 0])) == 0
    assert calibration_error(sure, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)
    mixed = torch.tensor([[0.75, 0.25]] * 4)
    assert calibration_error(mixed, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.0)


def test_calibration_and_the_worst_mistakes_are_those_of_the_images() -> None:
    task = Classify(ViT(NANO), ["cat", "dog"], Preprocess(size=(8, 8)))
    probabilities = torch.tensor([[0.99, 0.01], [0.4, 0.6], [0.98, 0.02], [0.97, 0.03], [0.59, 0.41], [0.985, 0.015]])
    labels = torch.tensor([0, 0, 1, 0, 1, 1])
    metric = task.metric()
    metric.update({"label": labels, "sample": torch.tensor([10, 11, 12, 13, 14, 15])}, probabilities.log())
    scores = metric.compute()
    assert scores["worst"] == [15, 12, 11, 14], "the most confident wrong answer first"
    low, middle, high = scores["calibration"]
    assert low == pytest.approx({"count": 1, "confidence": 0.59, "accuracy": 0.0})
    assert middle == pytest.approx({"count": 1, "confidence": 0.6, "accuracy": 0.0})
    assert high == pytest.approx({"count": 4, "confidence": (0.99 + 0.98 + 0.97 + 0.985) / 4, "accuracy": 0.5})
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in scores["calibration"]]
    assert scores["calibration_error"] == pytest.approx(sum(gaps) / 6)
