"""Features of a frozen encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitrail
from vitrail.data.loader import Loader
from vitrail.data.sets import ImageSet, open_data
from vitrail.data.targets import Texts
from vitrail.errors import UserError
from vitrail.train.loaders import evaluation_loader
from vitrail.train.probe import features, probe

CPU = torch.device("cpu")


def test_features_are_what_enters_the_head_read_once_in_order() -> None:
    torch.manual_seed(0)
    task = vitrail.create("nano/2", classes=10, channels=1)
    torch.nn.init.normal_(task.get_parameter("head.linear.weight"))
    test = open_data("digits").test
    assert test is not None
    chosen = test.subset(range(300))
    found = features(task, evaluation_loader(task, chosen, CPU), "fp32")
    assert torch.equal(found.labels, chosen.labels) and found.vectors.shape == (300, 64)
    images = torch.stack([task.preprocess(chosen.image(i)) for i in range(300)])
    with torch.no_grad():
        torch.testing.assert_close(task.get_submodule("head")(found.vectors), task(images), rtol=1e-4, atol=1e-5)


def test_features_of_a_split_without_a_readable_image_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(b"no image")
    task, images = vitrail.create("nano/2"), open_data(tmp_path / "data").train
    loader = Loader(images, task.preprocess, batch_size=2, seed=0, train=False, memory=False, max_bad=1.0)
    with pytest.raises(UserError, match="no image of data can be read"):
        features(task, loader)


def test_features_without_a_class_per_image_are_refused() -> None:
    task = vitrail.create("nano/2")
    captions = ImageSet("two", ["a", "b"], [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2, Texts([["a dog"], ["a cat"]]))
    loader = evaluation_loader(task, captions, CPU)
    with pytest.raises(UserError, match="one label per image, and captions are none"):
        probe(task, loader, loader, loader)
