"""Losses of classification against PyTorch's, its settings and its answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checked import checked

import vitrail
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Labels
from vitrail.errors import UserError
from vitrail.sizes import SIZES
from vitrail.tasks.classify import Classes, Classification, Classify
from vitrail.train.loaders import evaluation_loader
from vitrail.train.probe import features
from vitrail.vit import ViT

NANO = SIZES["nano/2"]


def classifier(**options: object) -> Classify:
    torch.manual_seed(0)
    task = Classify(ViT(NANO), ["a", "b", "c"], Preprocess(size=(8, 8)), **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(task.get_parameter("head.linear.weight"))
    return task


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    return {
        "image": torch.randn(count, 3, 8, 8),
        "label": torch.arange(count) % 3,
        "sample": torch.arange(count),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_softmax_loss_equals_pytorchs(smoothing: float) -> None:
    task, b = classifier(smoothing=smoothing), batch()
    out = task.loss(b)
    expected = F.cross_entropy(task(b["image"]), b["label"], label_smoothing=smoothing)
    torch.testing.assert_close(out["loss"] / out["count"], expected)
    soft = {**b, "label": F.one_hot(b["label"], 3).float()}
    torch.testing.assert_close(task.loss(soft)["loss"], out["loss"])


def test_sigmoid_loss_equals_pytorchs_and_starts_low() -> None:
    task, b = classifier(loss="sigmoid"), batch()
    targets = F.one_hot(b["label"], 3).float()
    expected = F.binary_cross_entropy_with_logits(task(b["image"]), targets) * len(targets)
    torch.testing.assert_close(task.loss(b)["loss"], expected)
    # As in DeiT-III's code both images of a mix are there, whatever their shares.
    mixed = {**b, "label": 0.7 * targets + 0.3 * targets.roll(1, 1)}
    both = F.binary_cross_entropy_with_logits(task(b["image"]), targets + targets.roll(1, 1)) * len(targets)
    torch.testing.assert_close(task.loss(mixed)["loss"], both)
    fresh = Classify(ViT(NANO), ["a", "b", "c"], Preprocess(size=(8, 8)), loss="sigmoid")
    torch.testing.assert_close(fresh(b["image"]).sigmoid(), torch.full((6, 3), 0.25))  # 1 / (1 + K)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1"),
        ({"smoothing": -0.1}, "smoothing must be at least 0 and below 1"),
        ({"weighted": True, "balanced": True}, "add --no-balanced or --no-weighted"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Classification(**changes)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_class_weights_count_by_their_share_of_a_mixed_image() -> None:
    weights, shares = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.3, 0.7], [1.0, 0.0, 0.0]])
    task, b = classifier(class_weights=weights), batch()
    mixed = {**b, "image": b["image"][:3], "label": shares}
    expected = F.cross_entropy(task(mixed["image"]), shares, weights, reduction="sum")
    torch.testing.assert_close(task.loss(mixed)["loss"], expected)


def test_class_weights_scale_each_images_loss() -> None:
    weights, b = torch.tensor([1.0, 2.0, 0.5]), batch()
    task = classifier(class_weights=weights)
    expected = F.cross_entropy(task(b["image"]), b["label"], weight=weights, reduction="sum")
    torch.testing.assert_close(task.loss(b)["loss"], expected)


def test_predict_answers_in_order_best_first() -> None:
    task = classifier()
    images = [torch.randint(0, 256, (3, 8 + i, 10), dtype=torch.uint8) for i in range(5)]
    answers = task.predict(images, batch_size=2)
    assert len(answers) == 5
    for image, answer in zip(images, answers, strict=True):
        labels = checked(Classes, answer).labels
        scores = [label["score"] for label in labels]
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)
        alone = task(task.preprocess(image)[None]).softmax(1)[0]
        assert scores[0] == pytest.approx(alone.max().item(), rel=1e-4)
        assert labels[0]["label"] == task.classes[int(alone.argmax())]


def test_public_names() -> None:
    assert set(vitrail.__all__) == {"create", "load"}
    model = vitrail.create("S/16", classes=5, channels=4, image_size=(96, 128), depth=1)
    images = torch.randn(2, 4, 96, 128)
    assert model(images).shape == (2, 5)
    tokens = model.features(images)
    assert tokens.prefix.shape == (2, 1, 384) and tokens.patches.shape == (2, 48, 384) and tokens.grid == (6, 8)
    assert vitrail.create("nano/2")(torch.randn(2, 3, 8, 8)).shape == (2, 64)


@pytest.mark.parametrize("kind", ["classify", "embed"])
def test_damaged_weights_give_a_line_and_no_answer(kind: str) -> None:
    task = vitrail.create("nano/2", classes=3 if kind == "classify" else None)
    task.get_parameter("encoder.blocks.3.mlp.up.weight").data[0, 0] = torch.nan
    with pytest.raises(UserError, match="outputs are not finite: its weights are damaged"):
        task.predict([torch.zeros(3, 8, 8, dtype=torch.uint8)])


def test_flip_averages_the_outputs_with_those_of_the_mirror_image() -> None:
    task = classifier().eval()
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    plain, mirrored = (task(task.preprocess.normalise(each)) for each in (pixels, pixels.flip(-1)))
    assert not torch.allclose(plain, mirrored, atol=1e-2)
    assert task.preparation(train=False) is None
    task.choose({"flip": True})
    mean = (plain + mirrored) / 2
    for answer, row in zip(task.predict(pixels), mean.softmax(dim=1), strict=True):
        found = {label["label"]: label["score"] for label in answer.row()["labels"]}
        assert [found[name] for name in "abc"] == pytest.approx(row.tolist(), abs=1e-5)
    data = ImageSet("any", list("abcd"), pixels, Labels(torch.tensor([0, 1, 2, 0]), ["a", "b", "c"]))
    scores = task.evaluate({"val": evaluation_loader(task, data, torch.device("cpu"))})
    assert scores["cross_entropy"] == pytest.approx(F.cross_entropy(mean, data.labels).item(), abs=1e-5)
    assert scores["count"] == 4
    assert task.preparation(train=True) is None  # training sees each image once
    with pytest.raises(UserError, match="features are those of one frame per image"):
        features(task, evaluation_loader(task, data, torch.device("cpu")))
