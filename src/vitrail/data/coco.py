"""COCO's JSON for segmentation: instances (polygons and run-length encoded masks) and panoptic segments."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from vitrail.data import rle
from vitrail.data.class_lists import means_void
from vitrail.data.decode import MAX_PIXELS, BadImage
from vitrail.data.kinds import BOXES, MASKS, excerpt, kind_of_json
from vitrail.data.mask_classes import TWO, refuse_void
from vitrail.data.mask_files import UNKNOWN, VOID, Array, Drawing, look_up, packed, read_mask
from vitrail.data.names import tidied
from vitrail.data.sources import Folder, one_per_split, split_of
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

Json = dict[str, Any]
BACKGROUND = TWO[0]
"""the class of pixels that no instance covers"""
BEYOND = 1.0
"""pixels by which a polygon may leave its image: annotation tools round so"""
MISSING = "polygons of COCO's JSON need faster-coco-eval: pip install 'vitrail[segment]'"


class Annotated(NamedTuple):
    """An image and the mask that its annotations draw; None if it has none."""

    image: Path
    mask: Drawing | None


class Shape(NamedTuple):
    """An instance."""

    number: Any
    """its id in the file"""
    label: int
    """its class"""
    outline: Any
    """polygons, arrays [2 n], or a run-length encoded mask"""


@dataclass(frozen=True)
class Instances(Drawing):
    """The mask of an image's instances, the smaller above the larger. Class 0 is where there is none."""

    where: str
    """image and file, for messages"""
    size: tuple[int, int]
    """height and width"""
    shapes: Sequence[Shape]

    def draw(self) -> Array:
        height, width = self.size
        if not 0 < height * width <= MAX_PIXELS:
            raise BadImage(f"{self.where}: it declares {width}x{height} pixels, and the limit is {MAX_PIXELS:,}")
        drawn: list[tuple[int, int, list[Json]]] = []
        for shape in self.shapes:
            if shape.label == UNKNOWN:
                raise BadImage(f"{self.where}: annotation {shape.number} is of a category that the file does not list")
            try:
                masks = self._encoded(shape.outline)
                area = sum(int(rle.lengths_of(mask)[1::2].sum()) for mask in masks)
            except KeyError as error:
                raise BadImage(f"{self.where}: annotation {shape.number}: its mask lacks {error}") from None
            except ValueError as error:
                raise BadImage(f"{self.where}: annotation {shape.number}: {error}") from None
            drawn.append((area, shape.label, masks))
        columns = np.zeros(height * width, dtype=np.int16)
        for _, label, masks in sorted(drawn, key=lambda each: -each[0]):
            for mask in masks:
                columns[rle.places(mask)] = label
        return np.ascontiguousarray(columns.reshape(width, height).T)

    def _encoded(self, outline: Any) -> list[Json]:
        """The outline as run-length encoded masks. Raises ValueError for what does not fit the image."""
        height, width = self.size
        if isinstance(outline, dict):
            if outline["size"] != [height, width]:
                raise ValueError(f"its mask is of size {outline['size']}, but the image is {width}x{height} pixels")
            return [outline]
        if not isinstance(outline, list) or not outline:
            raise ValueError("it has no segmentation")
        for polygon in outline:
            try:
                points = np.asarray(polygon, dtype=np.float64)
            except (TypeError, ValueError, OverflowError):
                raise ValueError("a polygon holds something else than numbers") from None
            if points.ndim != 1 or len(points) < 6 or len(points) % 2:
                raise ValueError("a polygon needs x and y of at least three points")
            x, y = points[::2], points[1::2]
            inside = (x >= -BEYOND) & (x <= width + BEYOND) & (y >= -BEYOND) & (y <= height + BEYOND)
            if not inside.all():  # also not a number, which the rasteriser would never finish
                i = int(inside.argmin())
                raise ValueError(f"the polygon point {x[i]:g}, {y[i]:g} is outside of the {width}x{height} image")
        return _rasteriser()([[*map(float, polygon)] for polygon in outline], height, width)


@dataclass(frozen=True)
class Segments(Drawing):
    """The mask of an image's panoptic segments, from a PNG whose colours are their numbers. Other pixels are void."""

    where: str
    file: Path
    labels: dict[int, int]
    """the class of each segment"""

    def draw(self) -> Array:
        colours = read_mask(self.file, f"{self.where}: its mask {self.file.name}", coloured=True).values
        if colours.ndim != 3:
            raise BadImage(f"{self.where}: a panoptic mask has three channels, and {self.file.name} has one")
        if unlisted := [number for number, label in self.labels.items() if label == UNKNOWN]:
            raise BadImage(f"{self.where}: segment {unlisted[0]} is of a category that the file does not list")
        numbers = packed(colours)
        found = look_up(numbers, {0: VOID, **self.labels})
        if (wrong := found == UNKNOWN).any():
            raise BadImage(f"{self.where}: the segment {numbers[wrong][0]} of {self.file.name} is not in segments_info")
        return found


def find_files(root: Folder) -> list[Path]:
    """The JSON files with masks at most two folders below `root`. If there are panoptic ones, only those."""
    files = [file for file in _json_files(root) if kind_of_json(excerpt(file)) == MASKS]
    panoptic = [file for file in files if '"segments_info"' in excerpt(file)]
    if panoptic and len(panoptic) < len(files):
        other = next(file for file in files if file not in panoptic)
        log.warning(f"{root.path}: {panoptic[0].name} is used, not {other.name}: panoptic masks label more pixels")
    return panoptic or files


def refuse_boxes(root: Folder) -> None:
    """Refuse a folder whose JSON files have boxes and no masks."""
    for file in _json_files(root):
        if kind_of_json(excerpt(file)) == BOXES:
            _refuse_boxes(file)


def _refuse_boxes(file: Path) -> NoReturn:
    raise UserError(
        f"{file} has boxes but no outlines of objects: segmentation needs `segmentation` in its annotations"
    )


def _json_files(root: Folder) -> list[Path]:
    near = [folder for folder in root.below() if len(folder.path.relative_to(root.path).parts) <= 2]
    return [file for folder in near for file in folder.others if file.suffix.lower() == ".json"]


def read(root: Folder, files: Sequence[Path], void: int) -> tuple[list[str], dict[str, list[Annotated]]]:
    """The classes of some JSON files, and the images of each split; "" for a file that names none.

    Raises UserError for a file that is damaged or has boxes only, and for a class that only an evaluation split has.
    """
    named = [(split_of(file.stem) or split_of(file.parent.name, strict=True) or "", file) for file in files]
    one_per_split((split or "unnamed", file) for split, file in named)
    loaded = {split: (file, _load(file)) for split, file in named}
    first = loaded.get("train") or next(iter(loaded.values()))
    classes = _classes(*first)
    if len(classes) < 2:
        raise UserError(f"{first[0]} has the class {' '.join(classes) or 'void'} only: segmentation needs at least two")
    refuse_void(void, classes, first[0].name)
    number = {name: i for i, name in enumerate(classes)}
    index: dict[str, list[Path]] = {}
    for folder in root.below():
        for image in folder.images:
            index.setdefault(image.name.lower(), []).append(image)
    splits = {}
    for split, (file, data) in loaded.items():
        labels = {
            each["id"]: VOID if means_void(_name(each)) else number.get(_name(each), UNKNOWN)
            for each in data["categories"]
        }
        if lacking := next((each for each in data["categories"] if labels[each["id"]] == UNKNOWN), None):
            raise UserError(
                f"{file} has the class {_name(lacking)}, which {first[0]} lacks: give both the same classes"
            )
        splits[split] = _annotated(file, data, labels, partial(_find, root.path, index, file, split))
        if not any(each.image.exists() for each in splits[split][:100]):
            raise UserError(f"{file}: {splits[split][0].image.name} is not found, nor other images: put them beside it")
    return classes, splits


def _load(file: Path) -> Json:
    try:
        with file.open("rb") as opened:
            data = json.load(opened)
        for key, needed in (("images", ("id", "file_name")), ("annotations", ("image_id",)), ("categories", ("id",))):
            for each in data[key]:
                for name in needed:
                    hash(each[name])  # refuses lists and objects
        categories = sorted(data["categories"], key=lambda each: int(each["id"]))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{file} is damaged, or no JSON of COCO") from None
    except KeyError as error:
        raise UserError(f"{file} is no JSON of COCO for segmentation: it lacks {error}") from None
    if not data["images"]:
        raise UserError(f"{file} lists no images")
    if not any(each.get("segmentation") or "segments_info" in each for each in data["annotations"]):
        _refuse_boxes(file)
    return {**data, "categories": categories}


def _name(category: Json) -> str:
    return str(category.get("name", category["id"]))


def _is_panoptic(data: Json) -> bool:
    return any("segments_info" in each for each in data["annotations"])


def _classes(file: Path, data: Json) -> list[str]:
    """The names of the categories in the order of their ids, but for void; for instances, below the background."""
    every = [*dict.fromkeys(_name(each) for each in data["categories"])]
    names = [name for name in every if not means_void(name)]
    if dropped := [name for name in every if means_void(name)]:
        log.warning(f"{file}: {', '.join(dropped)} is void and not one of the classes")
    if _is_panoptic(data):
        return names
    return [BACKGROUND, *(name for name in names if name.lower() != BACKGROUND)]


def _annotated(file: Path, data: Json, labels: dict[Any, int], find: Callable[[str], Path]) -> list[Annotated]:
    of_image: dict[Any, list[Json]] = {}
    for each in data["annotations"]:
        of_image.setdefault(each["image_id"], []).append(each)
    if any(isinstance(each.get("segmentation"), list) and each["segmentation"] for each in data["annotations"]):
        _rasteriser()  # raises if the extra is missing
    listed = {image["id"] for image in data["images"]}
    if lost := sum(len(own) for image, own in of_image.items() if image not in listed):
        log.warning(f"{file}: {lost:,} annotations are of images that it does not list, and are left out")
    panoptic = _is_panoptic(data)
    found = []
    for image in data["images"]:
        where = f"{image['file_name']} in {file.name}"
        own = of_image.get(image["id"], [])
        try:
            path = find(image["file_name"])
            mask: Drawing | None = None
            if panoptic and own:
                segments = {
                    int(each["id"]): labels.get(each["category_id"], UNKNOWN) for each in own[0]["segments_info"]
                }
                mask = Segments(where, _panoptic_file(file, own[0]["file_name"], path, find), segments)
            elif not panoptic:
                shapes = [
                    Shape(each.get("id"), labels.get(each["category_id"], UNKNOWN), each.get("segmentation"))
                    for each in own
                ]
                mask = Instances(where, (int(image["height"]), int(image["width"])), shapes)
        except KeyError as error:
            raise UserError(f"{file}: {image['file_name']} or its annotations lack {error}") from None
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(
                f"{file}: {image['file_name']} or its annotations are damaged: names must be texts, and ids, heights "
                "and widths numbers"
            ) from None
        found.append(Annotated(path, mask))
    return found


def _find(root: Path, index: dict[str, list[Path]], file: Path, split: str, name: str) -> Path:
    """The image of that name: below a folder of the split, if there are several. Raises UserError for two."""
    clean = tidied(name)
    if (file.parent / clean).is_file():
        return file.parent / clean
    found = index.get(clean.rpartition("/")[2].lower(), [])
    same = [image for image in found if image.as_posix().endswith(f"/{clean}")] or found
    # Panoptic PNGs have the names of their images, and their folder names a split where the images' may not.
    images = [image for image in same if "panoptic" not in image.parent.name.lower()] or same
    images = [image for image in images if split in {*map(split_of, image.relative_to(root).parts[:-1])}] or images
    if len(images) > 1:
        raise UserError(f"{file}: {name!r} could be {images[0]} or {images[1]}: write the path below its folder")
    return images[0] if images else file.parent / clean


def _panoptic_file(file: Path, name: str, image: Path, find: Callable[[str], Path]) -> Path:
    """The PNG of an image: in the folder of the JSON's name, as COCO has it, or wherever else it is."""
    folders = [file.parent / file.stem, file.parent.parent / file.stem, file.parent]
    beside = next((folder / name for folder in folders if (folder / name).is_file()), None)
    found = beside or find(name)
    return found if found != image else folders[0] / name


def _rasteriser() -> Callable[[list[list[float]], int, int], list[Json]]:
    try:
        from faster_coco_eval.core.mask import frPyObjects
    except ImportError:
        raise UserError(MISSING) from None
    return frPyObjects
