"""Batches are a function of seed and step: any number of workers, any start, any number of processes."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from images import encoded, folder_of, smooth

from vitrail.data import workers as workers_module
from vitrail.data.augment import Augment
from vitrail.data.loader import Batch, Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key
from vitrail.data.repeats import occurrence
from vitrail.data.sets import ImageSet, open_data
from vitrail.data.tally import Tally
from vitrail.data.targets import Labels, Texts
from vitrail.errors import RunError, UserError

SMALL = Preprocess((16, 16))
AUGMENT = Augment(crop="resized", flip=True, policy="trivial", erase=0.5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = folder_of(tmp_path_factory.mktemp("photos"), {"a": 7, "b": 5}, (40, 50))
    (root / "a" / "tall.png").write_bytes(encoded(smooth(70, 30)))
    return open_data(root).train


def loader(dataset: ImageSet, **changes: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "train": True, "augment": AUGMENT, "memory": False}
    return Loader(dataset, SMALL, **(settings | changes))


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
    ranked = [take(loader(photos, memory=memory, rank=rank, world=2), 4) for rank in range(2)]
    for step, batch in enumerate(whole):  # nothing is mixed, so that they take single images in turn
        for rank in range(2):
            assert torch.equal(ranked[rank][step]["image"], batch["image"][rank::2])
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
    dataset = open_data(folder_of(tmp_path, {"a": 4, "b": 4}, (28, 31))).train
    for crop in ("none", "resized"):
        augment = Augment(crop=crop, flip=True)
        streamed, kept = (take(loader(dataset, augment=augment, memory=memory), 4) for memory in (False, True))
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


MIXED = Augment(crop="resized", flip=True, mixup=0.8, cutmix=1.0)


def an_epoch(
    dataset: ImageSet, world: int = 1, epoch: int = 1, accumulate: int = 1, **changes: Any
) -> list[tuple[Any, ...]]:
    """What each place of an epoch's order becomes, put together from the micro-batches of all processes."""
    ranks = [loader(dataset, augment=MIXED, world=world, rank=rank, **changes) for rank in range(world)]
    steps = ranks[0].steps_per_epoch
    places = []
    for step in zip(*(take(made, steps, start=epoch * steps) for made in ranks), strict=True):
        assert all(batch["epoch"] == epoch and torch.equal(batch["key"], draw_key(0, epoch)) for batch in step)
        pairs = []
        for batch in step:
            pieces = dataset.target.split(batch, accumulate)
            rows = [list(zip(*(piece[key] for key in ("sample", "image", "label")), strict=True)) for piece in pieces]
            pairs.append([row[start : start + 2] for row in rows for start in range(0, len(row), 2)])
        places += [each for turn in itertools.zip_longest(*pairs, fillvalue=[]) for pair in turn for each in pair]
    return places


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_what_is_mixed_does_not_depend_on_the_batch(photos: ImageSet, memory: bool, balanced: bool) -> None:
    settings = {"memory": memory, "balanced": balanced}
    whole = an_epoch(photos, batch_size=64, **settings)
    assert len(whole) == 13
    different = [{"batch_size": 2}, {"batch_size": 6}, {"batch_size": 12, "world": 2}, {"batch_size": 12, "world": 3}]
    different += [{"batch_size": 13, "accumulate": 4}, {"batch_size": 64, "world": 2, "accumulate": 3}]
    different += [{"batch_size": 4, "workers": 2}] * (not memory)
    for other in different:
        found = an_epoch(photos, **settings, **other)
        assert len(found) in (12, 13)
        for a, b in zip(found, whole, strict=False):
            assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def test_pairs_are_neighbours_and_the_last_of_an_odd_count_is_not_mixed(photos: ImageSet) -> None:
    many = ImageSet("many", photos.keys, photos.items, Labels(torch.arange(13), [str(i) for i in range(13)]))
    places = an_epoch(many, batch_size=64)
    assert places[0][2].shape == (13,) and places[0][2].dtype == torch.float32
    samples = [int(sample) for sample, _, _ in places]
    for place, (_, _, target) in enumerate(places):
        pair = [samples[place], samples[min(place ^ 1, 12)]]
        assert set(target.nonzero()[:, 0].tolist()) <= set(pair) and float(target.sum()) == pytest.approx(1)
    assert sum(0 < float(target.max()) < 1 for _, _, target in places) >= 8
    assert places[12][2].tolist() == [float(i == samples[12]) for i in range(13)]
    unmixed = take(loader(many, batch_size=64, augment=replace(MIXED, mixup=0.0, cutmix=0.0)), 2)[1]
    assert torch.equal(places[12][1], unmixed["image"][12])


def test_no_image_is_decoded_twice_for_its_partner(photos: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    read = ImageSet.open

    def noted(self: ImageSet, i: int) -> Any:
        opened.append(i)
        return read(self, i)

    monkeypatch.setattr(ImageSet, "open", noted)
    an_epoch(photos, batch_size=4, world=2)
    assert len(opened) == len(set(opened)) == 12


@pytest.mark.parametrize("memory", [False, True])
def test_a_bad_image_leaves_the_pairs_of_others_alone(tmp_path: Path, memory: bool) -> None:
    (folder_of(tmp_path, {"a": 5, "b": 5}) / "a" / "3.jpg").write_bytes(b"")
    dataset = open_data(tmp_path).train
    wholes, some = (an_epoch(dataset, memory=memory, batch_size=size, max_bad=0.5) for size in (64, 2))
    assert len(some) >= 8
    for a, b in zip(some, wholes, strict=False):
        assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 5}, "multiple of 2, got 5: set it to 6, or set mixup and cutmix to 0"),
        ({"batch_size": 6, "world": 2}, "multiple of 4, got 6: set it to 8,"),
        ({"batch_size": 63, "world": 9}, "13 images are too few for 9 processes"),
    ],
)
def test_batches_that_cut_pairs_are_refused(photos: ImageSet, changes: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        loader(photos, augment=Augment(cutmix=1.0), **changes)
    assert loader(photos, **changes), "singly they divide"


def test_captions_are_not_mixed(photos: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageSet, "open", lambda self, i: pytest.fail("an image was read first"))
    dataset = ImageSet("said", photos.keys, photos.items, Texts([["a dog"]] * 13))
    with pytest.raises(UserError, match="mixup and cutmix mix class labels, and captions have none"):
        loader(dataset, augment=Augment(mixup=0.2), memory=True)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_another_target_stands_in_for_the_sets_own(photos: ImageSet, memory: bool, workers: int) -> None:
    numbers = torch.arange(13 * 6).view(13, 2, 3)
    texts = Texts([[f"dog {i}"] for i in range(13)]).numbered(numbers)
    made = loader(photos, target=texts, memory=memory, workers=workers)
    batch = take(made, 1)[0]
    assert torch.equal(batch["label"], numbers[batch["sample"]]) and "captions" not in batch
    for batch in made.evaluation():
        assert batch["captions"] == [[f"dog {i}"] for i in batch["sample"].tolist()]
        assert torch.equal(batch["label"], numbers[batch["sample"]]) and batch["epoch"] == 0
    with pytest.raises(ValueError, match="a target of 2 entries for 13 images"):
        loader(photos, target=Texts([["a"], ["b"]]))


def test_balanced_draws_classes_evenly_and_repeats_differ() -> None:
    images = torch.from_numpy(smooth(16, 16)).permute(2, 0, 1).expand(200, -1, -1, -1).contiguous()
    labels = torch.tensor([0] * 190 + [1] * 10)
    dataset = ImageSet("uneven", [str(i) for i in range(200)], images, Labels(labels, ["many", "few"]))
    made = loader(dataset, batch_size=200, balanced=True, augment=Augment(crop="resized"), memory=True)
    batch = take(made, 1)[0]
    assert 70 < int(batch["label"].sum()) < 130
    again = batch["image"][batch["sample"] == batch["sample"][batch["label"] == 1][0]]
    assert len(again) > 3 and len({image.numpy().tobytes() for image in again}) >= len(again) - 1
    assert occurrence(torch.tensor([3, 5, 3, 3, 5])).tolist() == [0, 0, 1, 2, 1]


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
    dataset = open_data(root).train
    settings = {"memory": memory, "workers": workers, "augment": Augment(crop=crop), "max_bad": 0.2}
    with caplog.at_level(logging.WARNING, "vitrail"):
        made = loader(dataset, **settings)
        batches = take(made, 6)
        seen = {int(s) for b in batches for s in b["sample"]}
        assert not seen & {3, 8} and set(made.bad) == {3, 8}
        assert [len(b["sample"]) for b in batches] == [4] * 6
        assert all(torch.equal(b["label"], dataset.labels[b["sample"]]) for b in batches)
        evaluated = [int(s) for b in made.evaluation() for s in b["sample"]]
        assert evaluated == [i for i in range(12) if i not in (3, 8)]
    assert sorted(record.message for record in caplog.records) == [
        "left out: a/3.jpg: the file is empty",
        "left out: b/2.jpg: the file is cut off",
    ]
    assert same(batches, take(loader(dataset, **(settings | {"workers": 1 - workers // 2})), 6))
    with pytest.raises(UserError, match=r"of 12 images .* bad, more than 1.0%"):
        take(loader(dataset, memory=memory, workers=workers), 3)


def test_an_image_that_rots_changes_the_order_of_no_other(tmp_path: Path) -> None:
    """Or else a run that resumes after that would repeat some images and skip others, and processes would not agree."""
    root = folder_of(tmp_path, {"a": 7, "b": 7})
    settings = {"augment": Augment(flip=True), "max_bad": 0.5}

    def epochs(memory: bool) -> list[Batch]:
        return take(loader(open_data(root).train, memory=memory, **settings), 6)

    before = epochs(memory=True)
    for name in ("a/3.jpg", "b/6.jpg"):  # numbers 3 and 13: the next good ones are 4 and 0
        (root / name).write_bytes(b"")
    kept, streamed = epochs(memory=True), epochs(memory=False)
    expected = [[{3: 4, 13: 0}.get(i, i) for i in batch["sample"].tolist()] for batch in before]
    assert [batch["sample"].tolist() for batch in kept] == expected
    assert same(kept, streamed)


def test_processes_that_read_in_other_ways_evaluate_each_image_once(tmp_path: Path) -> None:
    """Each decides by its own free memory whether it keeps a split, and a bad image is in neither way."""
    root = folder_of(tmp_path, {"a": 7, "b": 7})
    (root / "a" / "3.jpg").write_bytes(b"")
    dataset = open_data(root).train
    for kept in ((True, False), (False, True), (True, True)):
        ranks = [
            loader(dataset, train=False, memory=memory, rank=rank, world=2, max_bad=0.5)
            for rank, memory in enumerate(kept)
        ]
        seen = sorted(int(i) for rank in ranks for batch in rank.evaluation() for i in batch["sample"])
        assert seen == [i for i in range(14) if i != 3]


def test_bad_images_are_a_share_of_the_whole(tmp_path: Path) -> None:
    """A split of few images may hold what the whole set can spare."""
    root = folder_of(tmp_path, {"a": 2, "b": 2})
    (root / "a" / "1.jpg").write_bytes(b"no image")
    dataset = open_data(root).train
    for memory in (False, True):
        settings = {"train": False, "memory": memory, "max_bad": 0.05}
        with pytest.raises(UserError, match="1 of 4 images"):
            list(loader(dataset, **settings).evaluation())
        tally = Tally(40, bad=1)
        (batch,) = loader(dataset, tally=tally, **settings).evaluation()
        assert batch["sample"].tolist() == [0, 2, 3] and tally.bad == 2
        # Another split of the same set has used up what it can spare.
        with pytest.raises(UserError, match="3 of 40 images"):
            list(loader(dataset, tally=tally, **settings).evaluation())


def test_wrong_settings(photos: ImageSet) -> None:
    with pytest.raises(UserError, match="no images to train on"):
        loader(photos.subset([]))
    with pytest.raises(UserError, match="cannot be divided among 3"):
        loader(photos, world=3)


def test_memory_is_chosen_by_size(photos: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader(photos, memory=None).memory
    monkeypatch.setattr("vitrail.data.memory.IN_MEMORY", 1000)
    assert not loader(photos, memory=None).memory
    assert not loader(photos, memory=None, train=False).memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers' set would have to be pickled")
@pytest.mark.parametrize(
    "fault, words",
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "killed by SIGKILL, probably because memory ran out, 4 times: lower",
        ),
        (lambda: time.sleep(60), "no batch in 1"),
    ],
)
def test_workers_that_die_or_hang_end_the_run(
    photos: ImageSet, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], words: str
) -> None:
    monkeypatch.setattr(workers_module, "STALLED", 1)
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
    for max_bad, words in ((0.5, "6 of 6 images"), (1.0, "no image of .* to train on can be read")):
        with pytest.raises(UserError, match=words) as caught:
            take(loader(open_data(tmp_path).train, memory=memory, workers=workers, max_bad=max_bad), 1)
        assert "\n" not in str(caught.value)
