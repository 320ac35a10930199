"""Which folders are splits and which are classes; other kinds of data are refused, with what they look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from images import folder_of

from vitrail.data.captions import open_captions
from vitrail.data.sets import Splits, open_data
from vitrail.errors import UserError

COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "0.jpg"}],
    "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}],
}
CAPTIONS = {**COCO, "annotations": [{"image_id": 1, "id": 1, "caption": "a dog"}]}
VOC = "<annotation>\n<object><name>dog</name></object></annotation>"


def made(root: Path, folders: str, images: int = 2, **files: Any) -> Path:
    """Folders with some images each, and files with text or JSON, whose names have `__` for slashes."""
    folder_of(root, dict.fromkeys(folders.split(), images))
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if isinstance(text, str) else json.dumps(text))
    return root


def sizes(splits: Splits) -> dict[str, int]:
    there = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: len(split) for name, split in there.items() if split is not None and len(split)}


@pytest.mark.parametrize(
    "folders, expected",
    [
        ("training_set/cat training_set/dog test_set/cat test_set/dog", {"train": 4, "test": 4}),
        ("train_images/cat train_images/dog val_images/cat", {"train": 4, "val": 2}),
        ("imagenet-train/cat imagenet-train/dog imagenet-val/dog", {"train": 4, "val": 2}),
        ("imagenet-train/cat imagenet-train/dog", {"train": 4}),
        ("Train/cat Train/dog Dev/dog TEST/cat", {"train": 4, "val": 2, "test": 2}),
        ("train2017/cat train2017/dog val2017/cat", {"train": 4, "val": 2}),
        ("seg_train/seg_train/cat seg_train/seg_train/dog seg_test/seg_test/dog", {"train": 4, "test": 2}),
        ("training_set/training/cat training_set/training/dog", {"train": 4}),
        ("train/cat train/dog val/cat testing/testing/dog", {"train": 4, "val": 2, "test": 2}),
    ],
)
def test_splits_by_other_names(folders: str, expected: dict[str, int], tmp_path: Path, caplog: Any) -> None:
    splits = open_data(made(tmp_path, folders, README_DOT_md="x", train_DOT_csv="id,label"))
    assert sizes(splits) == expected and splits.train.classes == ["cat", "dog"] and not caplog.records


def test_the_whole_set_may_be_wrapped_once(tmp_path: Path) -> None:
    splits = open_data(made(tmp_path / "pets", "pets/train/cat pets/train/dog pets/val/cat"))
    assert sizes(splits) == {"train": 4, "val": 2} and splits.train.keys[0] == "pets/train/cat/0.jpg"


@pytest.mark.parametrize(
    "loose", ["seg_pred/seg_pred", "seg_pred", "test", "test/test", "test/images", "val/unknown", "extra/cat"]
)
def test_images_of_no_split_are_left_out_with_a_line(
    loose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = "train/cat train/dog" if loose == "extra/cat" else "seg_train/cat seg_train/dog"
    splits = open_data(made(tmp_path, f"{base} {loose}"))
    assert splits.train.classes == ["cat", "dog"] and sizes(splits) == {"train": 4}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path / loose.split('/')[0]}") and "is left out, with 2 images" in line


def test_images_beside_the_class_folders_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, "train/cat train/dog")
    for name in ("cover.jpg", "sheet.jpg"):
        (tmp_path / "train" / name).write_bytes((tmp_path / "train" / "cat" / "0.jpg").read_bytes())
    assert len(open_data(tmp_path).train) == 4
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (f"2 images lie beside the class folders in {tmp_path}, as {tmp_path}/train/cover.jpg: left out")


@pytest.mark.parametrize(
    "folders, classes",
    [
        ("test other", ["other", "test"]),
        ("train test boat", ["boat", "test", "train"]),
        ("bullet_train/front bullet_train/side car", ["bullet_train", "car"]),
        ("x_ray target", ["target", "x_ray"]),
        ("X gt lt y", ["X", "gt", "lt", "y"]),
        ("with_mask without_mask", ["with_mask", "without_mask"]),
        ("cat/images dog/images", ["cat", "dog"]),
        ("apple/good apple/rust corn/good corn/blight", ["apple", "corn"]),
        ("photos paintings", ["paintings", "photos"]),
    ],
)
def test_classes_that_could_be_taken_for_something_else(folders: str, classes: list[str], tmp_path: Path) -> None:
    assert open_data(made(tmp_path, folders)).train.classes == classes


@pytest.mark.parametrize(
    "folders, message",
    [
        (
            "lernen/cat lernen/dog pruefen/cat pruefen/dog",
            r"lernen, pruefen all hold the same folders \(cat, dog\): if they",
        ),
        (
            "art/x art/y real/x real/y sketch/x",
            "art, real, sketch all hold the same folders.*rename them to train, val or test",
        ),
        ("fold1/fold1/x fold1/fold1/y fold2/fold2/x fold2/fold2/y", "fold1, fold2 all hold"),
        (
            "cat/train cat/val dog/train dog/val",
            r"cat, dog all hold .* \(train, val\): put the splits outside, as in train/cat",
        ),
        ("train/art/x train/art/y train/real/x train/real/y", "train: art, real all hold the same folders"),
        ("train/cat train/dog training_set/cat", "/train and .*/training_set both look like the train split"),
        ("train/a train/b dev/a eval/a", "/dev and .*/eval both look like the val split"),
        ("train val test", "test, train, val hold images but no folder per class"),
        ("train_images", "train_images hold images but no folder per class"),
        ("train/cat val/cat val/dog", "the val split of .* has a class that the training split lacks: dog"),
        ("train/cat test/cat", r"holds one class \(cat\): a classifier needs at least two"),
        (
            "archive/train/cat archive/train/dog",
            r"holds one class \(archive\).*if the folders in it are .*, give .*/archive$",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(folders: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_data(made(tmp_path, folders))
    assert "\n" not in str(caught.value)


def test_a_table_of_labels_is_pointed_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(train.csv may hold the labels: give it with --data, with the columns"):
        open_data(made(tmp_path, "train_images test_images", train_DOT_csv="id,label"))


@pytest.mark.parametrize(
    "folders, files, kind",
    [
        ("train val", {"train_DOT_json": COCO}, "boxes.* (train.json)"),
        ("batch1 batch2", {"annotations_DOT_json": COCO}, "boxes.* (annotations.json)"),
        (
            "train2017 val2017",
            {"annotations__instances_train2017_DOT_json": COCO},
            "boxes.* (instances_train2017.json)",
        ),
        ("train valid", {"train___annotations_DOT_coco_DOT_json": COCO}, "boxes.* (_annotations.coco.json)"),
        (
            "train2017 val2017",
            {"annotations__captions_val2017_DOT_json": CAPTIONS},
            "captioned images .*caption-vit --data",
        ),
        ("Images", {"captions_DOT_txt": "image,caption\n0.jpg,a dog\n"}, "captioned images (captions.txt)"),
        ("train/images val/images", {"train__captions_DOT_txt": "0.jpg,a dog\n"}, "captioned images (captions.txt)"),
        ("photos", {"photos__0_DOT_txt": "a dog on a beach"}, "captioned images (0.txt beside its image)"),
        ("images masks", {}, "masks (images/ beside masks/)"),
        ("train/images train/masks val/images val/masks", {}, "masks (images/ beside masks/)"),
        ("train train_masks test", {}, "masks (train/ beside train_masks/)"),
        ("train trainannot test testannot", {}, "masks (test/ beside testannot/)"),
        ("train/img train/img_gt test/img test/img_gt", {}, "masks (img/ beside img_gt/)"),
        ("images semantic_labels", {}, "masks (images/ beside semantic_labels/)"),
        ("original_images label_images_semantic", {}, "masks (original_images/ beside label_images_semantic/)"),
        ("imagesTr labelsTr", {}, "masks (imagesTr/ beside labelsTr/)"),
        ("x y_mask", {}, "masks (x/ beside y_mask/)"),
        ("rgb depth", {}, "masks (rgb/ beside depth/)"),
        ("benign/images benign/masks other/images other/masks", {}, "masks (images/ beside masks/)"),
        ("leftImg8bit/train/aachen gtFine/train/aachen", {}, "masks (leftImg8bit/ beside gtFine/)"),
        ("images/train images/val", {"labels__train__0_DOT_txt": "0 .5 .5 .1 .1"}, "boxes.* (images/ beside labels/)"),
        ("train/images valid/images", {"data_DOT_yaml": "train: x\nnc: 1\nnames: [a]"}, "boxes.* (data.yaml)"),
        ("obj_train_data", {"obj_train_data__0_DOT_txt": "0 0.5 0.5 0.1 0.1\n"}, "boxes.* (0.txt beside its image)"),
        ("train valid", {"train__0_DOT_xml": VOC}, "boxes.* (0.xml beside its image)"),
        (
            "VOC/VOC2007/JPEGImages",
            {"VOC__VOC2007__Annotations__0_DOT_xml": VOC},
            "boxes.* (JPEGImages/ beside Annotations/)",
        ),
    ],
)
def test_other_kinds_of_data(folders: str, files: dict[str, Any], kind: str, tmp_path: Path) -> None:
    root = made(tmp_path / "set", folders, **files)
    pattern = kind.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=f"{root} looks like .*{pattern}") as caught:
        open_data(root)
    if "captioned" not in kind:
        remedy = "vitrail has no recipe for detection" if "boxes" in kind else f"`vitrail train segment --data {root}`"
        assert remedy in str(caught.value)
    else:
        assert len(open_captions(root, val_fraction=0).train) or open_captions(root).val is not None


def test_json_of_half_a_gigabyte_is_known_by_its_ends(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(5_000)]
    boxes = [{"image_id": i, "segmentation": [[1.5] * 8], "bbox": [1, 2, 3, 4]} for i in range(5_000)]
    file = {"info": {}, "licenses": [], "images": images, "annotations": boxes, "categories": [{"id": 1}]}
    with pytest.raises(UserError, match="images with masks"):
        open_data(made(tmp_path / "masks", "a b", instances_DOT_json=file))
    for box in boxes:
        box["segmentation"] = []
    with pytest.raises(UserError, match="boxes around objects"):
        open_data(made(tmp_path / "boxes", "a b", instances_DOT_json=file))


def test_files_beside_class_folders_that_mean_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, Any] = {
        "info_DOT_json": {"images": 4},
        "index_DOT_json": [1],
        "cat__0_DOT_txt": "a cat",
        "setup_DOT_yaml": "train: 1",
    }
    assert len(open_data(made(tmp_path, "cat dog", **files)).train) == 4 and not caplog.records


@pytest.mark.parametrize(
    "name", ["{}_mask.png", "{}_mask_1.png", "{}_seg.png", "{}-GT.png", "{}_label.png", "mask_{}.png", "{}.mask.png"]
)
def test_masks_beside_the_images_of_a_class(name: str, tmp_path: Path) -> None:
    root = made(tmp_path, "benign malignant", images=0)
    for label in ("benign", "malignant"):
        for i in range(3):
            (root / label / f"{label} ({i}).png").write_bytes(b"x")
            if i:
                (root / label / name.format(f"{label} ({i})")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"looks like images with masks \(.* beside benign \([12]\).png\)"):
        open_data(root)


def test_class_folders_with_the_same_names_get_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = made(tmp_path, "blurred sharp")
    assert len(open_data(root).train) == 4 and not caplog.records, "plain numbers say nothing"
    for file in [*root.rglob("*.jpg")]:
        file.rename(file.with_name(f"street_{file.name}"))
    open_data(root)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "(blurred, sharp) all hold files of the same names, as street_0: if they are inputs and targets" in line
    (root / "sharp" / "street_0.jpg").unlink()
    caplog.clear()
    assert open_data(root) and not caplog.records


@pytest.mark.parametrize(
    "folders, inner",
    [
        ("train/cat train/dog train/train/cat train/train/dog valid/cat test/cat", "train/train"),
        ("train/cat train/dog train/val/cat train/val/dog test/cat", "train/val"),
        ("cat dog cells/cat cells/dog", "cells"),
    ],
)
def test_a_split_or_a_copy_among_the_classes_is_refused(folders: str, inner: str, tmp_path: Path) -> None:
    made(tmp_path, folders)
    line = f"{tmp_path}/{inner} is among class folders .*: move its content up, or remove it"
    with pytest.raises(UserError, match=line):
        open_data(tmp_path)
