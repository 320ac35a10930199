"""Sets of images with masks: every layout gives the right pairs, classes and void, and bad files are named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, folder_of
from mask_data import SIZE, flat, made, numbers, numbers_of, put, several
from PIL import Image

from vitrail.data import rle
from vitrail.data.decode import BadImage
from vitrail.data.masks import Masks
from vitrail.data.sets import ImageSet, open_data
from vitrail.errors import UserError

COLOURS = [(0, 0, 0), (200, 0, 0), (0, 200, 0), (9, 9, 250)]
NAMES = ["sky", "road", "tree", "void"]
LIST = "".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(NAMES, COLOURS, strict=True))


def check(images: ImageSet) -> None:
    """Each image has the mask of the same number."""
    for i, key in enumerate(images.keys):
        assert images.target.read(i).indices.tolist() == numbers_of(key).tolist(), key


@pytest.mark.parametrize(
    "images, masks, split",
    [
        ("train/images/{}.jpg", "train/masks/{}.png", "train"),
        ("images/train/{}.jpg", "masks/train/{}.png", "train"),
        ("images/training/{}.jpg", "annotations/training/{}.png", "train"),
        ("train/{}.jpg", "train_masks/{}_mask.png", "train"),
        ("train/{}.jpg", "trainannot/{}.png", "train"),
        ("x/JPEGImages/{}.jpg", "x/SegmentationClass/{}.png", ""),
        ("img/{}.jpg", "labels/{}.png", ""),
        ("images/{}.jpg", "masks/{}.png", ""),
        ("images/a/{}.jpg", "masks/a/{}.png", ""),
        ("images/a/{}.jpg", "masks/{}_gt.png", ""),
        ("{}.jpg", "{}_mask.png", ""),
        ("train/{}.jpg", "train/{}_mask.png", "train"),
        ("images/train/{}.jpg", "masks/{}.png", "train"),
        ("images/{}.jpg", "masks/train/{}.png", "train"),
        ("leftImg8bit/train/ulm/ulm_{}_leftImg8bit.jpg", "gtFine/train/ulm/ulm_{}_gtFine_labelIds.png", "train"),
        ("imagesTr/{}.jpg", "labelsTr/{}.png", ""),
        ("x/{}.jpg", "y_mask/{}.png", ""),
        ("original_images/{}.jpg", "label_images_semantic/{}.png", ""),
        ("benign/benign ({}).jpg", "benign/benign ({})_mask.png", ""),
        ("all/train/img/{}.jpg", "all/train/img_gt/{}.png", "train"),
        ("rgb/{}_sat.jpg", "gt/{}_mask.png", ""),
    ],
)
def test_layouts(images: str, masks: str, split: str, tmp_path: Path) -> None:
    root = made(tmp_path, *several(images), *several(masks))
    opened = Masks.open(root, val_fraction=0)
    target = Masks.of(opened.train)
    assert len(opened.train) == 4 and opened.val is None
    assert (Masks.open(root, val_fraction=0.5).val is None) == (split == "train")
    assert target.classes == ["0", "1", "2"] and target.void == 255
    check(opened.train)


def test_splits_by_name_or_by_a_share(tmp_path: Path) -> None:
    files = [(("train", "val", "test")[i % 3], i) for i in range(9)]
    named = made(tmp_path / "named", *(f"{split}/images/{i}.jpg" for split, i in files))
    made(named, *(f"{split}/masks/{i}.png" for split, i in files))
    opened = Masks.open(named)
    assert opened.val is not None and opened.test is not None
    for split, first in ((opened.train, 0), (opened.val, 1), (opened.test, 2)):
        assert [int(Path(key).stem) for key in split.keys] == [first, first + 3, first + 6]
        check(split)
    whole = flat(tmp_path / "whole", 30)
    opened = Masks.open(whole, val_fraction=0.2)
    assert opened.val is not None and 1 <= len(opened.val) <= 12 and len(opened.train) + len(opened.val) == 30
    check(opened.train)
    check(opened.val)
    assert len(Masks.open(whole, val_fraction=0).train) == 30


def test_equal_names_in_folders_stay_apart(tmp_path: Path) -> None:
    root = made(tmp_path, "a/images/1.jpg", "b/images/1.jpg", "a/masks/1.png", "b/masks/1.png")
    put(root, numbers(7), "b/masks/1.png")
    opened = Masks.open(root, val_fraction=0).train
    assert opened.keys == ["a/images/1.jpg", "b/images/1.jpg"]
    assert opened.target.read(1).indices.tolist() == numbers(7).tolist()


def test_a_set_below_vitrail_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat(tmp_path / "some")
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    assert len(Masks.open("some", val_fraction=0).train) == 4
    with pytest.raises(UserError, match="^no images with masks at other: give a folder with images/ and masks/"):
        Masks.open("other")


def test_voc_lists_name_the_splits(tmp_path: Path) -> None:
    root = made(tmp_path, *several("JPEGImages/{}.jpg", 9), *several("SegmentationClass/{}.png", 5))
    made(root, *several("SegmentationObject/{}.png", 5))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n")
    (lists / "val.txt").write_text("3\n4\n")
    (lists / "trainval.txt").write_text("0\n1\n2\n3\n4\n")
    opened = Masks.open(root)
    assert opened.train.keys == [f"JPEGImages/{i}.jpg" for i in range(3)] and opened.val is not None
    assert Masks.of(opened.val).names == ["SegmentationClass/3.png", "SegmentationClass/4.png"]
    check(opened.train)


def test_cityscapes_masks_of_classes_are_chosen(tmp_path: Path) -> None:
    root = made(tmp_path, "leftImg8bit/train/a_1_leftImg8bit.jpg", "leftImg8bit/train/a_2_leftImg8bit.jpg")
    for i in (1, 2):
        for kind in ("color", "instanceIds", "labelIds", "labelTrainIds"):
            made(root, f"gtFine/train/a_{i}_gtFine_{kind}.png")
    target = Masks.of(Masks.open(root).train)
    assert [Path(name).stem for name in target.names] == [f"a_{i}_gtFine_labelTrainIds" for i in (1, 2)]
    made(root, "gtCoarse/train/a_1_gtCoarse_labelTrainIds.png")
    with pytest.raises(UserError, match="a_1_leftImg8bit.jpg has several masks, .*gtCoarse.* and .*gtFine.*: keep"):
        Masks.open(root)


def test_masks_without_images_and_splits_without_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = made(tmp_path, *several("train/images/{}.jpg"), *several("train/masks/{}.png", 5))
    made(root, *several("test/images/{}.jpg"), "extra/7.jpg")
    opened = Masks.open(root)
    assert len(opened.train) == 4 and opened.test is None
    assert [r.message for r in caplog.records if "masks/4.png is a mask without an image" in r.message]
    assert [r.message for r in caplog.records if "none of the 4 images of the split test" in r.message]
    assert [r.message for r in caplog.records if "1 images beside the folders of images" in r.message]
    caplog.clear()
    made(root, *several("train/masks/9{}.png", 9))
    Masks.open(root)
    assert [r.message for r in caplog.records if "10 masks, as" in r.message and "have no image" in r.message]


def test_a_class_list_names_the_classes(tmp_path: Path) -> None:
    root = flat(tmp_path)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    assert Masks.open(root).train.classes == ["sky", "road", "tree"]
    (root / "classes.txt").write_text("sky\nroad\n")
    train = Masks.open(root, val_fraction=0).train
    with pytest.raises(BadImage, match=r"^masks/0.png: a pixel has the number 2, but there are 2 classes, from 0"):
        train.target.read(0)
    (root / "masks" / "class_dict.csv").write_text("name,r,g,b\na,1,2,3\nb,4,5,6\n")
    with pytest.raises(UserError, match="classes.txt and .*class_dict.csv list different classes: remove one"):
        Masks.open(root)


def test_void_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = flat(tmp_path)
    put(root, np.where(numbers(1) == 2, 255, numbers(1)).astype(np.uint8))
    opened = Masks.open(root, val_fraction=0).train
    assert opened.classes == ["0", "1", "2"] and (opened.target.read(1).indices == 255).sum() == 64
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    with pytest.raises(UserError, match="--void 1 is the number of the class road in .*classes.txt: .* such as 255"):
        Masks.open(root, void=1)
    for names, void, wanted in (
        ("Unlabelled\nroad\ntree", 0, [255, 0, 1, 255]),
        ("sky\nvoid\ntree", 255, [0, 255, 1, 255]),
    ):
        (root / "classes.txt").write_text(names)
        caplog.clear()
        target = Masks.open(root, val_fraction=0, void=void).train.target
        assert len(target.classes) == 2 and "is void and not one of the 2 classes" in caplog.text
        coded = torch.tensor(wanted)[torch.from_numpy(numbers(0)).long()]
        assert target.read(0).indices.tolist() == coded.tolist()
    (root / "classes.txt").unlink()
    put(root, numbers(1))
    target = Masks.of(Masks.open(root, val_fraction=0, void=0).train)  # as ADE20K numbers its classes
    assert target.classes == ["1", "2"] and target.void == 255
    assert target.read(0).indices.tolist() == torch.tensor([255, 0, 1])[torch.from_numpy(numbers(0)).long()].tolist()


def test_masks_of_0_and_255_are_two_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = flat(tmp_path)
    for i in range(4):
        put(root, (numbers(i, 2) * 255), f"masks/{i}.png")
    target = Masks.open(root, val_fraction=0).train.target
    assert target.classes == ["background", "foreground"] and target.read(1).indices.tolist() == numbers(1, 2).tolist()
    assert "hold only 0 and 255, read from 4 masks: they are background and foreground" in caplog.text
    caplog.clear()
    for names, classes in (("polyp", ["background", "polyp"]), ("skin\npolyp", ["skin", "polyp"])):
        (root / "classes.txt").write_text(names)
        target = Masks.open(root, val_fraction=0).train.target
        assert target.classes == classes and target.read(1).indices.tolist() == numbers(1, 2).tolist()
    assert not caplog.records
    (root / "classes.txt").write_text("polyp")
    for i in range(4):
        put(root, numbers(i, 2), f"masks/{i}.png")
    target = Masks.open(root, val_fraction=0).train.target
    assert target.classes == ["background", "polyp"] and target.read(1).indices.tolist() == numbers(1, 2).tolist()


def test_0_and_255_beside_a_name_for_void(tmp_path: Path) -> None:
    """Two numbers are two of three names: which two, only the user knows."""
    root = flat(tmp_path)
    for i in range(4):
        put(root, (numbers(i, 2) * 255), f"masks/{i}.png")
    (root / "classes.txt").write_text("bg\nfg\nvoid\n")
    with pytest.raises(UserError, match="lists 3 names, one of them void, but the masks hold only 0 and 255"):
        Masks.open(root)
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"the masks have the class 0 only \(void is 255\)"):
        Masks.open(root, void=255)  # the flag says that 255 is void


def test_one_class_and_a_name_for_void_are_too_few(tmp_path: Path) -> None:
    root = flat(tmp_path)
    for i in range(4):
        put(root, numbers(i, 2), f"masks/{i}.png")
    for names in ("road\nunlabelled", "unlabelled\nroad"):
        (root / "classes.txt").write_text(names)
        with pytest.raises(UserError, match="the masks have the class road only"):
            Masks.open(root)


def test_a_palette_with_a_colour_for_void(tmp_path: Path) -> None:
    """The files of a set mean the same whether or not they have a void border."""
    root = flat(tmp_path)
    (root / "label_colors.txt").write_text(LIST)
    order = [2, 0, 3, 1]
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[:4], palette[255] = np.array(COLOURS, dtype=np.uint8)[order], (224, 224, 192)

    def paletted(values: np.ndarray) -> bytes:
        image = Image.fromarray(np.where(values < 4, np.argsort(order)[values.clip(max=3)], values).astype(np.uint8))
        image = image.convert("P")
        image.putpalette(palette.tobytes())
        return encoded(image)

    bordered = numbers(1, 4)
    bordered[0] = 255
    for i in range(4):
        put(root, paletted(bordered if i == 1 else numbers(i, 4)), f"masks/{i}.png")
    target = Masks.open(root, val_fraction=0).train.target
    plain, with_border = target.read(0).indices, target.read(1).indices
    meaning = torch.tensor([0, 1, 2, 255])
    assert plain.tolist() == meaning[torch.from_numpy(numbers(0, 4)).long()].tolist()
    assert with_border[1:].tolist() == meaning[torch.from_numpy(numbers(1, 4)).long()][1:].tolist()
    assert (with_border[0] == 255).all()
    bordered[0] = 9
    palette[9] = (9, 9, 200)
    put(root, paletted(bordered))
    with pytest.raises(BadImage, match="^masks/1.png: its palette has some colours of the class list"):
        target.read(1)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "palette", "other palette"])
def test_colour_masks(kind: str, tmp_path: Path) -> None:
    root = flat(tmp_path)
    coloured = np.array(COLOURS, dtype=np.uint8)[numbers(1, 4)]
    for i in range(4):
        image = Image.fromarray(np.array(COLOURS, dtype=np.uint8)[numbers(i, 4)])
        if kind == "other palette":
            order = [2, 0, 3, 1]
            image = Image.fromarray(np.argsort(order).astype(np.uint8)[numbers(i, 4)]).convert("P")
            image.putpalette(np.array(COLOURS, dtype=np.uint8)[order].tobytes())
        image = image.convert("P", palette=Image.Palette.ADAPTIVE) if kind == "palette" else image
        put(root, encoded(image.convert("RGBA") if kind == "RGBA" else image), f"masks/{i}.png")
    (root / "label_colors.txt").write_text(LIST)
    target = Masks.open(root, val_fraction=0).train.target
    assert target.classes == NAMES[:3]
    wanted = torch.tensor([0, 1, 2, 255])[torch.from_numpy(numbers(1, 4)).long()]
    assert target.read(1).indices.tolist() == wanted.tolist()
    coloured[2, 3] = (7, 8, 9)
    put(root, coloured)
    with pytest.raises(BadImage, match="^masks/1.png: the colour 7 8 9 .*list, at row 2, column 3: add it there"):
        target.read(1)
    put(root, encoded(Image.fromarray(coloured).convert("RGBA").resize((16, 12)).rotate(45)))
    with pytest.raises(BadImage, match="^masks/1.png: pixels of the mask are transparent"):
        target.read(1)


def test_colours_of_greys_are_grey_levels(tmp_path: Path) -> None:
    root = flat(tmp_path)
    for i in range(4):
        put(root, (numbers(i) * 100), f"masks/{i}.png")
    (root / "label_colors.txt").write_text("a 0 0 0\nb 100 100 100\nc 200 200 200\n")
    check(Masks.open(root, val_fraction=0).train)


def test_colours_without_a_class_list_are_refused(tmp_path: Path) -> None:
    root = flat(tmp_path)
    for i in range(4):
        put(root, np.array(COLOURS, dtype=np.uint8)[numbers(i)], f"masks/{i}.png")
    with pytest.raises(
        UserError, match="no mask can be read, .*masks/0.png: .*this is RGB: put a class list with"
    ) as e:
        Masks.open(root)
    assert "\n" not in str(e.value)


def test_grey_images_are_no_class_numbers(tmp_path: Path) -> None:
    root = flat(tmp_path)
    put(root, np.arange(192, dtype=np.uint16).reshape(SIZE) * 300)
    with pytest.raises(UserError, match=r"numbers up to 57,300, read from 4 masks, .* grey or depth images"):
        Masks.open(root)
    for i in range(4):
        put(root, np.zeros(SIZE, dtype=np.uint8), f"masks/{i}.png")
    with pytest.raises(UserError, match=r"the masks have the class 0 only \(void is 255\)"):
        Masks.open(root)


def test_sixteen_bits_may_hold_classes(tmp_path: Path) -> None:
    root = flat(tmp_path)
    for i in range(4):
        put(root, numbers(i).astype(np.uint16), f"masks/{i}.png")
    check(Masks.open(root, val_fraction=0).train)


def test_the_truth_for_a_report(tmp_path: Path) -> None:
    train = Masks.open(flat(tmp_path), val_fraction=0).train
    segments = train.target.truth(0)["segments"]
    assert [each["label"] for each in segments] == ["0", "1", "2"] and sum(each["area"] for each in segments) == 192
    for k, each in enumerate(segments):
        assert each["share"] == each["area"] / 192 and each["rle"]["size"] == [*SIZE]
        assert rle.decode(each["rle"]).numpy().tolist() == (numbers(0) == k).tolist()


def test_what_has_no_masks_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "classes", {"cat": 3, "dog": 3})
    with pytest.raises(
        UserError, match="holds 6 images but no masks of them: .*`vitrail train finetune --data"
    ) as error:
        Masks.open(folder)
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images: give a folder with images/ and masks/"):
        Masks.open(tmp_path / "empty")
    file = tmp_path / "x.txt"
    file.write_text("x")
    with pytest.raises(UserError, match="x.txt holds no masks"):
        Masks.open(file)


def test_classification_points_to_segmentation(tmp_path: Path) -> None:
    root = flat(tmp_path)
    with pytest.raises(UserError, match=f"train a segmenter on them with `vitrail train segment --data {root}`"):
        open_data(root)


def test_marks_change_with_the_masks(tmp_path: Path) -> None:
    root = flat(tmp_path)
    before = Masks.open(root, val_fraction=0).fingerprint()
    assert before == Masks.open(root, val_fraction=0).fingerprint()
    assert before != Masks.open(root, val_fraction=0, void=9).fingerprint()


def test_groups_hold_together(tmp_path: Path) -> None:
    files = [f"s{i % 6}/{i}" for i in range(24)]
    root = made(tmp_path, *(f"images/{file}.jpg" for file in files), *(f"masks/{file}.png" for file in files))
    opened = Masks.open(root, group="parent", val_fraction=0.3)
    assert opened.val is not None
    groups = [{Path(key).parent.name for key in split.keys} for split in (opened.train, opened.val)]
    assert groups[0].isdisjoint(groups[1]) and len(groups[0] | groups[1]) == 6


CAMVID = Path(os.environ.get("VITRAIL_DATA", "/nowhere")) / "camvid"


@pytest.mark.skipif(not CAMVID.is_dir(), reason="VITRAIL_DATA has no camvid")
def test_camvid() -> None:
    opened = Masks.open(CAMVID)
    assert opened.val is not None and (len(opened.train), len(opened.val)) == (367, 101)
    assert len(opened.train.classes) == 11 and opened.train.classes[3] == "road"
    seen = {int(i) for k in range(0, 101, 10) for i in opened.val.target.read(k).indices.unique()}
    assert seen == {*range(11), 255}
    for split in (opened.train, opened.val):
        names = Masks.of(split).names
        assert all(Path(key).stem == Path(name).stem for key, name in zip(split.keys, names, strict=True))
