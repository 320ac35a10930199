"""Tar files split over processes and their workers: the same images in the same steps as one process reads."""

from __future__ import annotations

import itertools

import pytest
import torch
from images import folder_of

from vitrail.data.augment import Augment
from vitrail.data.loader import Batch, Loader
from vitrail.data.packing import pack
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, open_data
from vitrail.data.shards import INDEX


@pytest.fixture(scope="module", params=["with an index", "scanned"])
def tars(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """22 images in several tar files: fewer than would fill the last step."""
    root = tmp_path_factory.mktemp("data")
    pack(open_data(folder_of(root / "photos", {"ant": 11, "bee": 11}, (40, 50))), root / "tars", tar_bytes=20_000)
    if request.param == "scanned":
        (root / "tars" / INDEX).unlink()
    assert len([*(root / "tars").glob("*.tar")]) > 2
    return open_data(root / "tars").train


def batches(tars: ImageSet, world: int, workers: int, start: int = 0, mixup: float = 0.0) -> list[list[Batch]]:
    """The batches of each process, over more than two epochs."""
    augment = Augment(crop="resized", mixup=mixup)
    found = []
    for rank in range(world):
        loader = Loader(
            tars,
            Preprocess((16, 16)),
            batch_size=8,
            seed=3,
            train=True,
            augment=augment,
            memory=False,
            workers=workers,
            rank=rank,
            world=world,
        )
        found.append(list(itertools.islice(loader.batches(start), 5 - start)))
    return found


@pytest.mark.parametrize("world, workers", [(2, 0), (4, 0), (2, 2)])
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_processes_read_together_what_one_reads(tars: ImageSet, world: int, workers: int, mixup: float) -> None:
    [alone] = batches(tars, 1, 0, mixup=mixup)
    ranks = batches(tars, world, workers, mixup=mixup)
    for step, whole in enumerate(alone):
        own = [rank[step] for rank in ranks]
        assert all(len(batch["sample"]) == 8 // world for batch in own)
        samples = torch.cat([batch["sample"] for batch in own])
        assert samples.sort().values.equal(whole["sample"].sort().values)
        order = samples.argsort()
        images = torch.cat([batch["image"] for batch in own])[order]
        assert images.equal(whole["image"][whole["sample"].argsort()]), "the same pixels, mixed with the same partners"


def test_a_process_resumes_in_the_middle_of_an_epoch(tars: ImageSet) -> None:
    for whole, rest in zip(batches(tars, 2, 0), batches(tars, 2, 2, start=3), strict=True):
        for before, after in zip(whole[3:], rest, strict=True):
            assert before["sample"].equal(after["sample"]) and before["image"].equal(after["image"])
