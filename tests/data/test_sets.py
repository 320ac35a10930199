"""Sets are found in every layout, and wrong paths get one plain line."""

from __future__ import annotations

import gzip
import json
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import encoded, folder_of, smooth, tiff

from vitrail.data import builtin, parquet
from vitrail.data.content import BITS, content_hash
from vitrail.data.decode import BadImage
from vitrail.data.sets import ImageSet, open_data, split_val
from vitrail.data.targets import Labels
from vitrail.errors import UserError


def test_digits() -> None:
    splits = open_data("digits")
    assert len(splits.train) == 1437 and splits.test is not None and len(splits.test) == 360 and splits.val is None
    assert splits.test.labels.bincount().min() >= 35
    assert splits.train.channels == 1 and splits.train.classes == [str(i) for i in range(10)]
    image = splits.train.image(0)
    assert image.shape == (1, 8, 8) and image.dtype == torch.uint8
    assert splits.train.image(0, 3).shape == (3, 8, 8)
    assert splits.train.items.max() == 255  # type: ignore[union-attr]
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    everything = torch.cat([splits.train.items, splits.test.items])  # type: ignore[list-item]
    original = torch.tensor(load_digits().images)
    assert torch.equal(everything.sum((0, 1, 2, 3)), ((original * 255 + 8) // 16).sum().long())


def test_folder_without_splits(tmp_path: Path) -> None:
    folder_of(tmp_path, {"dog": 3, "cat": 2})
    (tmp_path / "cat" / "deeper").mkdir()
    (tmp_path / "cat" / "deeper" / "z.PNG").write_bytes(encoded(smooth()))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    splits = open_data(str(tmp_path))
    assert splits.train.classes == ["cat", "dog"] and splits.val is None and splits.test is None
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train.keys == ["cat/0.jpg", "cat/1.jpg", "cat/deeper/z.PNG", "dog/0.jpg", "dog/1.jpg", "dog/2.jpg"]
    assert splits.train.subset([5, 2]).keys == ["dog/2.jpg", "cat/deeper/z.PNG"]
    assert splits.train.subset([5, 2]).image(1).shape == (3, 40, 56)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path / "train", {"a": 2, "b": 2})
    folder_of(tmp_path / name, {"b": 1})
    folder_of(tmp_path / "test", {"a": 1, "b": 1})
    splits = open_data(tmp_path)
    assert splits.val is not None and splits.val.labels.tolist() == [1] and splits.val.classes == ["a", "b"]
    assert splits.val.keys == [f"{name}/b/0.jpg"]
    assert splits.test is not None and len(splits.test) == 2
    folder_of(tmp_path / "test" / "c", {"x": 1})
    with pytest.raises(UserError, match="the test split of .* has a class that the training split lacks: c"):
        open_data(tmp_path)


def test_folder_for_evaluation_alone(tmp_path: Path) -> None:
    folder_of(tmp_path / "test", {"a": 1, "b": 1})
    splits = open_data(tmp_path)
    assert len(splits.train) == 0 and splits.test is not None and splits.test.classes == ["a", "b"]


def test_a_class_may_be_called_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = open_data(folder_of(tmp_path, {"test": 2, "other": 2}))
    assert splits.train.classes == ["other", "test"]
    assert f"{tmp_path} has a class test: it would be a split if" in caplog.text


@pytest.mark.parametrize("name", ["folder", "mnist"])
def test_a_class_may_have_the_name_of_what_is_requested(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path / "folder", {"front": 1, "back": 1})  # a class with folders inside
    splits = open_data(folder_of(tmp_path, {"mnist": 2, "other": 2}), name=name)
    assert splits.train.classes == ["folder", "mnist", "other"]


def test_grey_folder_is_seen(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded(smooth()[:, :, 0]))
    assert open_data(tmp_path).train.channels == 1


@pytest.mark.parametrize("bands", [2, 5])
def test_tiffs_have_as_many_channels_as_bands(tmp_path: Path, bands: int) -> None:
    draw = np.random.default_rng(0)
    for i in range(6):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        samples = draw.integers(0, 256, (12, 10, bands), dtype=np.uint8)
        (tmp_path / "ab"[i % 2] / f"{i}.tif").write_bytes(tiff(samples, planar=i > 2, packed=True))
    (tmp_path / "a" / "0.tif").write_bytes(b"II*\0 and no more")
    train = open_data(tmp_path).train
    assert train.channels == bands
    assert train.image(train.keys.index("b/5.tif")).shape == (bands, 12, 10)


@pytest.mark.parametrize("photometric, extra", [(2, (0,)), (2, (1,)), (2, (2,)), (2, ()), (1, (0, 0, 0)), (1, ())])
@pytest.mark.parametrize("deep", [False, True])
def test_near_infrared_is_a_channel_however_it_is_declared(
    tmp_path: Path, photometric: int, extra: tuple[int, ...], deep: bool
) -> None:
    """GDAL declares a fourth band of bytes as transparency unless it is told otherwise."""
    draw = np.random.default_rng(0)
    for i in range(6):
        samples = draw.integers(60, 120, (12, 10, 4), dtype=np.uint8)
        samples[..., 3] = 40 + i
        samples[:6] = 0 if i == 2 else samples[:6]  # beyond the edge of a scene there are no data
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        stored = samples.astype(np.uint16) * 257 if deep else samples
        (tmp_path / "ab"[i % 2] / f"{i}.tif").write_bytes(tiff(stored, photometric, extra))
    train = open_data(tmp_path).train
    assert train.channels == 4
    assert torch.equal(train.image(train.keys.index("b/5.tif")), torch.from_numpy(samples).permute(2, 0, 1))
    with pytest.raises(BadImage, match=r"b/5\.tif: .*(4 channels, not 3|use a model of 4 channels)"):
        train.image(train.keys.index("b/5.tif"), 3)


def test_a_mask_is_no_channel_but_beside_bands_that_are_none(tmp_path: Path) -> None:
    samples = np.full((12, 10, 4), 90, np.uint8)
    samples[..., 3] = np.where(np.arange(10) < 3, 0, 255)
    for i in range(4):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.tif").write_bytes(tiff(samples, 2, (2,)))
    train = open_data(tmp_path).train
    assert train.channels == 1, "grey with a mask"
    assert train.image(0, 3)[:, 0].tolist() == [[255] * 3 + [90] * 7] * 3
    samples[..., 0] = 200
    (tmp_path / "a" / "0.tif").write_bytes(tiff(samples, 2, (2,)))
    assert open_data(tmp_path).train.channels == 3
    samples[..., 3] = 77
    (tmp_path / "a" / "0.tif").write_bytes(tiff(samples, 2, (2,)))
    assert open_data(tmp_path).train.channels == 4


def test_values_in_a_doubtful_range_get_one_warning_for_the_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(6):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", np.full((9, 9, 3), 600 * i, np.uint16))
    open_data(tmp_path)
    assert len(caplog.messages) == 1 and "use values up to 3,000 of 65,535 and come out dark" in caplog.text
    np.save(tmp_path / "a" / "0.npy", np.full((9, 9, 3), 60_000, np.uint16))
    caplog.clear()
    open_data(tmp_path)
    assert not caplog.messages
    for i in range(6):
        np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", np.full((9, 9, 3), 0.9 if i else 90, np.float32))
    open_data(tmp_path)
    assert len(caplog.messages) == 1 and "some images of floats are read as 0 to 1" in caplog.text


@pytest.mark.parametrize("struct_column", [True, False])
def test_parquet(tmp_path: Path, struct_column: bool) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    files = [encoded(smooth(seed=i), "JPEG" if i % 2 else "PNG") for i in range(6)]
    names = {"info": {"features": {"fine_label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}}}
    for split, chunk in (
        ("train-00000-of-00002", files[:2]),
        ("train-00001-of-00002", files[2:4]),
        ("test", files[4:]),
    ):
        images = [{"bytes": data, "path": None} for data in chunk] if struct_column else chunk
        table = pa.table({"img": images, "fine_label": [2, 0]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{split}.parquet")
    splits = open_data(tmp_path)
    assert splits.train.classes == ["x", "y", "z"] and splits.train.labels.tolist() == [2, 0, 2, 0]
    assert splits.test is not None and len(splits.test) == 2
    assert torch.equal(splits.train.image(2), torch.from_numpy(smooth(seed=2)).permute(2, 0, 1))
    assert len(set(splits.train.keys)) == 4
    one = open_data(tmp_path / "data" / "test.parquet")
    assert one.test is not None and len(one.test) == 2 and len(one.train) == 0
    (tmp_path / "data" / "test.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="Parquet"):
        open_data(tmp_path / "data" / "test.parquet")


def test_hidden_parquet_files_are_left_out(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"image": [encoded(smooth(seed=i)) for i in range(2)], "label": ["a", "b"]})
    for folder in ("data", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / folder).mkdir()
        pq.write_table(table, tmp_path / folder / "train-0.parquet")
    (tmp_path / "data" / "._train-0.parquet").write_bytes(b"AppleDouble")
    assert len(open_data(tmp_path).train) == 2


def test_large_parquet_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    files = [encoded(smooth(seed=i)) for i in range(5)]
    pq.write_table(pa.table({"image": files, "label": ["b", "a", "b", "a", "a"]}), tmp_path / "photos.parquet")
    monkeypatch.setattr(parquet, "IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        train = open_data(tmp_path / "photos.parquet").train
        assert [train.read(i) for i in range(5)] == files and train.labels.tolist() == [1, 0, 1, 0, 0]
    assert len(list((tmp_path / "cache" / "vitrail").iterdir())) == 1


def write_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_mnists_files(tmp_path: Path, ending: str, below: str) -> None:
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    images = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5)
    for split, count in (("train", 4), ("t10k", 2)):
        write_idx(tmp_path / below / f"{split}-images-idx3-ubyte{ending}", images[:count])
        write_idx(tmp_path / below / f"{split}-labels-idx1-ubyte{ending}", np.array([0, 1, 1, 0], np.uint8)[:count])
    splits = open_data(tmp_path)
    assert splits.train.channels == 1 and splits.test is not None and len(splits.test) == 2
    assert torch.equal(splits.train.image(3)[0], torch.from_numpy(images[3]))
    (tmp_path / below / f"train-labels-idx1-ubyte{ending}").write_bytes(b"nothing")
    with pytest.raises(UserError, match="train-labels"):
        open_data(tmp_path)


def test_built_in_names_look_in_the_environment_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "mnist", {"0": 1, "1": 1})
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    assert len(open_data("mnist").train) == 2
    assert len(open_data(tmp_path, name="mnist").train) == 2
    folder_of(tmp_path / "pets", {"cat": 2, "dog": 1})
    assert len(open_data("pets").train) == 3, "other folders there are known by their name too"

    def fails(name: str, root: Path, download: bool) -> None:
        raise RuntimeError("no network\nhere")

    monkeypatch.setattr(builtin, "_torchvision", fails)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cifar100 could not be downloaded \(no network here\)"):
        open_data("cifar100")


def test_a_download_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builtin, "SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz"
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", url)
        with pytest.raises(UserError, match=r"cifar10 could not be downloaded \(.*timed out"):
            builtin.download("cifar10")
    assert socket.getdefaulttimeout() is None


def test_wrong_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean cifar10"):
        open_data("cifar_10")
    with pytest.raises(UserError, match="built-in sets are digits"):
        open_data(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no images"):
        open_data(tmp_path)
    (tmp_path / "loose.jpg").write_bytes(encoded(smooth(), "JPEG"))
    with pytest.raises(UserError, match="no class folders"):
        open_data(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        open_data(tmp_path / "loose.jpg")
    folder_of(tmp_path / "one", {"cat": 2})
    with pytest.raises(UserError, match="one class"):
        open_data(tmp_path / "one")
    (tmp_path / "one" / "cat" / "bad.jpg").write_bytes(b"bad")
    (tmp_path / "one" / "dog").mkdir()
    (tmp_path / "one" / "dog" / "bad.jpg").write_bytes(b"")
    with pytest.raises(BadImage, match=r"dog/bad\.jpg: the file is empty"):
        open_data(tmp_path / "one").train.image(3)


def test_split_stays_when_files_are_added_or_renamed(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 40, "b": 40})
    train, val = split_val(open_data(tmp_path).train, 0.2)
    assert 6 <= len(val) <= 26 and len(train) + len(val) == 80 and not set(train.keys) & set(val.keys)
    (tmp_path / "a" / "new.jpg").write_bytes(encoded(smooth(seed=999), "JPEG"))
    (tmp_path / val.keys[0]).rename(tmp_path / "b" / "renamed.jpg")
    after_train, after_val = split_val(open_data(tmp_path).train, 0.2)
    assert set(val.keys[1:]) | {"b/renamed.jpg"} <= set(after_val.keys)
    assert set(train.keys) <= set(after_train.keys)


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF", "npy", "tensor"])
def test_split_of_uncompressed_images_with_the_same_margin(kind: str, tmp_path: Path) -> None:
    items: list[Any] = []
    for i in range(60):
        pixels = np.concatenate([smooth(60, 160, seed=i), np.full((60, 160, 3), 255, np.uint8)])
        pixels = np.concatenate([pixels[60:], pixels])  # margins at both ends: BMP begins with the last row
        if kind == "tensor":
            items.append(torch.from_numpy(pixels))
        elif kind == "npy":
            np.save(tmp_path / f"{i}.npy", pixels)
            items.append(tmp_path / f"{i}.npy")
        else:
            items.append(encoded(pixels, kind))
    labels = Labels(torch.zeros(60, dtype=torch.int64), ["a", "b"])
    whole = ImageSet("margins", [str(i) for i in range(60)], items, labels)
    _, val = split_val(whole, 0.4)
    assert 12 <= len(val) <= 36


def test_rows_without_a_label_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [encoded(smooth(seed=i), "PNG") for i in range(5)]
    pq.write_table(pa.table({"image": images, "label": ["x", None, "y", None, "x"]}), tmp_path / "train.parquet")
    train = open_data(tmp_path).train
    assert train.classes == ["x", "y"] and train.labels.tolist() == [0, 1, 0]
    assert torch.equal(train.image(1), torch.from_numpy(smooth(seed=2)).permute(2, 0, 1))
    assert "2 of 5 rows have no label" in caplog.text


def test_a_split_whose_labels_are_hidden_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    names = {"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}
    images = [encoded(smooth(seed=i)) for i in range(3)]
    for split, labels in {"train": [0, 1, 0], "validation": [1, -1, 0], "test": [-1, -1, -1]}.items():
        table = pa.table({"image": images, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    splits = open_data(tmp_path)
    assert splits.test is None and splits.val is not None and splits.val.labels.tolist() == [1, 0]
    assert torch.equal(splits.val.image(1), torch.from_numpy(smooth(seed=2)).permute(2, 0, 1))
    assert "1 of 3 rows have no label" in caplog.text and "3 of 3 rows have no label" in caplog.text


def test_a_class_of_parquet_without_training_images_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [encoded(smooth(seed=i)) for i in range(2)]
    pq.write_table(pa.table({"image": images, "label": ["a", "b"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": images, "label": ["a", "c"]}), tmp_path / "val.parquet")
    with pytest.raises(UserError, match="the val split of .* has a class that the training split lacks: c"):
        open_data(tmp_path)


def test_where_nothing_names_the_classes_minus_one_is_one_of_them(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [encoded(smooth(seed=i)) for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": [-1, 1, 1, -1]}), tmp_path / "train.parquet")
    assert len(open_data(tmp_path).train) == 4


def test_split_of_few(tmp_path: Path) -> None:
    four = open_data(folder_of(tmp_path, {"a": 2, "b": 2})).train
    for fraction in (0.0, 1.0):
        train, val = split_val(four, fraction)
        assert set(train.labels.tolist()) == {0, 1} and len(val) in (1, 2), "each class keeps one to learn from"
        train, val = split_val(four.subset([0, 1, 2, 3] * 2), fraction)
        assert not set(train.keys) & set(val.keys), "copies are on one side"
    for few in ([0, 2], [0, 0, 0], [0, 2, 0, 2]):
        with pytest.raises(UserError, match="no image or group to hold back"):
            split_val(four.subset(few))
    with pytest.raises(UserError, match="at least two"):
        split_val(four.subset([0]))
    train, val = split_val(open_data("digits").train)
    assert 100 < len(val) < 190 and torch.equal(split_val(open_data("digits").train)[1].labels, val.labels)


def in_memory(labels: list[int], contents: list[int]) -> ImageSet:
    """Images of one pixel row, each of some content; two with the same content are copies."""
    items = torch.tensor(contents, dtype=torch.int32).view(torch.uint8).reshape(-1, 1, 1, 4)
    names = [f"c{i}" for i in range(max(labels) + 1)]
    keys = [f"c{c}/{i}" for i, c in enumerate(labels)]
    return ImageSet("made", keys, items, Labels(torch.tensor(labels), names), 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=60), st.sampled_from([0.1, 0.5, 1.0]))
def test_each_class_keeps_images_to_learn_from(images: list[tuple[int, int]], fraction: float) -> None:
    images = [*images, (6, 50), (6, 51), (6, 52)]  # at least one class can be split
    whole = in_memory([label for label, _ in images], [content for _, content in images])
    train, val = split_val(whole, fraction)
    assert sorted(train.keys + val.keys) == sorted(whole.keys) and len(val)
    assert set(train.labels.tolist()) == {label for label, _ in images}
    contents = [{split.read(i).numpy().tobytes() for i in range(len(split))} for split in (train, val)]  # type: ignore[union-attr]
    assert not contents[0] & contents[1], "copies are on one side, also those in two classes"


def test_classes_too_small_to_split_are_named(caplog: pytest.LogCaptureFixture) -> None:
    whole = in_memory([0] * 40 + [1] * 40 + [2, 3, 3, 4, 4, 4, 4], [*range(80), 80, 81, 82, 83, 83, 83, 83])
    train, val = split_val(whole, 0.5)
    assert set(val.labels.tolist()) == {0, 1} and train.labels.bincount()[2:].tolist() == [1, 2, 4]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "too small to hold images back for validation (fewer than 3 different images), so all train: "
        "c2 (1), c3 (2), c4 (4)"
    )


def test_the_split_of_classes_that_are_large_enough_is_the_hash_alone() -> None:
    """As it was before small classes were kept: the scores of recipes depend on it."""
    big = in_memory([i % 3 for i in range(300)], list(range(300)))
    held = set(split_val(big)[1].keys)
    assert held == {key for i, key in enumerate(big.keys) if content_hash(big.read(i)) / (1 << BITS) < 0.1}
    small = in_memory([i % 3 for i in range(300)] + [3, 3], [*range(300), 1000, 1001])
    assert set(split_val(small)[1].keys) == held
