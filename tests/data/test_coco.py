"""COCO's JSON becomes masks: polygons, run-length encoding and panoptic segments."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import encoded, smooth

from vitrail.data import rle
from vitrail.data.decode import BadImage
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.errors import UserError

HEIGHT, WIDTH = 12, 16
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def box(top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def annotation(number: int, image: int, category: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "bbox": [0, 0, 1, 1],
        **more,
    }


def encoding(mask: torch.Tensor, packed: bool = True) -> dict[str, Any]:
    code = rle.encode(mask)
    return code if packed else {**code, "counts": rle.lengths_of(code).tolist()}


def made(root: Path, annotations: list[dict[str, Any]], split: str = "train", count: int = 3, **more: Any) -> Path:
    """As bccd has it: `train.json` beside `train/`."""
    (root / split).mkdir(parents=True)
    for i in range(count):
        (root / split / f"{i}.jpg").write_bytes(encoded(smooth(HEIGHT, WIDTH, seed=i), "JPEG"))
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(count)]
    data = {"images": images, "annotations": annotations, "categories": CATEGORIES, **more}
    (root / f"{split}.json").write_text(json.dumps(data))
    return root


TWO = [
    annotation(1, 0, 3, encoding(box(2, 2, 5, 6))),
    annotation(2, 0, 7, encoding(box(0, 0, 8, 9), packed=False), iscrowd=1),
    annotation(3, 2, 7, encoding(box(0, 0, 12, 16))),
]


def test_instances_lie_on_the_background_smaller_above_larger(tmp_path: Path) -> None:
    opened = Masks.open(made(tmp_path, TWO), val_fraction=0).train
    assert opened.classes == ["background", "cat", "dog"] and opened.keys == [f"train/{i}.jpg" for i in range(3)]
    wanted = box(0, 0, 8, 9).int() * 2
    wanted[2:5, 2:6] = 1
    assert opened.target.read(0).indices.tolist() == wanted.tolist()
    assert opened.target.read(1).indices.max() == 0 and opened.target.read(2).indices.min() == 2
    affine = Preprocess((HEIGHT, WIDTH)).affine(torch.tensor([[HEIGHT, WIDTH]]))
    assert opened.target.warp(opened.target.read(0), affine)[0].tolist() == wanted.tolist()


def test_polygons_are_drawn_as_coco_draws_them(tmp_path: Path) -> None:
    peer = pytest.importorskip("faster_coco_eval.core.mask")
    polygons = [[1.5, 1.5, 9.2, 2.0, 5.0, 10.5], [10, 0, 16.4, 0, 16.4, 5.5, 10, 5]]
    opened = Masks.open(made(tmp_path, [annotation(1, 0, 3, polygons)]), val_fraction=0).train
    wanted = peer.decode(peer.frPyObjects(polygons, HEIGHT, WIDTH)).max(axis=2)
    assert wanted.sum() > 30 and opened.target.read(0).indices.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "segmentation, reason",
    [
        (
            encoding(torch.ones(HEIGHT, WIDTH + 1, dtype=torch.bool)),
            r"its mask is of size \[12, 17\], but the image is",
        ),
        ({"size": [HEIGHT, WIDTH], "counts": [3, 5]}, "the run lengths do not fill 16x12 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "P"}, "unknown character, or are cut off"),
        ({"size": [HEIGHT, WIDTH]}, "its mask lacks 'counts'"),
        ({"size": "ab", "counts": [1]}, "its mask is of size ab, but the image is"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "the run lengths are neither a text nor whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [10**30]}, "the run lengths are neither a text nor whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**62] * 4 + [HEIGHT * WIDTH]}, "the run lengths do not fill 16x12"),
        ([["a", 1, 5, 1, 5, 5]], "a polygon holds something else than numbers"),
        ([[1, 1, 40, 1, 5, 5]], "the polygon point 40, 1 is outside of the 16x12 image"),
        ([[1, 1, float("nan"), 1, 5, 5]], "the polygon point nan, 1 is outside"),
        ([[1, 1, 5, 5]], "at least three points"),
        ([[1, 1, 5, 5, 7]], "at least three points"),
        ([], "it has no segmentation"),
    ],
)
def test_outlines_that_do_not_fit_are_bad_images(segmentation: Any, reason: str, tmp_path: Path) -> None:
    if isinstance(segmentation, list) and segmentation:
        pytest.importorskip("faster_coco_eval")
    target = Masks.open(made(tmp_path, [*TWO, annotation(9, 0, 3, segmentation)]), val_fraction=0).train.target
    with pytest.raises(BadImage, match=f"^0.jpg in train.json: annotation 9: .*{reason}") as error:
        target.read(0)
    assert "\n" not in str(error.value)
    target.read(2)


def test_cocos_own_layout_and_two_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        made(tmp_path, TWO, split)
        (tmp_path / split).rename(tmp_path / f"{split}2017")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"{split}.json").rename(tmp_path / "annotations" / f"instances_{split}2017.json")
    opened = Masks.open(tmp_path)
    assert (
        opened.val is not None and opened.train.keys[0] == "train2017/0.jpg" and opened.val.keys[0] == "val2017/0.jpg"
    )
    single = Masks.open(tmp_path / "annotations" / "instances_val2017.json")
    assert single.val is not None and len(single.val) == 3 and not len(single.train)


def test_a_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    made(tmp_path, TWO)
    made(tmp_path, TWO, "val", categories=[*CATEGORIES, {"id": 9, "name": "cow"}])
    with pytest.raises(UserError, match="val.json has the class cow, which .*train.json lacks"):
        Masks.open(tmp_path)


def test_annotations_of_images_or_categories_that_the_file_does_not_list_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = [annotation(4, 77, 3, encoding(box(0, 0, 1, 1))), annotation(5, 1, 99, encoding(box(0, 0, 1, 1)))]
    target = Masks.open(made(tmp_path, [*TWO, *other]), val_fraction=0).train.target
    assert "train.json: 1 annotations are of images that it does not list" in caplog.text
    with pytest.raises(BadImage, match="1.jpg in train.json: annotation 5 is of a category that the file does not"):
        target.read(1)
    assert target.read(0).indices.max() == 2


def test_a_class_called_background_is_the_background(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "background"}, *CATEGORIES]
    assert Masks.open(made(tmp_path, TWO, categories=categories)).train.classes == ["background", "cat", "dog"]
    with pytest.raises(UserError, match="--void 0 is the number of the class background in train.json"):
        Masks.open(tmp_path, void=0)


def test_a_void_number_has_no_effect_and_that_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = made(tmp_path, TWO)
    Masks.open(root)
    assert not caplog.messages
    Masks.open(root, void=99)
    assert caplog.messages == [f"{root}: --void 99 has no effect: it is for masks of numbers, and COCO's JSON has none"]


def test_boxes_alone_are_refused(tmp_path: Path) -> None:
    boxes = [{"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    made(tmp_path / "a", boxes)
    made(tmp_path / "b", [annotation(1, 0, 3, [])])
    for path in (tmp_path / "a", tmp_path / "b", tmp_path / "b" / "train.json"):
        with pytest.raises(UserError, match="train.json has boxes but no outlines of objects"):
            Masks.open(path)
    with pytest.raises(UserError, match="boxes.*no recipe for detection"):
        open_data(tmp_path / "a")
    with pytest.raises(UserError, match="masks.*`vitrail train segment --data"):
        open_data(made(tmp_path / "c", TWO))


def test_the_extra_is_named_where_polygons_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.mask", None)
    with pytest.raises(UserError, match=r"faster-coco-eval: pip install 'vitrail\[segment\]'"):
        Masks.open(made(tmp_path / "a", [annotation(1, 0, 3, [[1, 1, 5, 5, 1, 5]])]))
    assert Masks.open(made(tmp_path / "b", TWO), val_fraction=0).train.target.read(0)  # encoded masks do not


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"images": [', "is damaged"),
        ("[]", "is damaged, or no JSON of COCO"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "lacks 'file_name'"),
        ('{"images": []}', "lacks 'annotations'"),
        ('{"images": [{"id": [], "file_name": "0.jpg"}]}', "is damaged"),
        ('{"images": [], "annotations": [], "categories": [{"id": "one"}]}', "is damaged"),
        ('{"images": [], "annotations": [], "categories": [{"id": Infinity}]}', "is damaged"),
    ],
)
def test_damaged_json(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"train.json.*{reason}"):
        Masks.open(file)


@pytest.mark.parametrize("values", [{"height": "tall"}, {"width": float("inf")}, {"height": None}, {"file_name": 7}])
def test_values_of_another_type_name_the_image(values: dict[str, Any], tmp_path: Path) -> None:
    root = made(tmp_path, TWO)
    data = json.loads((root / "train.json").read_text())
    data["images"][1] |= values
    (root / "train.json").write_text(json.dumps(data))
    name = values.get("file_name", "1.jpg")
    with pytest.raises(UserError, match=f"train.json: {name} or its annotations are damaged"):
        Masks.open(root)


def test_missing_images(tmp_path: Path) -> None:
    root = made(tmp_path, TWO)
    (root / "train" / "1.jpg").unlink()
    with pytest.raises(BadImage, match="1.jpg"):
        Masks.open(root, val_fraction=0).train.open(1)
    for image in (root / "train").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="train.json: 0.jpg is not found, nor other images"):
        Masks.open(root)


def panoptic(root: Path, missing: int | None = None) -> Path:
    segments = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    segments[:4], segments[4:9, 5:] = 5, 70_000
    colours = np.stack([segments % 256, segments // 256 % 256, segments // 65_536], -1).astype(np.uint8)
    info = [{"id": 5, "category_id": 7}, {"id": 70_000, "category_id": 3}]
    own = [
        {"image_id": i, "file_name": f"{i}.png", "segments_info": info[: 1 if i == missing else 2]} for i in range(3)
    ]
    made(root, own)
    (root / "annotations" / "panoptic_train2017").mkdir(parents=True)
    (root / "train.json").rename(root / "annotations" / "panoptic_train2017.json")
    for i in range(3):
        (root / "annotations" / "panoptic_train2017" / f"{i}.png").write_bytes(encoded(colours))
    return root


def test_panoptic_pngs_are_not_the_images(tmp_path: Path) -> None:
    """Their folder names a split, that of the images does not, and both have the same names."""
    root = panoptic(tmp_path)
    (root / "annotations" / "panoptic_train2017").rename(root / "panoptic_train")
    (root / "annotations" / "panoptic_train2017.json").rename(root / "panoptic_train.json")
    (root / "images").mkdir()
    data = json.loads((root / "panoptic_train.json").read_text())
    for image in data["images"]:
        stem = Path(image["file_name"]).stem
        (root / "images" / f"{stem}.png").write_bytes(encoded(np.full((HEIGHT, WIDTH, 3), 7, np.uint8)))
        image["file_name"] = f"{stem}.png"
    (root / "panoptic_train.json").write_text(json.dumps(data))
    shutil.rmtree(root / "train")
    opened = Masks.open(root, val_fraction=0).train
    assert opened.keys == [f"images/{i}.png" for i in range(3)]
    assert (opened.target.read(0).indices[:4] == 1).all()


def test_a_category_whose_name_means_void_is_void(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = panoptic(tmp_path)
    file = root / "annotations" / "panoptic_train2017.json"
    data = json.loads(file.read_text())
    more = [{"id": 3, "name": "unlabeled"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "cow"}]
    file.write_text(json.dumps({**data, "categories": more[:2]}))
    with pytest.raises(UserError, match="has the class dog only: segmentation needs at least two"):
        Masks.open(root)
    file.write_text(json.dumps({**data, "categories": more}))
    target = Masks.open(root, val_fraction=0).train.target
    assert target.classes == ["dog", "cow"] and "unlabeled is void and not one of the classes" in caplog.text
    assert set(target.read(0).indices.unique().tolist()) == {0, 255}


def test_panoptic_segments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = panoptic(tmp_path, missing=1)
    opened = Masks.open(root, val_fraction=0).train
    assert opened.classes == ["cat", "dog"] and opened.keys == [f"train/{i}.jpg" for i in range(3)]
    wanted = torch.full((HEIGHT, WIDTH), 255)
    wanted[:4], wanted[4:9, 5:] = 1, 0
    assert opened.target.read(0).indices.tolist() == wanted.tolist()
    with pytest.raises(BadImage, match="^1.jpg in panoptic_train2017.json: the segment 70000 of 1.png is not in segm"):
        opened.target.read(1)
    (root / "annotations" / "panoptic_train2017" / "2.png").write_bytes(encoded(np.zeros((HEIGHT, WIDTH), np.uint8)))
    with pytest.raises(BadImage, match="^2.jpg in .*: a panoptic mask has three channels"):
        opened.target.read(2)
    (root / "annotations" / "panoptic_train2017" / "2.png").unlink()
    with pytest.raises(BadImage, match="^2.jpg in .*: its mask 2.png: No such file"):
        Masks.open(root, val_fraction=0).train.target.read(2)
    data = json.loads((root / "annotations" / "panoptic_train2017.json").read_text())
    info = [{"id": "five", "category_id": 7}]
    other = json.dumps({**data, "annotations": [{**data["annotations"][0], "segments_info": info}]})
    (root / "panoptic_val2017.json").write_text(other)
    with pytest.raises(UserError, match="panoptic_val2017.json: 0.jpg or its annotations are damaged"):
        Masks.open(root)
    (root / "panoptic_val2017.json").unlink()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps({**data, "annotations": TWO}))
    assert Masks.open(root).train.classes == ["cat", "dog"]
    assert "panoptic_train2017.json is used, not instances_train2017.json" in caplog.text
