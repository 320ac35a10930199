"""Tar files hold what the folder held: labels, pixels and order, for any number of workers, and damage is named."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import encoded, folder_of, smooth
from PIL import Image

from vitrail.cli import main
from vitrail.data import members as members_module
from vitrail.data.augment import Augment
from vitrail.data.decode import decode, resize
from vitrail.data.loader import Batch, Loader
from vitrail.data.packing import pack
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, open_data, split_val
from vitrail.data.shards import INDEX
from vitrail.errors import UserError

ROTATED = Image.Exif()
ROTATED[0x0112] = 6
SMALL = ["--epochs=2", "--patch=8", "--width=24", "--heads=2", "--depth=1", "--device=cpu", "--image-size", "16", "16"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 24 images in all formats that people mix, some with dots and spaces in their names."""
    root = folder_of(tmp_path_factory.mktemp("data") / "photos", {"ant": 8, "bee 2": 8}, (60, 90))
    pixels = smooth(70, 100, seed=99)
    clear = np.dstack([pixels, np.where(np.arange(100) < 50, 255, 0)[None].repeat(70, 0)]).astype(np.uint8)
    files = {
        "ant/grey.jpg": encoded(pixels[..., 0], "JPEG"),
        "ant/v1.0.turned.jpg": encoded(pixels, "JPEG", exif=ROTATED),
        "ant/print.jpg": encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
        "ant/clear.png": encoded(clear),
        "bee 2/deep.png": encoded(pixels[..., 0].astype(np.uint16) << 8),
        "bee 2/old.gif": encoded(pixels, "GIF"),
        "bee 2/tiny.png": encoded(pixels[:30, :40]),
        "bee 2/array.npy": _npy(pixels),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def copied(photos: Path) -> Path:
    pack(open_data(photos), photos.with_name("copied"), tar_bytes=20_000)
    return photos.with_name("copied")


@pytest.fixture(scope="module")
def shrunk(photos: Path) -> Path:
    pack(open_data(photos), photos.with_name("shrunk"), 40)
    return photos.with_name("shrunk")


def batches(images: ImageSet, count: int = 5, start: int = 0, workers: int = 0) -> list[Batch]:
    augment = Augment(crop="resized", flip=True, erase=0.5)
    made = Loader(
        images, Preprocess((16, 16)), batch_size=8, seed=3, train=True, augment=augment, memory=False, workers=workers
    ).batches(start)
    return [next(made) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("image", "label", "sample")
    )


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_copied_set_is_the_folder_bit_for_bit(photos: Path, copied: Path) -> None:
    folder, tars = open_data(photos), open_data(copied)
    assert tars.fingerprint() == folder.fingerprint() and tars.train.channels == folder.train.channels
    assert (tars.train.keys, tars.train.classes) == (folder.train.keys, ["ant", "bee 2"])
    assert torch.equal(tars.train.labels, folder.train.labels)
    for i, file in enumerate(folder.train.items):
        assert tars.train.open(i).data == Path(file).read_bytes()
        assert torch.equal(tars.train.image(i), folder.train.image(i))
    for workers in (0, 1, 2):
        assert same(batches(tars.train, workers=workers), batches(folder.train))
    assert same(batches(tars.train, 2, start=3, workers=2), batches(folder.train)[3:])
    evaluated = [torch.cat([b["image"] for b in _evaluated(s.train)]) for s in (tars, folder)]
    assert torch.equal(*evaluated)


def _evaluated(images: ImageSet) -> list[Batch]:
    return list(Loader(images, Preprocess((16, 16)), batch_size=5, seed=0, train=False, memory=False).evaluation())


def test_the_tar_files_are_those_of_webdataset_and_their_index_that_of_timm(photos: Path, copied: Path) -> None:
    folder = open_data(photos).train
    files = sorted(copied.glob("*.tar"))
    assert [file.name for file in files] == [f"train-{i:06d}.tar" for i in range(len(files))] and len(files) > 2
    assert sorted(copied.iterdir()) == sorted([*files, copied / INDEX])
    own = json.loads((copied / INDEX).read_text())["splits"]["train"]
    assert (own["name"], own["num_samples"]) == ("train", 24) and own["filenames"] == [file.name for file in files]
    names: list[str] = []
    labels: list[int] = []
    counts: list[int] = []
    for file in files:
        with tarfile.open(file) as archive:
            inside = archive.getnames()
            found = [archive.extractfile(name).read() for name in inside]  # type: ignore[union-attr]
        assert file.stat().st_size == own["bytes"][len(counts)] <= 20_000 + tarfile.RECORDSIZE + 3 * 1024
        for (image, cls, row), (_, label, more) in zip(_threes(inside), _threes(found), strict=True):
            stem = image.partition(".")[0]
            assert (cls, row) == (f"{stem}.cls", f"{stem}.json") and stem == f"{len(names):09d}"
            names.append(json.loads(more)["filename"])
            labels.append(int(label))
            assert image.rpartition(".")[2] == Path(names[-1]).suffix[1:]
        counts.append(len(inside) // 3)
    assert names == folder.keys and labels == folder.labels.tolist() and counts == own["shard_lengths"]


def _threes(items: list[Any]) -> list[Any]:
    return [items[i : i + 3] for i in range(0, len(items), 3)]


def test_equal_images_make_equal_files(photos: Path, shrunk: Path, tmp_path: Path) -> None:
    pack(open_data(photos), tmp_path / "again", 40)
    for file in shrunk.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_larger_images_are_shrunk_to_the_pixels_that_vitrail_reads(photos: Path, shrunk: Path) -> None:
    folder, tars = open_data(photos).train, open_data(shrunk).train
    assert tars.keys == folder.keys and torch.equal(tars.labels, folder.labels)
    for i, key in enumerate(folder.keys):
        whole, small = decode(folder.items[i]), tars.image(i, 3)  # type: ignore[arg-type]
        if min(whole.shape[1:]) <= 40:
            assert key == "bee 2/tiny.png" and torch.equal(small, whole)
            continue
        assert min(small.shape[1:]) == 40 and (small.shape[1] > small.shape[2]) == (whole.shape[1] > whole.shape[2])
        wanted = resize(whole, (small.shape[1], small.shape[2]))
        assert (small.int() - wanted.int()).abs().float().mean() < 4, key
    sizes = {key: tars.image(i).shape for i, key in enumerate(tars.keys)}
    assert sizes["ant/v1.0.turned.jpg"] == (3, 57, 40), "it is not upright"
    greys = [i for i, key in enumerate(tars.keys) if "grey" in key or "deep" in key]
    assert [tars.open(i).readable_as()[0] for i in greys] == [1, 1]  # type: ignore[union-attr]


def test_a_shrunk_image_stays_on_its_side_of_the_validation_split(photos: Path, shrunk: Path, tmp_path: Path) -> None:
    held = split_val(open_data(photos).train, 0.3)[1].keys
    pack(open_data(shrunk), tmp_path / "twice", 30)
    bare = _without_index(tmp_path / "twice", tmp_path / "bare")
    for path in (shrunk, tmp_path / "twice", bare):
        assert split_val(open_data(path).train, 0.3)[1].keys == held and held


def _without_index(folder: Path, out: Path) -> Path:
    out.mkdir()
    for file in folder.glob("*.tar"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_without_an_index_the_tar_files_give_the_same_set(copied: Path, tmp_path: Path) -> None:
    bare = open_data(_without_index(copied, tmp_path / "bare"))
    assert bare.fingerprint() == open_data(copied).fingerprint()
    assert same(batches(bare.train, 2), batches(open_data(copied).train, 2))


def test_splits_are_kept_and_channels_other_than_one_and_three_are_copied_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in "ab":
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                bands = np.random.default_rng(i).integers(0, 256, (30, 30, 5), dtype=np.uint8)
                (data / split / name / f"{i}.npy").write_bytes(_npy(bands))
    packed = pack(open_data(data), tmp_path / "out")
    assert {split: own.images for split, own in packed.items()} == {"train": 8, "val": 4, "test": 4}
    found = open_data(tmp_path / "out")
    assert found.train.channels == 5 and found.test is not None and found.test.image(0).shape == (5, 30, 30)
    with pytest.raises(UserError, match=r"train/a/0.npy has 5 channels, and a JPEG holds 1 or 3"):
        pack(open_data(data), tmp_path / "small", 20)
    assert not (tmp_path / "small").exists()


def test_a_built_in_set_of_arrays_is_stored_without_loss(tmp_path: Path) -> None:
    pack(open_data("digits"), tmp_path / "digits", 256)
    found, digits = open_data(tmp_path / "digits"), open_data("digits")
    assert found.test is not None and digits.test is not None
    assert all(torch.equal(found.test.image(i), digits.test.image(i)) for i in range(len(digits.test)))
    assert torch.equal(found.train.labels, digits.train.labels) and found.train.channels == 1


def test_members_are_read_in_other_processes_and_from_many_files(
    copied: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_data(copied).train
    assert pickle.loads(pickle.dumps(images.items))[5].read_bytes() == images.read(5).read_bytes()  # type: ignore[union-attr]
    monkeypatch.setattr(members_module, "KEPT_OPEN", 1)
    assert same(batches(open_data(copied).train, 2), batches(open_data(photos).train, 2))


# ---- tar files of other tools


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def photo(seed: int) -> bytes:
    return encoded(smooth(20, 24, seed), "JPEG")


@pytest.mark.parametrize(
    "beside, classes",
    [
        (lambda i: {"cls": str(i % 3).encode()}, ["0", "1", "2"]),
        (lambda i: {"cls": f"{'abc'[i % 3]}\n".encode(), "txt": b"a cat"}, ["a", "b", "c"]),
        (lambda i: {"json": json.dumps({"label": i % 3, "filename": "x.jpg"}).encode()}, ["0", "1", "2"]),
        (lambda i: {"json": json.dumps({"label": i % 3, "class": "abc"[i % 3]}).encode()}, ["a", "b", "c"]),
        (lambda i: {"cls": str(i % 3).encode(), "seg.png": photo(9), "json": b"{}"}, ["0", "1", "2"]),
    ],
)
def test_labels_of_other_tools(beside: Callable[[int], dict[str, bytes]], classes: list[str], tmp_path: Path) -> None:
    def samples(start: int, count: int, long: str = "") -> dict[str, bytes]:
        rows = {i: {"JPG": photo(i), **beside(i)} for i in range(start, start + count)}
        return {f"./in/{long}{i:04d}.{ending}": data for i, row in rows.items() for ending, data in row.items()}

    tar(tmp_path / "set" / "x-train-00.tar", samples(0, 6))
    tar(tmp_path / "set" / "x-train-01.tar", samples(6, 3, "long" * 40))  # such a name has a header of its own
    tar(tmp_path / "set" / "x-validation-00.tar", samples(9, 4))
    found = open_data(tmp_path / "set")
    assert found.train.classes == classes and found.val is not None and found.test is None
    assert found.train.labels.tolist() == [i % 3 for i in range(9)] and found.val.labels.tolist() == [0, 1, 2, 0]
    assert all(torch.equal(found.train.image(i), decode(photo(i))) for i in range(9))
    assert found.train.keys[0] == "./in/0000.JPG" and len({*found.train.keys}) == 9


def test_keys_that_repeat_are_told_apart_and_hidden_labels_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        rows = {
            "0.jpg": photo(1),
            "0.cls": b"0",
            "1.jpg": photo(2),
            "1.cls": b"1",
            "2.jpg": photo(3),
            "2.cls": b"-1",
        }
        tar(tmp_path / "train" / f"{number}.tar", {**rows, "._0.jpg": b"litter"})
    found = open_data(tmp_path)
    assert found.train.keys == ["0/0.jpg", "0/1.jpg", "1/0.jpg", "1/1.jpg"]
    assert said(caplog) == [f"{tmp_path / 'train' / '0.tar'}: 2 of 6 images have no class and are left out"]


def test_a_split_of_tar_files_beside_one_of_class_folders_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as ImageNet, of which one archive is not unpacked: without a word, `val` would be cut off `train`."""
    folder_of(tmp_path / "train", {"a": 2, "b": 2})
    (tmp_path / "val").mkdir()
    tar(tmp_path / "val" / "val.tar", {"a/2.jpg": photo(2)})
    assert open_data(tmp_path).val is None
    assert any(
        line.startswith(f"{tmp_path / 'val'} holds tar files, and other splits hold class") for line in said(caplog)
    )


def test_a_tar_file_beside_class_folders_is_not_the_set(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", {"a": 2, "b": 2})
    tar(data / "data.tar", {"0.jpg": photo(1), "0.cls": b"0"})
    assert open_data(data).train.classes == ["a", "b"]


@pytest.mark.parametrize(
    "files, line",
    [
        ({"0.jpg": photo(1), "0.txt": b"a cat"}, "without a class (KEY.cls, or `label` in KEY.json): unpack it"),
        ({"cat/0.jpg": photo(1), "dog/0.jpg": photo(2)}, "give a folder with one folder per class"),
        ({"0.cls": b"0", "readme": b""}, "holds no images as WebDataset names them"),
        ({"0.jpg": photo(1), "0.json": b"{"}, "the files beside 0.jpg cannot be read"),
        ({"0.jpg": photo(1), "0.cls": b"\xff"}, "the files beside 0.jpg cannot be read"),
        ({"0.jpg": photo(1), "0.cls": b"0"}, "holds one class (0)"),
        (
            {f"{i}.{e}": d for i, c in enumerate("ab") for e, d in
             (("jpg", photo(i)), ("json", json.dumps({"label": 0, "class": c}).encode()))},
            "class 0 has two names",
        ),
    ],
)  # fmt: skip
def test_other_tar_files_are_refused(files: dict[str, bytes], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_data(tar(tmp_path / "x.tar", files))
    assert line in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ---- damage


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["splits"]["train"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def _cut(folder: Path, name: str = "train-000001.tar") -> int:
    return (folder / name).write_bytes((folder / name).read_bytes()[:-7000])


@pytest.mark.parametrize(
    "damage, line",
    [
        (_cut, "train-000001.tar has "),
        (lambda folder: (folder / "train-000001.tar").unlink(), "train-000001.tar is missing, and _info.json lists it"),
        (lambda folder: (folder / INDEX).write_text("{"), "_info.json is damaged: it is not JSON"),
        (lambda folder: (folder / INDEX).write_text("[]"), "_info.json is damaged: it is not JSON"),
        (_index(lambda own: own["offsets"].__setitem__(3, 1 << 40)), "an image in it is outside its tar file"),
        (_index(lambda own: own["sizes"].__setitem__(3, -1)), "an image in it is outside its tar file"),
        (_index(lambda own: own["labels"].__setitem__(3, 2)), "a label in it has no class"),
        (_index(lambda own: own["bytes"].append(1)), "its lists of tar files have different lengths"),
        (_index(lambda own: own.pop("filenames")), "_info.json is damaged: KeyError: 'filenames'"),
        (_index(lambda own: own["shard_lengths"].__setitem__(0, 1 << 50)), "its columns have different lengths"),
        (_index(lambda own: own["labels"].pop()), "its columns have different lengths"),
        (_index(lambda own: own["labels"].__setitem__(3, "x")), "_info.json is damaged: ValueError"),
        (_index(lambda own: own["keys"].__setitem__(3, 3)), "a name in it is not text"),
        (
            _index(lambda own: own["filenames"].__setitem__(1, "../x.tar")),
            "../x.tar is not the name of a file beside it",
        ),
        (
            lambda folder: [(folder / INDEX).unlink(), _cut(folder)],
            "train-000001.tar is cut off, damaged or compressed",
        ),
        (
            lambda folder: [
                (folder / INDEX).unlink(),
                (folder / "a.tar").write_bytes(gzip.compress((folder / "train-000000.tar").read_bytes())),
            ],
            "a.tar is cut off, damaged or compressed",
        ),
    ],
)
def test_damage_to_a_set_is_named(damage: Callable[[Path], object], line: str, copied: Path, tmp_path: Path) -> None:
    folder = _without_index(copied, tmp_path / "set")
    (folder / INDEX).write_bytes((copied / INDEX).read_bytes())
    damage(folder)
    with pytest.raises(UserError) as error:
        open_data(folder)
    assert line in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_damaged_image_is_left_out_by_its_name(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _without_index(copied, tmp_path / "set")
    (folder / INDEX).write_bytes((copied / INDEX).read_bytes())
    place = json.loads((folder / INDEX).read_text())["splits"]["train"]["offsets"][2]
    with (folder / "train-000000.tar").open("r+b") as file:
        file.seek(place)
        file.write(bytes(400))
    tar(folder / "more-train.tar", {"0.jpg": photo(1), "0.cls": b"0"})
    images = open_data(folder).train
    assert (
        f"{folder / 'more-train.tar'} is not in _info.json: left out, as all tar files that it does not list"
        in said(caplog)
    )
    loader = Loader(images, Preprocess((16, 16)), batch_size=24, seed=0, train=False, memory=False, max_bad=0.1)
    (batch,) = loader.evaluation()
    assert len(batch["image"]) == 23 and loader.bad == {2: f"{images.keys[2]}: the bytes are no image"}


# ---- writing


def test_bad_images_are_left_out_and_too_many_stop_it(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = folder_of(tmp_path / "data", {"a": 5, "b": 5})
    whole = (data / "a" / "1.jpg").read_bytes()
    (data / "a" / "1.jpg").write_bytes(whole[:-100])
    (data / "b" / "2.jpg").write_bytes(encoded(smooth(), "PNG")[:-200])
    with pytest.raises(UserError, match=r"2 of 10 images of data are bad, more than 10.0% .*or raise --max-bad"):
        pack(open_data(data), tmp_path / "out", max_bad=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    caplog.clear()
    assert pack(open_data(data), tmp_path / "out", max_bad=0.2)["train"][:2] == (8, 2)
    assert said(caplog)[-2:] == ["left out: a/1.jpg: the file is cut off", "left out: b/2.jpg: the file is cut off"]
    assert len(open_data(tmp_path / "out").train) == 8


KILLED = """
import os, sys
from vitrail.data import packing
from vitrail.data.sets import open_data
add = packing.Writer.add
def some(self, *what):
    add(self, *what)
    if len(self.columns["keys"]) == 9: os._exit(9)
packing.Writer.add = some
packing.pack(open_data(sys.argv[1]), packing.Path(sys.argv[2]), tar_bytes=20_000)
"""


def test_a_kill_leaves_no_half_set(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(photos), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == 9 and not (tmp_path / "out").exists()
    assert all(path.name.startswith(".out.") for path in tmp_path.iterdir()), "it left a name that is read as data"

    def full(*what: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrail.data.packing._add", full)
    with pytest.raises(KeyboardInterrupt):
        pack(open_data(photos), tmp_path / "stopped")
    assert not [path for path in tmp_path.iterdir() if "stopped" in path.name]


def test_the_command_writes_what_train_reads_resumes_and_scores(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out, run = tmp_path / "set", tmp_path / "run"
    assert main(["data", "shard", str(photos), "--out", str(out), "--resize", "32", "--quality", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 24 images in 1 tar file, 0.1 MB") and lines[1:] == [str(out)]
    words = ["train", "folder", "--data", str(out), "--out", str(run), *SMALL, "--workers=1", "--memory=False"]
    assert main(words) == 0
    assert any(line.startswith("the images are read from disk: 1 worker decodes about ") for line in said(caplog))
    assert main(["eval", str(run), "--data", str(out), "--json", "--device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["split"] == "val"
    (run / "report.html").unlink()  # as if the run had been stopped
    pack(_fewer(out), tmp_path / "other")
    for file in out.iterdir():
        file.unlink()
    for file in (tmp_path / "other").iterdir():
        file.rename(out / file.name)
    assert main(["train", "--resume", str(run), "--device=cpu"]) == 2
    assert "its train split had 24 images and has 23" in capsys.readouterr().err


def _fewer(path: Path) -> Any:
    splits = open_data(path)
    splits.train = splits.train.subset(range(23))
    return splits


@pytest.mark.parametrize(
    "words, line",
    [
        (["{photos}", "--out", "{photos}/out"], "is inside {photos}"),
        (["{photos}", "--out", "{photos}"], "is inside {photos}"),
        (["{photos}", "--out", "{shrunk}"], "{shrunk} exists and is not empty"),
        (["{photos}", "--out", "{tmp}/a.tar"], "has the ending of a file, .tar"),
        (["{photos}", "--out", "{tmp}/a", "--resize", "0"], "--resize must be at least 1 and at most 65536"),
        (
            ["{photos}", "--out", "{tmp}/a", "--resize", "32", "--quality", "101"],
            "--quality must be at least 1 and at most 100",
        ),
        (["{photos}", "--out", "{tmp}/a", "--quality", "80"], "--quality is that of the JPEGs which --resize writes"),
        (["{photos}", "--out", "{tmp}/a", "--tar-mb", "0"], "--tar-mb must be at least 1"),
        (["{photos}", "--out", "{tmp}/a", "--max-bad", "2"], "--max-bad must be a fraction from 0 to 1, got 2.0"),
        (
            ["{tmp}/captions", "--out", "{tmp}/a"],
            "captioned images (captions.txt), and shards hold images with one class",
        ),
        (
            ["{tmp}/masks", "--out", "{tmp}/a"],
            "images with masks (images/ beside masks/), and shards hold images with one",
        ),
        (["{tmp}/none", "--out", "{tmp}/a"], "no data at {tmp}/none"),
    ],
)
def test_wrong_input_gets_one_line(
    words: list[str], line: str, photos: Path, shrunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "captions", {"images": 2})
    (tmp_path / "captions" / "captions.txt").write_text("image,caption\n0.jpg,a cat\n")
    folder_of(tmp_path / "masks", {"images": 2, "masks": 2})
    places = {"photos": photos, "shrunk": shrunk, "tmp": tmp_path}
    assert main(["data", "shard", *(word.format(**places) for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("vitrail: ") and line.format(**places) in said
    assert not (tmp_path / "a").exists()
