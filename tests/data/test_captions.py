"""Captioned sets are found in every layout; what cannot be used is named once and counted."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import checked
from images import encoded, smooth

from vitrail.data.captions import open_captions
from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, split_val
from vitrail.data.targets import Texts
from vitrail.errors import UserError

HEBREW = "שני ילדים משחקים בחול"


def image_files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(encoded(smooth(20, 24, seed=sum(map(ord, str(folder.name) + name))), "JPEG"))
    return folder


def everything(split: ImageSet | None) -> dict[str, list[str]]:
    assert split is not None
    assert all(split.image(i).shape == (3, 20, 24) for i in range(len(split)))
    return dict(zip(split.keys, Texts.of(split).captions, strict=True))


def whole(path: Path) -> ImageSet:
    return open_captions(path, val_fraction=0).train


@pytest.mark.parametrize("header", ["image,caption\n", ""])
def test_one_folder_per_split_with_captions_txt(tmp_path: Path, header: str) -> None:
    for split, name in (("train", "a.jpg"), ("dev", "b.jpg")):
        image_files(tmp_path / split / "images", name)
        (tmp_path / split / "captions.txt").write_text(
            f'{header}{name},A dog, a cat , and  "a" bird .\n{name},"Go" says "he"\n'
            f'{name},"An open quote\n\n{name},{HEBREW}'
        )
    splits = open_captions(tmp_path)
    texts = ['A dog, a cat , and "a" bird .', '"Go" says "he"', '"An open quote', HEBREW]
    assert everything(splits.train) == {"train/images/a.jpg": texts}
    assert everything(splits.val) == {"dev/images/b.jpg": texts} and splits.test is None


def test_kaggles_flickr8k(tmp_path: Path) -> None:
    image_files(tmp_path / "Images", "1_a.jpg", "2_b.jpg")
    (tmp_path / "captions.txt").write_bytes(
        b'image,caption\r\n1_a.jpg,"A man , in a hat , says ""hi"" ."\r\n1_a.jpg,A man in a hat .\r\n'
        b'2_b.jpg,"Over\r\ntwo lines"\r\n2_b.jpg,""" Go "" , he says"\r\n'
    )
    assert everything(whole(tmp_path)) == {
        "Images/1_a.jpg": ['A man , in a hat , says "hi" .', "A man in a hat ."],
        "Images/2_b.jpg": ["Over two lines", '" Go " , he says'],
    }


def test_flickrs_own_tables(tmp_path: Path) -> None:
    image_files(tmp_path / "Flicker8k_Dataset", "1.jpg", "2.jpg")
    (tmp_path / "Flickr8k.token.txt").write_text("1.jpg#0\tA dog .\n1.jpg#1\tA , b .\n2.jpg#0\tA cat .\n")
    assert list(everything(whole(tmp_path / "Flickr8k.token.txt")).values()) == [["A dog .", "A , b ."], ["A cat ."]]
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n1.jpg| 0| A , dog\n1.jpg| 1| Two\n")
    assert list(everything(whole(tmp_path / "results.csv")).values()) == [["A , dog", "Two"]]


def test_karpathys_json(tmp_path: Path) -> None:
    image_files(tmp_path / "Flicker8k_Dataset", "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    images = [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"Caption {i} .", "tokens": ["caption"]}]}
        for i, split in enumerate(["train", "restval", "val", "test"], 1)
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    for path in (tmp_path, tmp_path / "dataset_flickr8k.json"):
        splits = open_captions(path)
        assert list(everything(splits.train).values()) == [["Caption 1 ."], ["Caption 2 ."]]
        assert everything(splits.val) == {"Flicker8k_Dataset/3.jpg": ["Caption 3 ."]}
        assert everything(splits.test) == {"Flicker8k_Dataset/4.jpg": ["Caption 4 ."]}


def coco(*texts: str, **more: Any) -> str:
    images = [{"id": 70 + i, "file_name": f"{i}.jpg"} for i in range(len(texts))]
    annotations = [{"id": i, "image_id": 70 + i, "caption": text} for i, text in enumerate(texts)]
    return json.dumps({"info": {}, "images": images, "annotations": annotations, **more})


@pytest.mark.parametrize("between", ["", "images"])
def test_karpathys_json_of_coco(between: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its splits are drawn from folders that are named for others: all but those of train2014 lie in val2014."""
    images = []
    for i, (folder, split) in enumerate(
        [("train2014", "train"), *(("val2014", s) for s in ("restval", "val", "test"))]
    ):
        image_files(tmp_path / between / folder, f"{i}.jpg")
        images.append({"filepath": folder, "filename": f"{i}.jpg", "split": split, "sentences": [{"raw": split}]})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    splits = open_captions(tmp_path)
    assert Texts.of(splits.train).captions == [["train"], ["restval"]]
    assert splits.val is not None and Texts.of(splits.val).captions == [["val"]]
    assert splits.test is not None and Texts.of(splits.test).captions == [["test"]] and not caplog.records


def test_cocos_folders_in_one_of_images(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        image_files(tmp_path / "images" / split, "0.jpg")
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(coco(split))
    splits = open_captions(tmp_path)
    assert (splits.train.keys, Texts.of(splits.train).captions) == (["images/train2017/0.jpg"], [["train2017"]])
    assert splits.val is not None and splits.val.keys == ["images/val2017/0.jpg"]


@pytest.mark.parametrize("folder", ["train/images", "cats/images", "images/cats"])
def test_an_image_of_the_same_name_elsewhere_is_another(folder: str, tmp_path: Path) -> None:
    image_files(tmp_path / folder, "0.jpg")
    (tmp_path / "captions_val.json").write_text(coco("A dog"))
    with pytest.raises(UserError, match=r"'0.jpg' is not found, nor any other of 1 images"):
        open_captions(tmp_path / "captions_val.json")


def test_a_table_without_any_of_its_images_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_files(tmp_path, "a.jpg")
    for name in "ab":
        (tmp_path / f"captions_{name}.csv").write_text(f"image,caption\n{name}.jpg,One\n")
    assert everything(whole(tmp_path)) == {"a.jpg": ["One"]}
    assert "captions_b.csv, line 2: 'b.jpg' is not found" in caplog.text


def test_a_column_names_the_split_whatever_the_folder(tmp_path: Path) -> None:
    image_files(tmp_path / "train_images", "a.jpg", "b.jpg", "c.jpg")
    image_files(tmp_path / "val_images", "b.jpg")
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,A,train\nb.jpg,B,val\nc.jpg,C,test\n")
    splits = open_captions(tmp_path)
    assert [split.keys for split in (splits.train, splits.val, splits.test) if split is not None] == [
        ["train_images/a.jpg"],
        ["val_images/b.jpg"],
        ["train_images/c.jpg"],
    ]


def test_cocos_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, count in (("train2017", 3), ("val2017", 2)):
        image_files(tmp_path / split, *(f"{i}.jpg" for i in range(count)))
        folder = tmp_path / "annotations"
        folder.mkdir(exist_ok=True)
        (folder / f"captions_{split}.json").write_text(coco(*(f"{split} {i}" for i in range(count))))
        (folder / f"instances_{split}.json").write_text("{}")
    splits = open_captions(tmp_path)
    assert list(everything(splits.train).values()) == [[f"train2017 {i}"] for i in range(3)]
    assert len(everything(splits.val)) == 2 and not caplog.records
    assert splits.val is not None and splits.val.keys == ["val2017/0.jpg", "val2017/1.jpg"], "names that both have"
    one = open_captions(tmp_path / "annotations" / "captions_val2017.json")
    assert len(one.train) == 0 and one.val is not None and len(one.val) == 2
    file = tmp_path / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps({**json.loads(coco("x", "y")), "annotations": [{"image_id": 9, "caption": "z"}]}))
    with pytest.raises(UserError, match="no image with a caption"):
        open_captions(file)
    assert "annotations[0]: there is no image with the id 9" in caplog.text
    file.write_text(coco("x", annotations=[{"image_id": 70, "bbox": []}]))
    with pytest.raises(UserError, match=r"annotations\[0\]: no `caption` among image_id, bbox"):
        open_captions(file)


def test_csv_with_columns_in_any_order_and_one_file_per_split(tmp_path: Path) -> None:
    image_files(tmp_path / "photos", "a.jpg", "b.jpg", "c.jpg")
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "Text", "split", "File_Name"])
        writer.writerows([[1, 'a "b",\nc', "train", "photos/a.jpg"], [2, HEBREW, "validation", "b.jpg"]])
        writer.writerow([3, "third", "test", str(tmp_path / "photos" / "c.jpg")])
    splits = open_captions(tmp_path)
    assert everything(splits.train) == {"photos/a.jpg": ['a "b", c']}
    assert everything(splits.val) == {"photos/b.jpg": [HEBREW]}
    assert everything(splits.test) == {"photos/c.jpg": ["third"]}


def test_every_column_of_captions_counts(tmp_path: Path) -> None:
    image_files(tmp_path, "a.jpg")
    (tmp_path / "table.csv").write_text("image,caption,other,caption\na.jpg,one,x,two\n")
    assert everything(whole(tmp_path)) == {"a.jpg": ["one", "two"]}


def test_csv_files_by_split_with_numbered_captions(tmp_path: Path) -> None:
    image_files(tmp_path / "images", "a.jpg", "b.jpg")
    (tmp_path / "train.csv").write_text("image;caption_0;caption_1\na.jpg;one, two;three\n")
    (tmp_path / "val.csv").write_text("image;caption_0;caption_1\nb.jpg;four;five\n")
    splits = open_captions(tmp_path)
    assert everything(splits.train) == {"images/a.jpg": ["one, two", "three"]}
    assert everything(splits.val) == {"images/b.jpg": ["four", "five"]}


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
@pytest.mark.parametrize("text", ["row", "list"])
def test_parquet(tmp_path: Path, kind: str, text: str, caplog: pytest.LogCaptureFixture) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    image_files(tmp_path / "data", *names)
    (tmp_path / "data" / "d.jpg").unlink()
    data = {name: (tmp_path / "data" / name).read_bytes() if name != "d.jpg" else None for name in names}
    made: dict[str, dict[str, Any]] = {
        "bytes": data,
        "struct": {n: {"bytes": d, "path": n} for n, d in data.items()},
        "path": {n: n for n in names},
    }
    repeats = 2 if text == "row" else 1
    for split, members in (("train", ["a.jpg", "b.jpg", "d.jpg"]), ("test", ["c.jpg"])):
        rows = [name for name in members for _ in range(repeats)]
        captions = [f"{name} {i % 2}" if text == "row" else [f"{name} 0", f"{name} 1"] for i, name in enumerate(rows)]
        table = pa.table({"image": [made[kind][name] for name in rows], "caption": captions})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    splits = open_captions(tmp_path)
    if kind == "bytes":
        assert splits.train.keys[0].startswith("train-00000-of-00001/") and len(set(splits.train.keys)) == 2
    else:
        assert splits.train.keys == ["a.jpg", "b.jpg"]
    assert list(everything(splits.train).values()) == [["a.jpg 0", "a.jpg 1"], ["b.jpg 0", "b.jpg 1"]]
    assert splits.val is None and list(everything(splits.test).values()) == [["c.jpg 0", "c.jpg 1"]]
    assert "missing images" in caplog.text
    pq.write_table(pa.table({"image": [b"x"], "words": ["y"]}), tmp_path / "wrong.parquet")
    with pytest.raises(UserError, match="the columns are image, words, and none is called caption"):
        open_captions(tmp_path / "wrong.parquet")


@pytest.mark.parametrize("value", [391895, 0.5, -1, [0.5], {"id": 1}])
def test_a_column_of_parquet_that_holds_no_images(value: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image_id": [value], "caption": ["a dog"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet: the column image_id holds .*, neither images nor paths"):
        open_captions(tmp_path / "t.parquet")


def test_a_folder_names_the_split_where_nothing_else_does(tmp_path: Path) -> None:
    for folder, name in (("train", "a.jpg"), ("val", "b.jpg"), ("photos", "c.jpg")):
        image_files(tmp_path / folder, name)
    file = tmp_path / "captions.txt"
    file.write_text("image,caption\na.jpg,one\nval/b.jpg,two\nc.jpg,three\n")
    splits = open_captions(file)
    assert everything(splits.train) == {"train/a.jpg": ["one"], "photos/c.jpg": ["three"]}
    assert everything(splits.val) == {"val/b.jpg": ["two"]}
    file.write_text("image,caption,split\na.jpg,one,val\nb.jpg,two,train\n")
    splits = open_captions(file)
    assert everything(splits.val) == {"train/a.jpg": ["one"]}


@pytest.mark.parametrize("layout", ["a copy of each", "another split"])
def test_a_missing_image_moves_no_other(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the image stands in a second folder too, and that is searched last or not at all."""
    names = [f"{i}.jpg" for i in range(5)]
    first, second = ("images", "thumbs") if layout == "a copy of each" else ("train", "val")
    image_files(tmp_path / second, *names)
    image_files(tmp_path / first, *names[:1], *names[2:])
    file = tmp_path / ("captions.csv" if layout == "a copy of each" else "captions_train.json")
    table = "image,caption\n" + "".join(f"{name},a dog\n" for name in names)
    file.write_text(table if file.suffix == ".csv" else coco(*["a dog"] * 5))
    splits = open_captions(file)
    sets = [split for split in (splits.train, splits.val, splits.test) if split is not None]
    paths = [checked(Path, item) for split in sets for item in split.items]
    found = sorted(str(path.relative_to(tmp_path)) for path in paths)
    there = [f"{first}/{name}" for name in names if name != "1.jpg"]
    assert found == (sorted([*there, "thumbs/1.jpg"]) if second == "thumbs" else there)
    assert ("1.jpg" in caplog.text) == (second == "val")


def test_text_beside_each_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_files(tmp_path / "deep", "caption1.jpg")
    image_files(tmp_path, "b.jpg", "c.jpg", "d.jpg")
    (tmp_path / "deep" / "caption1.txt").write_text("first\n\n second \n")
    (tmp_path / "b.txt").write_text(HEBREW, encoding="utf-8-sig")
    (tmp_path / "c.txt").write_text("\n")
    assert everything(whole(tmp_path)) == {"b.jpg": [HEBREW], "deep/caption1.jpg": ["first", "second"]}
    warned = [record.getMessage() for record in caplog.records]
    assert [line for line in warned if "c.jpg has no caption" in line] and [
        line for line in warned if "d.jpg has no caption" in line
    ]
    assert "left out images without a caption: 2" in warned[-1]


def test_every_flaw_is_named_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_files(tmp_path / "images", "good.jpg", "empty.jpg", "long.jpg", "alone.jpg", "short.jpg")
    long = "word " * 10_000
    rows = ["image,caption", "good.jpg,A dog .", "gone.jpg,One", "gone.jpg,Two", "empty.jpg,", f"long.jpg,{long}"]
    rows += ["long.jpg,A cat .", "no comma here", 'good.jpg,""', "short.jpg"]
    (tmp_path / "captions.txt").write_text("\n".join(rows))
    assert everything(whole(tmp_path)) == {"images/good.jpg": ["A dog ."], "images/long.jpg": ["A cat ."]}
    lines = [record.getMessage() for record in caplog.records]
    for place, words in [
        ("line 3", "'gone.jpg' is not found"),
        ("line 5", "the caption is empty"),
        ("line 6", "the caption has 10,000 words"),
        ("line 8", "no caption after the image's name"),
        ("line 9", "the caption is empty"),
        ("line 10", "no caption after the image's name"),
        ("", "alone.jpg: "),
    ]:
        assert len([line for line in lines if place in line and words in line]) == 1, words
    assert len(lines) == 7 + 1
    for count in (
        "missing images: 1",
        "empty captions: 2",
        "captions of more than 1,000 words: 1",
        "images without a caption: 1",
        "lines with too few columns: 2",
    ):
        assert count in lines[-1]
    assert all("\n" not in line for line in lines)


def test_a_comma_too_many_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A caption is not cut at a comma that nobody quoted; empty columns at the end say nothing."""
    image_files(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows = ["image,caption,split", "a.jpg,A dog, black,train", 'b.jpg,"A dog, black",train', "c.jpg,A cat,train,,"]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    assert everything(open_captions(tmp_path).train) == {"b.jpg": ["A dog, black"], "c.jpg": ["A cat"]}
    lines = [record.getMessage() for record in caplog.records]
    assert "line 2: 4 columns, not 3: put a caption that contains ',' in quotes" in lines[0]
    assert "lines with too many columns: 1" in lines[-1] and len(lines) == 2


def test_each_of_many_is_named_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_files(tmp_path / "images", "good.jpg")
    (tmp_path / "captions.txt").write_text("good.jpg,A dog\n" + "".join(f"{i}.jpg,gone\n" for i in range(50)))
    assert len(whole(tmp_path)) == 1
    named = [record.getMessage() for record in caplog.records if "is not found" in record.getMessage()]
    assert len(named) == len(set(named)) == 50
    assert "missing images: 50" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("name", ["info.json", "stats.csv"])
def test_a_table_of_something_else_does_not_hide_pairs(name: str, tmp_path: Path) -> None:
    image_files(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.txt").write_text("A dog\n")
    (tmp_path / "b.txt").write_text("A cat\n")
    (tmp_path / name).write_text('{"made": "today"}')
    assert sorted(Texts.of(whole(tmp_path)).captions) == [["A cat"], ["A dog"]]


@pytest.mark.parametrize("name", ["caption1.JPG", "IMG_1.JPG"])
def test_pairs_with_capital_endings(name: str, tmp_path: Path) -> None:
    image_files(tmp_path, name)
    (tmp_path / name).with_suffix(".txt").write_text("A dog\n")
    (tmp_path / "info.json").write_text('{"made": "today"}')
    assert everything(whole(tmp_path)) == {name: ["A dog"]}


def test_an_image_that_no_json_names_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_files(tmp_path / "images", "a.jpg", "alone.jpg")
    entry = {"filename": "a.jpg", "sentences": [{"raw": "A dog"}]}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [entry]}))
    assert len(whole(tmp_path)) == 1
    assert [r.getMessage() for r in caplog.records if "alone.jpg" in r.getMessage()]


def test_encodings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_files(tmp_path / "images", "a.jpg")
    file = tmp_path / "captions.txt"
    text = "image,caption\na.jpg,Un café"
    for data in (f"\ufeff{text}".encode(), text.encode("utf-16"), text.encode("utf-32")):
        file.write_bytes(data)
        assert Texts.of(whole(tmp_path)).captions == [["Un café"]] and not caplog.records
    mixed = ["image,caption".encode("utf-8-sig"), "a.jpg,Un café".encode(), "a.jpg,Une fenêtre\u2019s".encode("cp1252")]
    file.write_bytes(b"\n".join([*mixed, "a.jpg,Ça".encode("latin-1"), f"a.jpg,{HEBREW}".encode()]))
    assert Texts.of(whole(tmp_path)).captions == [["Un café", "Une fenêtre\u2019s", "Ça", HEBREW]]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "line 3 and 1 others: not UTF-8, read as Latin-1" in said


def test_half_a_surrogate_is_no_reason_to_stop(tmp_path: Path) -> None:
    image_files(tmp_path, "0.jpg")
    (tmp_path / "captions.json").write_text(coco("a \ud83d dog"))
    assert Texts.of(whole(tmp_path)).captions == [["a ? dog"]]


def test_without_splits_the_images_are_split(tmp_path: Path) -> None:
    image_files(tmp_path / "images", *(f"{i}.jpg" for i in range(60)))
    file = tmp_path / "captions.txt"
    file.write_text("".join(f"{i}.jpg,caption {i} {j}\n" for i in range(60) for j in range(2)))
    splits = open_captions(tmp_path, 0.2)
    assert splits.val is not None and splits.test is None and len(splits.train) + len(splits.val) == 60
    assert 3 <= len(splits.val) <= 22 and not {*splits.train.keys} & {*splits.val.keys}
    before = everything(splits.val)
    (tmp_path / "images" / "new.jpg").write_bytes(encoded(smooth(20, 24, seed=99999), "JPEG"))
    file.write_text("new.jpg,new\n" + file.read_text())
    after = open_captions(tmp_path, 0.2)
    assert after.val is not None and before.items() <= everything(after.val).items()
    one, two = split_val(whole(tmp_path), 0.2)
    assert one.keys == after.train.keys and Texts.of(two).captions == Texts.of(after.val).captions
    assert Texts.of(two.subset([1])).captions == [Texts.of(two).captions[1]]


def test_an_image_of_a_named_split_is_in_no_other(tmp_path: Path) -> None:
    image_files(tmp_path / "images", *(f"{i}.jpg" for i in range(6)))
    for name, those in (("captions", range(6)), ("captions_val", (1, 2)), ("captions_test", (3,))):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}.jpg,A dog {i}\n" for i in those))
    splits = open_captions(tmp_path)
    assert splits.val is not None and splits.test is not None
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [3, 2, 1]
    assert not {*splits.train.keys} & {*splits.val.keys, *splits.test.keys}
    (tmp_path / "captions_test.txt").write_text("2.jpg,A dog\n")
    with pytest.raises(UserError, match=r"2\.jpg is in test and in val, one of 1"):
        open_captions(tmp_path)


def test_an_image_that_several_files_or_records_name_is_one(tmp_path: Path) -> None:
    """Its references would else be torn apart, and each score be of fewer of them."""
    image_files(tmp_path / "images", "a.jpg", "b.jpg")
    (tmp_path / "captions_en.csv").write_text("image,caption\na.jpg,one\nb.jpg,two\na.jpg,one\n")
    (tmp_path / "captions_more.csv").write_text("image,caption\na.jpg,one\na.jpg,three\n")
    assert everything(whole(tmp_path)) == {"images/a.jpg": ["one", "one", "three"], "images/b.jpg": ["two"]}
    records = [{"filename": "a.jpg", "sentences": [{"raw": text}]} for text in ("one", "two")]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": records}))
    assert everything(whole(tmp_path / "dataset.json")) == {"images/a.jpg": ["one", "two"]}


def test_parquet_keeps_an_image_of_two_splits_where_it_is_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder = image_files(tmp_path / "data", "a.jpg", "b.jpg")
    a, b = ((folder / name).read_bytes() for name in ("a.jpg", "b.jpg"))
    table = pa.table({"image": [a, a, b], "caption": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "test.parquet")
    splits = open_captions(tmp_path)
    assert (
        Texts.of(splits.train).captions == [["three"]]
        and splits.test is not None
        and Texts.of(splits.test).captions == [["one"]]
    )
    assert "row 0: its image is also in test" in caplog.text and "images of two splits: 1" in caplog.text
    told = pa.table({"image": [a, a, b], "caption": ["one", "two", "three"], "split": ["train", "val", "train"]})
    pq.write_table(told, tmp_path / "told.parquet")
    splits = open_captions(tmp_path / "told.parquet")
    assert (
        Texts.of(splits.train).captions == [["three"]]
        and splits.val is not None
        and Texts.of(splits.val).captions == [["two"]]
    )


def test_shuffled_gives_each_image_anothers_captions(tmp_path: Path) -> None:
    split = ImageSet("x", list("abcdefg"), torch.zeros(7, 3, 4, 4, dtype=torch.uint8), Texts([[c] for c in "ABCDEFG"]))
    for seed in range(5):
        other = split.shuffled(seed)
        assert sorted(Texts.of(other).captions) == sorted(Texts.of(split).captions) and other.keys == split.keys
        assert not any(a == b for a, b in zip(Texts.of(split).captions, Texts.of(other).captions, strict=True))
        assert Texts.of(other).captions == Texts.of(split.shuffled(seed)).captions
    with pytest.raises(UserError, match="one image"):
        split.subset([0]).shuffled()


def test_the_loader_reads_it(tmp_path: Path) -> None:
    image_files(tmp_path / "images", *(f"{i}.jpg" for i in range(5)))
    (tmp_path / "captions.txt").write_text("".join(f"{i}.jpg,caption {i}\n" for i in range(5)))
    split = whole(tmp_path)
    loader = Loader(split, Preprocess(size=(8, 8)), batch_size=2, seed=0, train=False)
    batches = list(loader.evaluation())
    assert [texts for batch in batches for texts in batch["captions"]] == [[f"caption {i}"] for i in range(5)]
    assert batches[0]["image"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("photo_id,words\n1,a dog\n", "line 1: the columns are photo_id, words, and none is called image, file_name"),
        ("image,words\n1,a dog\n", "line 1: the columns are image, words, and none is called caption, text"),
        ("just a line\n", "line 1: one column only"),
        ("", "is empty"),
        ("a.jpg,A dog\nb.jpg,A cat\n", "line 1: 'a.jpg' is not found, nor any other of 2 images"),
        ('x,image,caption\n1,a.jpg,"open\n' + "2,b.jpg,text\n" * 30, "line 2: a quote is not closed"),
        ("image,caption,split\na.jpg,x,train\na.jpg,y,test\n", "line 3: a.jpg is in test here and in train before"),
        ('image,caption,split\na.jpg,"open,train\nb.jpg,x,train\n', "line 2: a quote is not closed"),
        ('id,image,caption\n1,a.jpg,"open\n2,b.jpg,a "dog"\n', "line 2: a quote is not closed"),
        (
            '{"images": [{"filename": "a.jpg", "sentences": [{"raw": 5}]}]}',
            r"images\[0\]: the caption is not text but 5",
        ),
        ('{"images": [}', "line 1: not JSON"),
        ('{"licenses": [], "info": 1}', "holds licenses, info"),
        ('{"images": [{"filename": "a.jpg"}]}', r"images\[0\]: no `sentences` among filename"),
        ('{"images": [{"filename": "a.jpg", "sentences": 5}]}', r"images\[0\]: its captions are not a list: 5"),
        ('{"images": [{"filename": "a.jpg", "sentences": {"raw": "x"}}]}', r"images\[0\]: its captions are not a list"),
        (
            '{"images": [{"file_name": "a.jpg", "id": {}}], "annotations": []}',
            r"images\[0\]: `id` is not a number: \{\}",
        ),
        (
            '{"images": [{"file_name": "a.jpg", "id": 1}], "annotations": [{"caption": "x", "image_id": [2]}]}',
            r"annotations\[0\]: `image_id` is not a number: \[2\]",
        ),
        ('[{"image": "a.jpg"}]', "holds a list"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ('{"images": ' + "1" * 5_000 + "}", "not JSON: Exceeds the limit"),
        ("photo.psd," + "word " * 30_000, "line 1: the columns are photo.psd, word word"),
        ("\0\1\2 not text", "is not text"),
    ],
)
def test_one_flaw_that_is_enough_to_stop(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "captions.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_captions(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_wrong_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no captions at"):
        open_captions(tmp_path / "missing")
    image_files(tmp_path / "mine", "a.jpg")
    with pytest.raises(UserError, match=r"it needs captions\.txt"):
        open_captions(tmp_path / "mine")
    (tmp_path / "mine" / "a.txt").write_text("A dog")
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    assert Texts.of(open_captions("mine").train).captions == [["A dog"]]
    (tmp_path / "mine" / "a.txt").write_text("")
    with pytest.raises(UserError, match="no image with a caption"):
        open_captions("mine")


def test_the_real_flickr8k() -> None:
    root = Path(os.environ.get("VITRAIL_DATA", "")) / "flickr8k"
    if "VITRAIL_DATA" not in os.environ or not root.is_dir():
        pytest.skip("VITRAIL_DATA names no folder that holds flickr8k")
    splits = open_captions(root)
    assert splits.val is not None and (len(splits.train), len(splits.val)) == (6000, 1000)
    assert {len(texts) for split in (splits.train, splits.val) for texts in Texts.of(split).captions} == {5}
    assert splits.train.image(0).shape == (3, 160, 160)
