"""Data sets of the Hub, read while training from a server on this machine."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from images import encoded, smooth
from local_hub import Hub, commit_of, server

from vitrail.cli import main
from vitrail.data import streaming
from vitrail.data.augment import Augment
from vitrail.data.hub_sets import is_same, parse, pinned
from vitrail.data.loader import Batch, Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, open_data, split_val
from vitrail.errors import RunError, UserError
from vitrail.train.step import train_step

__all__ = ["server"]

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

PETS = "hf://datasets/club/pets"
CLASSES = ["cat", "dog", "owl"]
ROWS, PER_GROUP = 40, 4
BLOCKS = 2 * ROWS // PER_GROUP
"""of the training split: a row group is one, since BLOCK is small here"""


def image(number: int) -> bytes:
    return encoded(smooth(24, 24, seed=number))


def write(file: Path, numbers: range, names: tuple[str, str] = ("image", "label")) -> None:
    """Rows with images and a class each, in row groups of four."""
    images = [{"bytes": image(i), "path": None} for i in numbers]
    table = pa.table({names[0]: images, names[1]: [i % 3 for i in numbers], "more": ["x" * 100] * len(numbers)})
    features = {names[1]: {"names": CLASSES, "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=PER_GROUP)


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with one set: two files for training, one for testing. A window has about five of its blocks."""
    root = tmp_path / "pets"
    write(root / "data" / "train-00000-of-00002.parquet", range(ROWS))
    write(root / "data" / "train-00001-of-00002.parquet", range(ROWS, 2 * ROWS))
    write(root / "data" / "test-00000-of-00001.parquet", range(100, 106))
    server.repositories["club/pets"] = {"main": root}
    server.cards["club/pets"] = {"license": "cc-by-4.0"}
    size = max(len(image(i)) for i in range(ROWS)) * PER_GROUP
    monkeypatch.setattr(streaming, "WINDOW", 5 * size)
    monkeypatch.setattr("vitrail.data.hub_sets.BLOCK", 1)
    monkeypatch.setattr(streaming, "WAITS", (0.01, 0.01))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(streaming, "_direct", {})
    return server


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "xdg" / "vitrail" / "hub").iterdir() if path.is_file()]


def loader(images: ImageSet, seed: int = 3, workers: int = 0, rank: int = 0, world: int = 1, size: int = 8) -> Loader:
    return Loader(
        images,
        Preprocess((16, 16)),
        batch_size=size,
        seed=seed,
        train=True,
        augment=Augment(crop="resized"),
        workers=workers,
        rank=rank,
        world=world,
    )


def batches(images: ImageSet, start: int = 0, stop: int = 12, **how: int) -> list[Batch]:
    """Of more than an epoch, which has ten."""
    return list(itertools.islice(loader(images, **how).batches(start), stop - start))


def test_a_set_opens_by_its_footers_and_labels(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = open_data(PETS)
    assert len(splits.train) == 2 * ROWS and splits.test is not None and len(splits.test) == 6 and splits.val is None
    assert splits.train.classes == CLASSES and splits.train.channels == 3
    assert splits.train.labels.tolist() == [i % 3 for i in range(2 * ROWS)]
    assert splits.train.read(ROWS + 7) == image(ROWS + 7) and splits.test.read(3) == image(103)
    assert splits.train.keys[ROWS + 7] == "train-00001-of-00002/7"
    commit = commit_of(tmp_path / "pets")
    line = f"club/pets at commit {commit[:12]}: 80 train, 6 test rows, 3 classes, 0 MB, licence cc-by-4.0; streamed"
    assert line in caplog.text and len(caplog.records) == 1
    assert pinned(PETS) == f"{PETS}@{commit}" == pinned(f"{PETS}@{commit}")
    assert pinned("pets") == "pets"


def test_little_is_downloaded_before_the_first_batch(hub: Hub, tmp_path: Path) -> None:
    whole = sum(path.stat().st_size for path in (tmp_path / "pets" / "data").glob("train*"))
    images = open_data(PETS).train
    opened = hub.sent
    assert len(cached(tmp_path)) == 4, "the labels of three files, and the block by which the channels are judged"
    open_data(PETS)
    assert hub.sent == opened, "another process reads all of that from the cache"
    next(loader(images).batches())
    assert len(cached(tmp_path)) < BLOCKS / 2 and hub.sent - opened < whole / 2


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0), (2, 2)])
def test_any_number_of_workers_and_processes_reads_the_same_batches(hub: Hub, world: int, workers: int) -> None:
    images = open_data(PETS).train
    alone = batches(images)
    hub.sent = 0
    ranks = [batches(images, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert hub.sent == 0, "all processes share what is on the disk"
    for step, whole in enumerate(alone):
        samples = torch.cat([rank[step]["sample"] for rank in ranks])
        assert samples.sort().values.equal(whole["sample"].sort().values)
        pixels = torch.cat([rank[step]["image"] for rank in ranks])[samples.argsort()]
        assert pixels.equal(whole["image"][whole["sample"].argsort()])


def test_an_epoch_has_each_image_once_in_another_order_each_time(hub: Hub) -> None:
    images = open_data(PETS).train
    found = torch.cat([batch["sample"] for batch in batches(images, stop=20)])
    epochs = found.split(2 * ROWS)
    assert all(epoch.sort().values.equal(torch.arange(2 * ROWS)) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])
    assert torch.cat([batch["sample"] for batch in batches(images, start=13, stop=20)]).equal(found[13 * 8 :])
    assert not torch.cat([batch["sample"] for batch in batches(images, stop=20, seed=4)]).equal(found)


def test_the_order_mixes_the_blocks_of_a_window(hub: Hub) -> None:
    images = open_data(PETS).train
    streamed = images.streamed
    assert streamed is not None
    order = torch.cat([batch["sample"] for batch in batches(images, stop=10)])
    places = [(streamed.block[order] == number).nonzero()[:, 0] for number in range(BLOCKS)]
    spans = torch.tensor([int(own.max() - own.min()) for own in places])
    assert spans.max() < 2 * 5 * PER_GROUP, "a block is needed for the length of a window, not of an epoch"
    assert spans.double().mean() > PER_GROUP, "and its images are apart"


def test_the_cache_stays_below_its_size(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(len(image(i)) for i in range(2 * ROWS)) * PER_GROUP + 100
    monkeypatch.setattr(streaming, "CACHE", 8 * largest)
    images = open_data(PETS).train
    whole = hub.sent
    for batch in loader(images).batches():
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= 8 * largest
        if batch["epoch"] == 1:
            break
    assert images.streamed is not None
    blocks = sum(block.bytes for block in images.streamed.blocks)
    assert 0.9 * blocks < hub.sent - whole < 1.3 * blocks, "each block is downloaded once per epoch"


def test_small_row_groups_are_one_block(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.data.hub_sets.BLOCK", 1 << 20)
    images = open_data(PETS).train
    assert images.streamed is not None and len(images.streamed.blocks) == 2
    assert [images.read(i) for i in (0, 39, 40, 79)] == [image(i) for i in (0, 39, 40, 79)]


def test_a_request_that_fails_is_repeated(hub: Hub) -> None:
    images = open_data(PETS).train
    hub.failures = 2
    assert images.read(30) == image(30)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hub_that_goes_away_ends_with_one_line(hub: Hub, workers: int) -> None:
    images = open_data(PETS).train
    found = loader(images, workers=workers).batches()
    next(found)
    hub.status = 503
    with pytest.raises(RunError) as error:
        list(itertools.islice(found, 20))
    assert re.fullmatch(
        r"data/train-0000\d-of-00002.parquet could not be read from the Hub in 3 attempts \(it answers with 503\)",
        str(error.value),
    )


def test_a_hub_that_is_gone_is_no_bad_image(hub: Hub) -> None:
    images = open_data(PETS).train
    hub.shutdown()
    hub.server_close()
    with pytest.raises(RunError, match="could not be read from the Hub in 3 attempts"):
        images.image(50)


def test_bytes_come_from_the_storage_without_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.token["club/pets"] = "secret"
    hub.storage = hub.url.replace("127.0.0.1", "localhost")
    images = open_data(PETS).train
    hub.requests.clear()
    assert images.read(30) == image(30)
    assert all(request.startswith("GET /storage/") for request in hub.requests), "not from the Hub again"
    monkeypatch.setattr(streaming, "WAITS", ())
    streaming._direct.update({url: f"{place}.gone" for url, place in streaming._direct.items()})
    assert images.read(70) == image(70), "a place that is no longer valid is replaced at once"


def test_the_doctor_reads_it(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", PETS, "--images", "0"]) == 0
    assert "86 images read: 80 in train, 6 in test, 3 classes" in capsys.readouterr().err


ARGS = ("--epochs", "2", "--batch-size", "8", "--width", "16", "--depth", "1", "--workers", "0", "--device", "cpu")


def test_a_run_that_loses_the_hub_resumes_with_the_same_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "digits", "--data", PETS, "--out", "whole", *ARGS]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    steps = 0

    def until_the_hub_is_away(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        hub.status = 503 if steps >= 3 else 0
        return train_step(*args)

    with monkeypatch.context() as patched:
        patched.setattr("vitrail.train.loop.train_step", until_the_hub_is_away)
        capsys.readouterr()
        assert main(["train", "digits", "--data", PETS, "--out", "run", *ARGS]) == 1
    assert 3 <= steps < 9, "before it has all of the set"
    last = capsys.readouterr().err.splitlines()[-1]
    assert "could not be read from the Hub in 3 attempts" in last and f"step {steps}" in last and "--resume run" in last
    hub.status = 0
    write(tmp_path / "newer" / "data" / "train.parquet", range(200, 240))
    hub.repositories["club/pets"] = {"main": tmp_path / "newer", "before": tmp_path / "pets"}
    assert main(["train", "--resume", "run", "--device", "cpu"]) == 0
    assert json.loads(Path("run/recipe.json").read_text())["data"] == f"{PETS}@{commit_of(tmp_path / 'pets')}"
    weights = [Path(run, "last", "model.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]
    capsys.readouterr()
    assert main(["eval", "run", "--data", f"{PETS}@before", "--json", "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["split"] == "test" and scores["count"] == 6


def test_the_hubs_validation_split_is_held_back_by_rows(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    images = open_data(PETS).train
    hub.sent = 0
    train, val = split_val(images)
    assert hub.sent == 0
    assert "club/pets has no validation split: 10% is held back, by a hash of file and row number" in caplog.text
    assert 2 <= len(val) <= 16 and {*train.keys} | {*val.keys} == {*images.keys} and len(train) + len(val) == 2 * ROWS
    assert [*split_val(open_data(PETS).train)[1].keys] == val.keys
    assert val.read(0) == images.read(images.keys.index(val.keys[0]))


def test_large_sets_hold_back_whole_blocks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HELD_BY_ROW", 1)
    train, val = split_val(open_data(PETS).train)
    assert train.streamed is not None and val.streamed is not None
    assert not {*train.streamed.block.tolist()} & {*val.streamed.block.tolist()}


def test_a_sample_reads_few_blocks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FEW", 3)
    some = open_data(PETS).train.spread(10)
    assert len(some) == 10 and some.streamed is not None and len(some.streamed.block.unique()) == 3


@pytest.mark.parametrize(
    "data", ["hf://datasets/pets", "hf://club/pets", "hf://models/club/pets", "hf://datasets/a//b"]
)
def test_addresses_that_are_none(data: str) -> None:
    with pytest.raises(UserError, match=r"write hf://datasets/ORG/NAME\[@REVISION\]\[/FOLDER\]"):
        parse(data)


def test_a_set_at_a_commit_is_the_set_that_was_named() -> None:
    commit, other = "0123456789" * 4, "9876543210" * 4
    own = f"hf://datasets/a/b@{commit}/c"
    assert all(is_same(f"hf://datasets/a/b{at}/c", own) for at in ("", "@main", "@v1", f"@{commit}"))
    for data in ("hf://datasets/a/b", f"hf://datasets/a/b@{other}/c", "hf://datasets/a/d/c"):
        assert not is_same(data, own)
    assert not is_same("hf://datasets/a/b/c", "/disk/b")


def test_addresses() -> None:
    assert parse(PETS) == ("club/pets", "main", "")
    assert parse(f"{PETS}@v1/data/") == ("club/pets", "v1", "data")
    assert parse(f"{PETS}@refs/convert/parquet/default") == ("club/pets", "refs/convert/parquet", "default")
    assert parse(f"{PETS}@refs%2Fpr%2F3") == ("club/pets", "refs/pr/3", "")
    assert str(parse(f"{PETS}@v1/data")) == f"{PETS}@v1/data" and str(parse(PETS)) == PETS


def refusal(data: str) -> str:
    with pytest.raises(UserError) as error:
        open_data(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sets_that_cannot_be_streamed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, columns in {"plain": ("image", "caption"), "text": ("words", "label")}.items():
        write(tmp_path / name / "train.parquet", range(4), columns)
        hub.repositories[f"club/{name}"] = {"main": tmp_path / name}
    write(tmp_path / "two" / "small" / "train.parquet", range(4))
    write(tmp_path / "two" / "large" / "train.parquet", range(4))
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "train.zip").write_bytes(b"PK")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1, or not")
    pq.write_table(pa.table({"image": ["a.png"], "label": [1]}), tmp_path / "bad" / "paths.parquet")
    for name in ("two", "zip", "bad"):
        hub.repositories[f"club/{name}"] = {"main": tmp_path / name}
    hub.gated.add("club/zip")
    assert refusal("hf://datasets/club/zip") == (
        "club/zip is gated: accept its terms on its page, then log in with `hf auth login`"
    )
    hub.gated.clear()
    assert refusal("hf://datasets/club/none") == (
        "the Hub has no data set club/none, or a private one: check the name, or log in"
    )
    assert refusal(f"{PETS}@v9") == "club/pets has no revision 'v9' on the Hub: check or remove it"
    assert "holds no Parquet files: try hf://datasets/club/zip@refs/convert/parquet" in refusal(
        "hf://datasets/club/zip"
    )
    assert "none called label or labels" in refusal("hf://datasets/club/plain")
    assert "none called image or img" in refusal("hf://datasets/club/text")
    assert "several sets (large, small): add one, as in" in refusal("hf://datasets/club/two")
    assert "cannot be read as Parquet" in refusal("hf://datasets/club/bad")
    assert len(open_data("hf://datasets/club/two/small").train) == 4
    hub.fall_silent(monkeypatch)
    assert "could not be opened on the Hub" in refusal(PETS)


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(PETS) == "club/pets is read from the Hub while training, and HF_HUB_OFFLINE is set: unset it"


def test_large_row_groups_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.data.hub_sets.WINDOW", 100)
    assert "download the set, and give --data its folder" in refusal(PETS)


def test_rows_without_a_label_are_left_out(hub: Hub, tmp_path: Path) -> None:
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}}
    for name, labels in {"train": [0, -1, 1, None, 2], "test": [-1] * 5}.items():
        table = pa.table({"image": [image(i) for i in range(5)], "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, (tmp_path / "pets" / f"{name}.parquet"))
    shutil.rmtree(tmp_path / "pets" / "data")
    splits = open_data(PETS)
    assert splits.test is None and splits.train.labels.tolist() == [0, 1, 2]
    assert [splits.train.read(i) for i in range(3)] == [image(0), image(2), image(4)]


def test_files_that_do_not_fit_together_are_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CLASSES", ["b", "a", "c"])
    write(tmp_path / "pets" / "data" / "test-00000-of-00001.parquet", range(4))
    assert "its splits have other classes, or in another order" in refusal(PETS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "again"))  # else the labels of this commit are there
    write(tmp_path / "pets" / "data" / "train-00001-of-00002.parquet", range(4))
    assert "train-00001-of-00002.parquet have other columns or classes" in refusal(PETS)


def test_the_extra_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(PETS) == "streaming a data set needs pyarrow: pip install 'vitrail[data]'"


def test_it_can_be_sent_to_workers_that_are_not_forked(hub: Hub) -> None:
    assert pickle.loads(pickle.dumps(open_data(PETS).train)).read(50) == image(50)


def test_groups_are_refused(hub: Hub) -> None:
    with pytest.raises(UserError, match="--group needs the names of images"):
        open_data(PETS, grouped=True)


@pytest.mark.slow
def test_two_processes_train_on_one_commit(hub: Hub, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vitrail",
        "train",
        "digits",
        "--data",
        PETS,
        "--out",
        "run",
        "--nproc",
        "2",
        *ARGS,
    ]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "XDG_CACHE_HOME": str(tmp_path / "both")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("streamed from the Hub") == 1, "one process talks"
    assert json.loads(Path("run/recipe.json").read_text())["data"] == pinned(PETS)


def test_it_can_be_packed_as_tar_files(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "shard", PETS, "--out", "tars"]) == 0
    images, tars = open_data(PETS).train, open_data("tars").train
    assert tars.keys == images.keys and tars.labels.equal(images.labels)
    assert tars.image(50).equal(images.image(50))
