"""Workers that the system kills, and files that change while they are read."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from images import folder_of
from mask_data import made, several

from vitrail.data.augment import Augment
from vitrail.data.loader import Batch, Loader
from vitrail.data.mask_sets import open_masks
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, open_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers' set would have to be pickled")


@pytest.fixture
def photos(tmp_path: Path) -> ImageSet:
    return open_data(folder_of(tmp_path / "photos", {"a": 6, "b": 6})).train


def loader(images: ImageSet, **changes: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "train": True, "augment": Augment(crop="resized")}
    return Loader(images, Preprocess((16, 16)), **{**settings, "memory": False, "workers": 1, **changes})


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def _no_other_workers() -> None:
    """End the workers that other tests of the process left."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def kill_one(how: signal.Signals = signal.SIGKILL) -> None:
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, how)
    worker.join(10)


def taken(batches: Iterator[Batch], count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_started_again_and_no_batch_is_lost(
    workers: int, photos: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    plain = taken(loader(photos, workers=0).batches(), 9)
    batches = loader(photos, workers=workers).batches()
    found = taken(batches, 2)
    kill_one()
    found += taken(batches, 3)
    kill_one(signal.SIGBUS)
    found += taken(batches, 4)
    assert same(found, plain)
    died = [line for line in caplog.messages if line.startswith("a worker process was killed by")]
    assert died == [
        f"a worker process was killed by {how} ran out: the workers are started again, and no batch is lost"
        for how in ("SIGKILL, probably because memory", "SIGBUS, probably because /dev/shm")
    ]


def test_a_worker_that_dies_between_two_batches_breaks_off_nothing(photos: ImageSet) -> None:
    """PyTorch's handler would raise here, in the middle of a step."""
    batches = loader(photos, workers=1).batches()
    next(batches)
    kill_one()
    for _ in range(100):
        time.sleep(0.001)
    next(batches)


def test_a_worker_that_dies_in_evaluation(photos: ImageSet) -> None:
    """With the workers of the training waiting, of which one has died too."""
    made, plain = loader(photos, workers=1), loader(photos, workers=0)
    batches = made.batches()
    found = taken(batches, 1)
    kill_one()
    evaluation = made.evaluation()
    seen = [next(evaluation)]
    kill_one()
    seen += list(evaluation)
    assert same(seen, list(plain.evaluation()))
    assert same(found + taken(batches, 3), taken(plain.batches(), 4))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_survives_the_signal_by_which_a_scheduler_ends_its_job(
    how: signal.Signals, photos: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    batches = loader(photos, workers=1).batches()
    found = taken(batches, 1)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, how)
    found += taken(batches, 12)  # more than were made ahead
    assert worker.is_alive() and not caplog.messages and same(found, taken(loader(photos).batches(), 13))


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_or_rot_while_they_are_read_are_bad_images(
    workers: int, photos: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = loader(photos, workers=workers, max_bad=0.2)
    batches = made.batches()
    with caplog.at_level(logging.WARNING, "vitrail"):
        taken(batches, 3)
        assert not caplog.messages
        (tmp_path / "photos/a/1.jpg").unlink()
        whole = (tmp_path / "photos/b/2.jpg").read_bytes()
        (tmp_path / "photos/b/2.jpg").write_bytes(whole[: len(whole) // 2])
        later = taken(batches, 15)
    assert sorted(caplog.messages) == [
        "left out: a/1.jpg: No such file or directory",
        "left out: b/2.jpg: the file is cut off",
    ]
    assert all(len(batch["image"]) == 4 for batch in later)
    assert not {1, 8} & {int(sample) for batch in later[-3:] for sample in batch["sample"]}


def test_a_mask_that_vanishes_is_a_bad_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, *several("images/{}.jpg", 6), *several("masks/{}.png", 6))
    splits = open_masks(tmp_path)
    batches = loader(splits.train, augment=Augment(), workers=1, max_bad=0.5).batches()
    taken(batches, 1)
    (tmp_path / "masks" / "2.png").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vitrail"):
        taken(batches, 12)
    assert caplog.messages == ["left out: masks/2.png: No such file or directory"]
