"""Tables of labels: which rows count, and what they are taken for."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import encoded, smooth

from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, Splits, open_data
from vitrail.data.tally import Tally
from vitrail.errors import UserError

NAMES = [f"{i}.png" for i in range(8)]


def images(folder: Path, names: list[str] = NAMES) -> Path:
    """Different images of these names."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(smooth(12, 16, seed)))
    return folder


def table(folder: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    """A folder with images and a table."""
    images(folder)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def rows(*labels: str, header: str = "image,label") -> str:
    return "\n".join([header, *(f"{name},{label}" for name, label in zip(NAMES, labels, strict=False))]) + "\n"


def named(images: ImageSet) -> dict[str, str]:
    """The class of each image."""
    return {key: images.classes[label] for key, label in zip(images.keys, images.labels.tolist(), strict=True)}


GOOD = rows("cat", "dog", "cat", "dog")


@pytest.mark.parametrize("whole", [True, False], ids=["file", "folder"])
def test_a_table_gives_each_image_its_class(whole: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = table(tmp_path, GOOD)
    splits = open_data(file if whole else tmp_path)
    assert named(splits.train) == {"0.png": "cat", "1.png": "dog", "2.png": "cat", "3.png": "dog"}
    assert splits.train.classes == ["cat", "dog"] and splits.val is None
    assert splits.train.image(3).shape == (3, 12, 16)
    assert "4 images, 2 classes, from the column label" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        GOOD.replace(",", " , "),
        '"image","label"\n"0.png","cat"\n"1.png","dog"\n"2.png","cat"\n"3.png", "dog"',
        "\n\n" + GOOD + "\n,\n\n",
        "label,Image\ncat,0.png\ndog,1.png\ncat,2.png\ndog,3.png\n",
        "image,label\n.\\0.png,cat\n./1.png,dog\n2.PNG,cat\nC:\\photos\\3.png,dog\n",
        "image,label\n/home/someone/0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog\n",
        GOOD.encode("utf-16"),
        "id,label,image\n9,cat,0.png\n8,dog,1.png\n7,cat,2.png\n6,dog,3.png\n",
    ],
    ids=["BOM", "Windows", "semicolons", "tabs", "spaces", "quotes", "blank", "order", "paths", "root", "16", "more"],
)
def test_tables_as_people_write_them(text: str | bytes, tmp_path: Path) -> None:
    train = open_data(table(tmp_path, text)).train
    assert named(train) == {"0.png": "cat", "1.png": "dog", "2.png": "cat", "3.png": "dog"}
    assert not train.bad_rows


@pytest.mark.parametrize(
    "row, reason",
    [
        ("9.png,cat", "'9.png' is not found"),
        ("9,cat", r"'9' is not found \(a name needs its ending"),
        ("4.png,", "the label is empty"),
        ("4.png,nan", "the label is empty"),
        (",cat", "the name of the image is empty"),
        ("4.png", "1 cells for 2 columns"),
        ("4.png,cat,dog", "3 cells for 2 columns: put a cell"),
        ("0.png,dog", "0.png is 'cat' and 'dog', the first in .*line 2"),
    ],
)
def test_a_bad_row_is_left_out_and_says_why(row: str, reason: str, tmp_path: Path) -> None:
    train = open_data(table(tmp_path, GOOD + row + "\n")).train
    (line,) = train.bad_rows
    with pytest.raises(UserError, match=f"1 of .* are bad, more than 0.0%.*labels.csv, line 6: {reason}") as caught:
        Tally.of(train, 0.0)
    assert "\n" not in str(caught.value) and "line 6" in line
    assert len(train) == (3 if row.startswith("0") else 4)


def test_bad_rows_are_named_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = open_data(table(tmp_path, GOOD + "".join(f"{i}.png,cat\n" for i in range(11, 18)))).train
    with pytest.raises(UserError, match="7 of 11 images of labels.csv are bad, more than 1.0%") as caught:
        Tally.of(train, 0.01)
    told = str(caught.value)
    assert all(f"'{i}.png' is not found" in told for i in range(11, 16)) and "; and 2 more)" in told
    assert "16.png" not in told and "left out:" not in caplog.text
    assert Tally.of(train, 0.7).bad == 7 and caplog.text.count("left out:") == 7


def test_bad_rows_and_unreadable_images_share_their_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = table(tmp_path, GOOD + "9.png,cat\n")
    (tmp_path / "1.png").write_bytes(b"no image")
    train = open_data(file).train
    loader = Loader(
        train, Preprocess(size=(8, 8)), batch_size=2, seed=0, train=False, max_bad=0.4, tally=Tally.of(train, 0.4)
    )
    assert [i for batch in loader.evaluation() for i in batch["sample"].tolist()] == [0, 2, 3]
    assert caplog.text.count("left out:") == 2
    with pytest.raises(UserError, match="2 of 5 images of labels.csv are bad, more than 30.0%"):
        Loader(
            train, Preprocess(size=(8, 8)), batch_size=2, seed=0, train=False, max_bad=0.3, tally=Tally.of(train, 0.3)
        )


def test_repeated_rows_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(open_data(table(tmp_path, GOOD + "0.png,cat\n./0.PNG,cat\n")).train) == 4
    assert "2 rows repeat" in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "labels.csv is empty"),
        (",,\n,,\n", "labels.csv has rows of empty cells only"),
        ("image,label\n", "it has a header and no rows"),
        ("0.png,cat\n1.png,dog\n", "has no header: put a line such as image,label"),
        ("key,label\n0.png,cat\n", "line 1: the columns are key, label, and none is called image"),
        ("image,breed\n0.png,cat\n", r"no column label \(its columns: breed\): rename"),
        ("image,label,label\n0.png,cat,dog\n", "two columns have the same name"),
        ("image,label\n8.png,cat\n9.png,dog\n", "no row can be used .the first: .*line 2: '8.png' is not found"),
        ("image,label\n0.png,cat\n1.png,cat\n", "holds one class .cat."),
        (rows("cat", "cat|dog"), r"line 3: 'cat\|dog' names several classes: .*vitrail train tag"),
        (rows("1.5", "2", "3.25"), "numbers such as 1.5, not classes: .*vitrail train regress"),
        ('image,label\n0.png,"cat\n1.png,dog\n', "line 2: a quote is not closed"),
        (b"image,label\0\n", "is not text"),
        ("image,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,bird,val\n", "the training split lacks: bird"),
        ("image,label,split\n0.png,cat,train\n1.png,dog,train\n0.png,cat,val\n", "in val here and in train in"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_in_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_data(table(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_splits_come_from_a_column_or_the_names_of_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def counts(splits: Splits) -> list[int]:
        return [len(own) if own else 0 for own in (splits.train, splits.val, splits.test)]

    marks = ["train", "train", "validation", "", "Test", "holdout"]
    text = "\n".join(
        ["image,label,split", *(f"{n},{i % 2},{s}" for i, (n, s) in enumerate(zip(NAMES[:6], marks, strict=True)))]
    )
    splits = open_data(table(tmp_path / "column", text))
    assert counts(splits) == [3, 1, 1]
    assert "1 images without a named split are used for training" in caplog.text
    assert [each for each in splits.train.bad_rows if "'holdout' names no split" in each]

    folder = tmp_path / "files"
    for split, names in {"train": NAMES[:4], "val": NAMES[4:6]}.items():
        images(folder / "images" / split, names)
        (folder / f"{split}.csv").write_text("image,label\n" + "".join(f"{n},{int(n[0]) % 2}\n" for n in names))
    (folder / "test.csv").write_text("image\n7.png\n")  # of a competition, without labels
    splits = open_data(folder)
    assert counts(splits) == [4, 2, 0] and splits.train.keys[0] == "images/train/0.png"


def test_a_name_in_two_folders_is_not_guessed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images(tmp_path / split, ["0.png", f"{split}.png"])
    (tmp_path / "labels.csv").write_text("image,label\n0.png,cat\ntrain.png,cat\ntest.png,dog\ntest/0.png,dog\n")
    train = open_data(tmp_path / "labels.csv").train
    assert train.keys == ["train/train.png", "test/test.png", "test/0.png"]
    assert "'0.png' could be" in train.bad_rows[0]


def test_a_table_beside_class_folders_is_not_guessed(tmp_path: Path) -> None:
    images(tmp_path, ["cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png"])
    (tmp_path / "labels.csv").write_text("image,label\ncat/0.png,tabby\ncat/1.png,siamese\n")
    with pytest.raises(UserError, match="class folders and labels.csv"):
        open_data(tmp_path)
    assert open_data(tmp_path / "labels.csv").train.classes == ["siamese", "tabby"]
    (tmp_path / "labels.csv").write_text("name,size\ncat/0.png,12\n")  # of something else
    assert open_data(tmp_path).train.classes == ["cat", "dog"]
    (tmp_path / "labels.csv").write_bytes(b"\0\1")  # nor is this one read
    (tmp_path / "train.csv").write_text("")
    assert open_data(tmp_path).train.classes == ["cat", "dog"]
    (tmp_path / "train.csv").write_text("image,label\n")
    (tmp_path / "labels.tsv").write_text("image\tlabel\n")
    with pytest.raises(UserError, match="labels.tsv and train.csv: keep one"):
        open_data(tmp_path)


def test_numbers_as_names_of_classes_keep_their_order(tmp_path: Path) -> None:
    assert open_data(table(tmp_path, rows("10", "2", "1", "2"))).train.classes == ["1", "2", "10"]
