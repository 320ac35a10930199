"""Batches are a function of seed and step: any number of workers, any start, any number of processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from images import encoded, folder_of, smooth

from vitrail.data import loader as module
from vitrail.data.augment import Augment
from vitrail.data.decode import Preprocess
from vitrail.data.loader import Batch, Loader, Tally, _occurrence
from vitrail.data.sets import ImageSet, open_data
from vitrail.errors import RunError, UserError

SMALL = Preprocess((16, 16))
AUGMENT = Augment(crop="resized", flip=True, policy="trivial", erase=0.5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = folder_of(tmp_path_factory.mktemp("photos"), {"a": 7, "b": 5}, (40, 50))
    (root / "a" / "tall.png").write_bytes(encoded(smooth(70, 30)))
    return open_data(root).train


def loader(part: ImageSet, **changes: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "train": True, "augment": AUGMENT, "memory": False}
    return Loader(part, SMALL, **(settings | changes))


def take(made: Loader, count: int, start: int = 0) -> list[Batch]:
    batches = made.batches(start)
    return [next(batches) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("image", "label", "sample")
    )


def test_workers_do_not_matter(photos: ImageSet) -> None:
    before = torch.get_rng_state()
    plain = take(loader(photos), 5)
    assert plain[0]["image"].shape == (4, 3, 16, 16) and plain[0]["image"].dtype == torch.float32
    for workers in (1, 2):
        assert same(take(loader(photos, workers=workers), 5), plain)
    assert torch.equal(torch.get_rng_state(), before), "the model's random stream was touched"


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
@pytest.mark.parametrize("balanced", [False, True])
def test_start_from_any_step(photos: ImageSet, memory: bool, crop: Any, balanced: bool) -> None:
    settings = {"memory": memory, "augment": Augment(crop=crop, flip=True), "balanced": balanced}
    whole = take(loader(photos, **settings), 8)
    assert same(take(loader(photos, **settings), 3, start=5), whole[5:])
    assert [batch["epoch"] for batch in whole] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("memory", [False, True])
def test_batch_size_does_not_change_an_image(photos: ImageSet, memory: bool) -> None:
    def by_sample(size: int) -> dict[int, torch.Tensor]:
        made = loader(photos, batch_size=size, memory=memory)
        batches = take(made, made.steps_per_epoch)
        return {int(s): image for b in batches for s, image in zip(b["sample"], b["image"], strict=True)}

    one, many = by_sample(1), by_sample(13)
    assert len(one) == len(many) == 13
    assert all(torch.equal(one[sample], many[sample]) for sample in one)


def test_epochs_are_permutations(photos: ImageSet) -> None:
    made = loader(photos, batch_size=13)
    first, second = (batch["sample"] for batch in take(made, 2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(13))
    assert first.tolist() != second.tolist() != list(range(13))
    assert take(loader(photos, batch_size=13, seed=1), 1)[0]["sample"].tolist() != first.tolist()
    small = loader(photos, batch_size=64)
    assert small.steps_per_epoch == 1 and len(take(small, 1)[0]["sample"]) == 13


@pytest.mark.parametrize("memory", [False, True])
def test_processes_share_a_batch(photos: ImageSet, memory: bool) -> None:
    whole = take(loader(photos, memory=memory), 4)
    parts = [take(loader(photos, memory=memory, rank=rank, world=2), 4) for rank in range(2)]
    for step, batch in enumerate(whole):
        for rank in range(2):
            assert torch.equal(parts[rank][step]["image"], batch["image"][rank::2])
    seen = [int(s) for rank in range(2) for b in loader(photos, rank=rank, world=2).evaluation() for s in b["sample"]]
    assert sorted(seen) == list(range(13))


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_every_image_once_in_order(photos: ImageSet, memory: bool, train: bool, workers: int) -> None:
    batches = list(loader(photos, memory=memory, train=train, workers=workers).evaluation())
    assert [len(b["sample"]) for b in batches] == [4, 4, 4, 1]
    samples = torch.cat([b["sample"] for b in batches])
    assert samples.tolist() == list(range(13))
    assert torch.equal(torch.cat([b["label"] for b in batches]), photos.labels)
    image = SMALL(photos.image(9))
    assert (batches[2]["image"][1] - image).abs().max() < 0.02


def test_memory_and_streaming_agree_where_nothing_is_scaled(tmp_path: Path) -> None:
    part = open_data(folder_of(tmp_path, {"a": 4, "b": 4}, (28, 31))).train
    for crop in ("none", "resized"):
        augment = Augment(crop=crop, flip=True)
        streamed, kept = (take(loader(part, augment=augment, memory=memory), 4) for memory in (False, True))
        assert same(streamed, kept)


def test_arrays_stay_on_the_device() -> None:
    train = open_data("digits").train
    made = Loader(
        train, Preprocess((8, 8), channels=1), batch_size=64, seed=0, train=True, augment=Augment(crop="shift", shift=1)
    )
    assert made.memory and made.steps_per_epoch == 1437 // 64
    batch = take(made, 1)[0]
    assert batch["image"].shape == (64, 1, 8, 8) and torch.equal(batch["label"], train.labels[batch["sample"]])
    assert made.wait > 0


def test_soft_targets(photos: ImageSet) -> None:
    batch = take(loader(photos, augment=Augment(mixup=0.8)), 1)[0]
    assert batch["label"].shape == (4, 2) and batch["label"].dtype == torch.float32


def test_balanced_draws_classes_evenly_and_repeats_differ() -> None:
    images = torch.from_numpy(smooth(16, 16)).permute(2, 0, 1).expand(200, -1, -1, -1).contiguous()
    labels = torch.tensor([0] * 190 + [1] * 10)
    part = ImageSet("uneven", ["many", "few"], labels, [str(i) for i in range(200)], images)
    made = loader(part, batch_size=200, balanced=True, augment=Augment(crop="resized"), memory=True)
    batch = take(made, 1)[0]
    assert 70 < int(batch["label"].sum()) < 130
    again = batch["image"][batch["sample"] == batch["sample"][batch["label"] == 1][0]]
    assert len(again) > 3 and len({image.numpy().tobytes() for image in again}) >= len(again) - 1
    assert _occurrence(torch.tensor([3, 5, 3, 3, 5])).tolist() == [0, 0, 1, 2, 1]


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["none", "resized"])
def test_bad_images_are_named_once_and_left_out(
    tmp_path: Path, memory: bool, workers: int, crop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder_of(tmp_path, {"a": 6, "b": 6})
    (root / "a" / "3.jpg").write_bytes(b"")
    cut = root / "b" / "2.jpg"
    cut.write_bytes(encoded(smooth(), "PNG")[:1500])
    part = open_data(root).train
    settings = {"memory": memory, "workers": workers, "augment": Augment(crop=crop), "max_bad": 0.2}
    with caplog.at_level(logging.WARNING, "vitrail"):
        made = loader(part, **settings)
        batches = take(made, 6)
        seen = {int(s) for b in batches for s in b["sample"]}
        assert not seen & {3, 8} and set(made.bad) == {3, 8}
        assert [len(b["sample"]) for b in batches] == [4] * 6
        assert all(torch.equal(b["label"], part.labels[b["sample"]]) for b in batches)
        evaluated = [int(s) for b in made.evaluation() for s in b["sample"]]
        assert evaluated == [i for i in range(12) if i not in (3, 8)]
    assert sorted(record.message for record in caplog.records) == [
        "left out: a/3.jpg: the file is empty",
        "left out: b/2.jpg: the file is cut off",
    ]
    assert same(batches, take(loader(part, **(settings | {"workers": 1 - workers // 2})), 6))
    with pytest.raises(UserError, match=r"of 12 images .* bad, more than 1.0%"):
        take(loader(part, memory=memory, workers=workers), 3)


def test_bad_images_are_a_share_of_the_whole(tmp_path: Path) -> None:
    """A part of few images may hold what the whole set can spare."""
    root = folder_of(tmp_path, {"a": 2, "b": 2})
    (root / "a" / "1.jpg").write_bytes(b"no image")
    part = open_data(root).train
    for memory in (False, True):
        settings = {"train": False, "memory": memory, "max_bad": 0.05}
        with pytest.raises(UserError, match="1 of 4 images"):
            list(loader(part, **settings).evaluation())
        tally = Tally(40, bad=1)
        (batch,) = loader(part, tally=tally, **settings).evaluation()
        assert batch["sample"].tolist() == [0, 2, 3] and tally.bad == 2
        # Another part of the same set has used up what it can spare.
        with pytest.raises(UserError, match="3 of 40 images"):
            list(loader(part, tally=tally, **settings).evaluation())


def test_wrong_settings(photos: ImageSet) -> None:
    with pytest.raises(UserError, match="no images to train on"):
        loader(photos.subset([]))
    with pytest.raises(UserError, match="does not divide among 3"):
        loader(photos, world=3)


def test_memory_is_chosen_by_size(photos: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader(photos, memory=None).memory
    monkeypatch.setattr("vitrail.data.loader.IN_MEMORY", 1000)
    assert not loader(photos, memory=None).memory
    assert not loader(photos, memory=None, train=False).memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers' set would have to be pickled")
@pytest.mark.parametrize(
    "fault, words",
    [(lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by the system"), (lambda: time.sleep(60), "no batch in 1")],
)
def test_workers_that_die_or_hang_end_the_run(
    photos: ImageSet, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], words: str
) -> None:
    monkeypatch.setattr(module, "STALLED", 1)
    monkeypatch.setattr(ImageSet, "open", lambda self, i: fault())
    with pytest.raises(RunError, match=words) as caught:
        take(loader(photos, workers=1), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_of_bad_images_alone(tmp_path: Path, memory: bool, workers: int) -> None:
    folder_of(tmp_path, {"a": 3, "b": 3})
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"no image")
    for max_bad, words in ((0.5, "6 of 6 images"), (1.0, "no image of .* can be read")):
        with pytest.raises(UserError, match=words) as caught:
            take(loader(open_data(tmp_path).train, memory=memory, workers=workers, max_bad=max_bad), 1)
        assert "\n" not in str(caught.value)
