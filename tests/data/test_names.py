"""Names in tables mean files: also those that Windows, or another machine, wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from images import encoded, smooth

from vitrail.data.captions import open_captions
from vitrail.data.names import Finder, is_absolute, match_keys, tails, tidied
from vitrail.data.sets import open_data
from vitrail.data.targets import Texts
from vitrail.errors import UserError


def files(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(smooth(12, 12, seed=i), "JPEG"))
    return root


@pytest.mark.parametrize(
    "name, clean, absolute",
    [
        ("images\\0.jpg", "images/0.jpg", False),
        ("images\\a/b\\0.jpg", "images/a/b/0.jpg", False),
        (".\\images\\0.jpg", "images/0.jpg", False),
        ("././images//0.jpg", "images/0.jpg", False),
        ("\ufeffimages/0.jpg  ", "images/0.jpg", False),
        ("..\\images\\0.jpg", "../images/0.jpg", False),
        ("C:\\data\\0.jpg", "C:/data/0.jpg", True),
        ("d:0.jpg", "d:0.jpg", True),
        ("\\\\server\\share\\0.jpg", "//server/share/0.jpg", True),
        ("\\\\?\\C:\\data\\0.jpg", "//?/C:/data/0.jpg", True),
        ("/home/me/0.jpg", "/home/me/0.jpg", True),
        ("file:///home/me/0.jpg", "file:/home/me/0.jpg", True),
    ],
)
def test_names_are_tidied(name: str, clean: str, absolute: bool) -> None:
    assert tidied(name) == clean and is_absolute(clean) == absolute


def test_the_ends_of_a_name() -> None:
    assert list(tails("//?/C:/data/images/0.jpg")) == ["data/images/0.jpg", "images/0.jpg", "0.jpg"]
    assert list(tails("file:/a/0.jpg")) == ["a/0.jpg", "0.jpg"]


@given(st.text(max_size=40))
def test_no_name_is_too_odd(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert Finder().find(name, [folder], "here") in (None, folder / name, folder / tidied(name))


@pytest.mark.parametrize(
    "name",
    [
        *("images\\000.jpg", "images/000.jpg", ".\\images\\000.jpg", "images\\\\000.jpg", "images/000.jpg ", "000.jpg"),
        *(
            "images\\000.JPG",
            "images/000.Jpg",
            "Images\\000.jpg",
            "C:\\IMAGES\\000.JPG",
            "C:\\data\\images\\000.jpg",
            "c:/Users/me/set/images/000.jpg",
        ),
        *(
            "\\\\nas\\share\\images\\000.jpg",
            "/home/somebody/set/images/000.jpg",
            "D:\\000.JPG",
            "\ufeffimages/000.jpg",
        ),
    ],
)
def test_captions_of_a_table_from_windows(name: str, tmp_path: Path) -> None:
    files(tmp_path, "images/000.jpg", "images/001.jpg")
    (tmp_path / "captions.csv").write_text(f'image,caption\n"{name}",a dog\nimages/001.jpg,a cat\n', encoding="utf-8")
    train = open_captions(tmp_path, val_fraction=0).train
    assert dict(zip(train.keys, Texts.of(train).captions, strict=True)) == {
        "images/000.jpg": ["a dog"],
        "images/001.jpg": ["a cat"],
    }


def test_cocos_file_names_from_windows(tmp_path: Path) -> None:
    files(tmp_path, "images/000.jpg")
    image = {"id": 1, "file_name": "C:\\data\\images\\000.JPG"}
    data = {"images": [image], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    (tmp_path / "captions.json").write_text(json.dumps(data))
    assert open_captions(tmp_path, val_fraction=0).train.keys == ["images/000.jpg"]


@pytest.mark.parametrize("odd", [True, False])
def test_parquet_with_paths_from_windows(odd: bool, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    files(tmp_path, "cat/0.jpg", "dog/0.jpg")
    names = ["C:\\set\\cat\\0.jpg", "dog\\0.JPG"] if odd else ["cat/0.jpg", "dog/0.jpg"]
    struct = [{"bytes": None, "path": name} for name in names]
    for column in (names, struct):
        pq.write_table(pa.table({"image": column, "label": ["cat", "dog"]}), tmp_path / "train.parquet")
        train = open_data(tmp_path / "train.parquet").train
        assert [train.read(i) for i in range(2)] == [tmp_path / "cat" / "0.jpg", tmp_path / "dog" / "0.jpg"]


def test_a_file_of_that_very_name_comes_first(tmp_path: Path) -> None:
    files(tmp_path, "images\\0.jpg", "images/0.jpg", "x.jpg", "x.JPG")
    find = Finder().find
    assert find("images\\0.jpg", [tmp_path], "") == tmp_path / "images\\0.jpg"
    assert find("x.JPG", [tmp_path], "") == tmp_path / "x.JPG" and find("x.jpg", [tmp_path], "") == tmp_path / "x.jpg"
    assert find("x.Jpg", [tmp_path], "") is None, "two files would do"
    assert find("X.jpg", [tmp_path], "") is None, "only the ending's case may differ"
    assert find("other/x.jpg", [tmp_path], "") is None, "a path below the folder is not shortened"


def test_what_could_be_several_files_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "images/0.jpg", "thumbs/0.jpg", "images/1.jpg")
    folders = [tmp_path, tmp_path / "images", tmp_path / "thumbs"]
    with pytest.raises(UserError, match=r"t.csv, line 2: 'C:/set/0.jpg' could be .*images/0.jpg or .*thumbs/0.jpg"):
        Finder().find("C:\\set\\0.jpg", folders, "t.csv, line 2")
    assert Finder().find("C:\\set\\thumbs\\0.jpg", folders, "") == tmp_path / "thumbs" / "0.jpg"
    finder = Finder()
    assert finder.find("C:\\a\\1.jpg", folders, "") == tmp_path / "images" / "1.jpg"
    with pytest.raises(UserError, match=r"'C:/b/1.jpg' is not found, and .*images/1.jpg is already 'C:/a/1.jpg'"):
        finder.find("C:\\b\\1.jpg", folders, "")


def test_an_image_of_another_split_is_another(tmp_path: Path) -> None:
    files(tmp_path, "val/1.jpg")
    folders = [tmp_path, tmp_path / "val"]
    assert Finder().find("C:\\set\\train\\1.jpg", folders, "") is None
    assert Finder().find("C:\\set\\val\\1.jpg", folders, "") == tmp_path / "val" / "1.jpg"


def test_names_that_mean_keys() -> None:
    keys = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/s1/2.jpg"]
    names = ["cat\\0.jpg", "1.jpg", "C:\\set\\dog\\0.JPG", "s1/2.jpg", "cow/1.jpg", ""]
    assert match_keys(names, keys, str) == [0, 1, 2, 3, None, None]
    with pytest.raises(UserError, match="7: '0.jpg' could be cat/0.jpg or dog/0.jpg"):
        match_keys(["0.jpg"], keys, lambda number: str(number + 7))
