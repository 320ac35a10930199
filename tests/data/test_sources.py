"""Which files are images, which folders are splits, what is hidden or linked, and what was left out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from images import encoded, folder_of, smooth

from vitrail.cli import COMMANDS
from vitrail.data import sources
from vitrail.data.captions import open_captions
from vitrail.data.sets import open_data
from vitrail.data.sources import files_by_split, images_of, is_litter, split_of
from vitrail.errors import UserError


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def below(root: Path, files: list[Path]) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def test_predict_train_and_captions_see_the_same_files(tmp_path: Path) -> None:
    """From a Mac, from Jupyter, from a storage server, from Windows; with links out of the set and back up."""
    root, jpeg = tmp_path / "set", encoded(smooth(20, 24), "JPEG")
    folder_of(tmp_path / "store", {"dog": 2})
    folder_of(root, {"cat": 2, "cow": 1})
    litter = ["cat/._0.jpg", "__MACOSX/cat/._0.jpg", "cat/.ipynb_checkpoints/0-checkpoint.jpg", ".Trash/x.jpg"]
    litter += ["cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/$R1.jpg", "cat/Thumbs.db", "cow/.hidden.jpg"]
    for name in (*litter, "cat/deep/er/1.JPG", "cat/2.Jpeg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg)
    (root / "dog").symlink_to(tmp_path / "store" / "dog")
    (root / "cow" / "linked.jpg").symlink_to(tmp_path / "store" / "dog" / "0.jpg")
    for link, target in (("cat/up", ".."), ("cat/out", tmp_path), ("cat/deep/cow", "../../cow"), ("cow/self", ".")):
        (root / link).symlink_to(target)
    os.mkfifo(root / "cow" / "pipe.jpg")  # reading it would wait for ever
    expected = ["cat/0.jpg", "cat/1.jpg", "cat/2.Jpeg", "cat/deep/er/1.JPG", "cow/0.jpg", "cow/linked.jpg"]
    expected += ["dog/0.jpg", "dog/1.jpg"]
    assert below(root, images_of([root])) == expected
    train = open_data(root).train
    assert train.keys == expected and train.labels.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    for name in expected:
        (root / name).with_suffix(".txt").write_text("an animal")
    assert open_captions(root, val_fraction=0).train.keys == expected


def test_a_folder_keeps_its_own_place_whatever_links_lead_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path, {"z": 2, "other": 1})
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "other" / "b").symlink_to("../z")
    assert below(tmp_path, images_of([tmp_path])) == ["other/0.jpg", "z/0.jpg", "z/1.jpg"]
    assert said(caplog) == [
        f"{tmp_path}/a leads to a folder that is read already, and so do 1 more: it is not entered again"
    ]


def test_what_is_given_by_name_is_always_tried(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("._x.jpg", "x.HEIC", "x", "gone.png")]
    hidden = tmp_path / ".ipynb_checkpoints"
    folder_of(hidden, {"a": 1})
    assert images_of([*files, hidden]) == [*files, hidden / "a" / "0.jpg"]


def test_files_that_are_not_read_are_counted_by_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path, {"a": 2, "b": 1})
    odd = ["a/1.NEF", "a/2.NEF", "b/x.svg", "b/noise", "a/clip.MOV"]
    sides = ["README", "LICENSE", "a/notes.txt", "labels.csv", "meta.json", "b/x.xmp", ".DS_Store", "set.zip"]
    for name in [*odd, *sides]:
        (tmp_path / name).write_bytes(b"\0\0\0\1Bud1")
    open_data(tmp_path)
    images_of([tmp_path])
    (line, again) = said(caplog)
    assert (
        line
        == again
        == (
            f"5 files that are not images known to vitrail are left out in {tmp_path} "
            "(.NEF: 2, .MOV: 1, no ending: 1, .svg: 1)"
        )
    ), "side files of a set are no noise"


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    for name in ("0.NEF", "1.NEF", "notes.txt"):
        (tmp_path / "a" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no images \(its files: \.NEF: 2, \.txt: 1\): put the images of each"):
        open_data(tmp_path)
    with pytest.raises(UserError, match=r"holds no images \(its files: \.NEF: 2, \.txt: 1\): give a folder with"):
        images_of([tmp_path])
    caplog.clear()
    open_data(folder_of(tmp_path, {"b": 1, "c": 1}))
    assert f"{tmp_path}/a holds no images (its files: .NEF: 2, .txt: 1) and is left out" in said(caplog)


def test_heic_names_the_package_that_reads_it(tmp_path: Path) -> None:
    folder_of(tmp_path, {"cat": 2, "dog": 1})
    for i in range(3):
        (tmp_path / "cat" / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    script = (
        "import sys; sys.modules['pillow_heif'] = None\n"  # as where it is not installed
        f"from vitrail.data.sets import open_data; print(len(open_data({str(tmp_path)!r}).train))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "3\n"
    assert "(.HEIC: 3); `pip install 'vitrail[heic]'` lets vitrail read HEIC" in done.stderr


@pytest.mark.skipif(".heic" not in sources.ENDINGS, reason="pillow-heif is not installed")
def test_heic_is_read_where_it_can_be(tmp_path: Path) -> None:
    for name in ("a/0.HEIC", "b/0.heif", "b/none"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(smooth(), "HEIF"))
    train = open_data(tmp_path).train
    assert train.keys == ["a/0.HEIC", "b/0.heif", "b/none"] and train.image(2).shape == (3, 40, 56)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_images_without_an_ending_are_known_by_their_bytes(kind: str, tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "5f3a9c").write_bytes(encoded(smooth(), kind))
    (tmp_path / "a" / "notes").write_bytes(b"no image")
    (tmp_path / "a" / "empty").write_bytes(b"")
    train = open_data(tmp_path).train
    assert train.keys == ["a/0.jpg", "a/5f3a9c", "b/0.jpg"] and train.image(1).shape == (3, 40, 56)


def test_a_broken_link_to_an_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "a" / "loop").symlink_to("loop")
    train = open_data(tmp_path).train
    assert train.keys == ["a/0.jpg", "a/gone.jpg", "b/0.jpg"]
    with pytest.raises(UserError, match="a/gone.jpg"):
        train.image(1)


@pytest.mark.parametrize(
    "split, names",
    {
        "train": "train Train training train_images training_set trainset train2017 TrainImages",
        "val": "val valid validation val2017 valid_images validation_set dev Dev eval VAL_DATA",
        "test": "test Test testing test_set test-images TestData test2015",
        None: "cat station latest contest trains_and_cars attest value invalid valley device devil medieval train_test",
    }.items(),
)
def test_names_of_splits(split: str | None, names: str) -> None:
    for name in names.split():
        assert split_of(name) == split_of(name, strict=True) == split, name


@pytest.mark.parametrize(
    "name, split",
    [
        ("seg_train", "train"),
        ("train-00000-of-00002", "train"),
        ("imagenet-val", "val"),
        ("captions_test_b", "test"),
        ("bullet train", "train"),
    ],
)
def test_a_name_may_tell_more_than_the_split(name: str, split: str) -> None:
    assert split_of(name) == split and split_of(name, strict=True) is None


@given(st.text(max_size=30))
def test_any_name_has_an_answer(name: str) -> None:
    assert split_of(name) in ("train", "val", "test", None)
    assert split_of(name, strict=True) in (split_of(name), None)
    assert is_litter(f".{name}")


def test_parquet_files_by_split(tmp_path: Path) -> None:
    def names(*files: str) -> dict[str, list[str]]:
        found = files_by_split([tmp_path / file for file in files])
        return {split: below(tmp_path, members) for split, members in found.items()}

    assert names("data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0-of-1.parquet") == {
        "train": ["data/train-0-of-2.parquet", "data/train-1-of-2.parquet"],
        "test": ["data/test-0-of-1.parquet"],
    }
    assert names("validation/0.parquet", "training/0.parquet", "photos.parquet") == {
        "val": ["validation/0.parquet"],
        "train": ["training/0.parquet"],
        "": ["photos.parquet"],
    }
    assert names("my_test_run/photos.parquet") == {"": ["my_test_run/photos.parquet"]}, "a folder of any name"
    with pytest.raises(UserError, match=r"plain/?.* and .*raw both look like the train split"):
        names("plain/train-0.parquet", "raw/train-0.parquet")


@pytest.mark.parametrize("read", [lambda path: images_of([path]), open_data, open_captions])
@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_current_folder(
    read: Callable[[str], object], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_of(tmp_path, {"a": 2, "b": 2}))
    with pytest.raises(UserError, match="a path is empty"):
        read(path)


def test_an_empty_path_is_refused_by_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of(tmp_path, {"a": 2, "b": 2}))
    for command in (["predict", ""], ["train", "folder", "--data", ""], ["eval", "classify", "--data", ""]):
        with pytest.raises(UserError, match="a path is empty"):
            COMMANDS[command[0]](command[1:])
