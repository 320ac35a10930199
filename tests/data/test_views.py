"""One preparation: what `prepare` gives for an image alone is what the loader gives it in a batch; several views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from images import folder_of
from torch import Tensor

from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.prepare import View, prepare
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, open_data
from vitrail.errors import UserError

SMALL = Preprocess(size=(24, 32))
AUGMENTS = {
    "crop": Augment(crop="resized", scale=(0.3, 1.0), flip=True),
    "shift": Augment(crop="shift", shift=3, flip=True, erase=0.5),
    "policy": Augment(crop="resized", scale=(0.5, 1.0), policy="randaugment"),
}


@pytest.fixture
def photos(tmp_path: Path) -> ImageSet:
    return open_data(folder_of(tmp_path / "photos", {"a": 5, "b": 4})).train


def loader(photos: ImageSet, augment: Augment, **changes: Any) -> Loader:
    options: dict[str, Any] = {"batch_size": 4, "seed": 3, "train": True, "augment": augment, "memory": False}
    return Loader(photos, SMALL, **{**options, **changes})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_an_image_alone_is_prepared_as_in_a_training_batch(photos: ImageSet, augment: Augment, workers: int) -> None:
    batches = loader(photos, augment, workers=workers).batches()
    for _ in range(3):
        batch = next(batches)
        for image, sample in zip(batch["image"], batch["sample"].tolist(), strict=True):
            alone = prepare(photos.read(sample), SMALL, augment, (3, int(batch["epoch"]), sample))
            assert torch.equal(SMALL.normalise(alone.images[0]), image)
            assert (alone.affine is None) == (augment.policy == "randaugment")


def test_an_image_alone_is_prepared_as_in_evaluation(photos: ImageSet) -> None:
    for batch in loader(photos, Augment(), train=False).evaluation():
        for image, sample in zip(batch["image"], batch["sample"].tolist(), strict=True):
            alone = prepare(photos.read(sample), SMALL)
            assert torch.equal(SMALL.normalise(alone.images[0]), image)
            assert alone.affine is not None and alone.affine.size == SMALL.size


VIEWS = (View(2, (24, 32)), View(3, (16, 16)))


def several(photos: ImageSet, name: str, **changes: Any) -> dict[int, list[Tensor]]:
    """Of each image of an epoch, all that it becomes."""
    found: dict[int, list[Tensor]] = {}
    made = loader(photos, AUGMENTS[name], views=VIEWS, **changes)
    for _, batch in zip(range(made.steps_per_epoch), made.batches(), strict=False):
        assert torch.equal(batch["views"][0], batch["image"]) and len(batch["views"]) == 5
        for row, sample in enumerate(batch["sample"].tolist()):
            found[sample] = [view[row] for view in batch["views"]]
    return found


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("name", AUGMENTS)
def test_views_have_their_own_draws_and_sizes(photos: ImageSet, name: str, memory: bool) -> None:
    found = several(photos, name, memory=memory)
    for views in found.values():
        assert [tuple(view.shape[1:]) for view in views] == [(24, 32)] * 2 + [(16, 16)] * 3
    differ = [not torch.equal(views[0], views[1]) or not torch.equal(views[2], views[3]) for views in found.values()]
    assert sum(differ) > len(differ) / 2
    others = several(photos, name, memory=memory, batch_size=2, workers=0 if memory else 2)
    for sample in found.keys() & others.keys():
        for one, other in zip(found[sample], others[sample], strict=True):
            torch.testing.assert_close(one, other)


def test_several_views_are_not_mixed(photos: ImageSet) -> None:
    with pytest.raises(UserError, match="mixup and cutmix mix one image per sample"):
        loader(photos, Augment(mixup=0.5), views=VIEWS)
