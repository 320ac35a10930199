"""Detect data other than one folder per class: captions, boxes, masks and other targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vitrail.data.sources import SPLITS, Folder, split_of, unwrapped, words_of
from vitrail.errors import UserError

CAPTIONS, BOXES, MASKS = "captioned images", "images with boxes around objects", "images with masks"
REMEDIES = {
    CAPTIONS: "train a captioner on them with `vitrail train caption-vit --data {path}`",
    BOXES: "vitrail has no recipe for detection yet",
    MASKS: "train a segmenter on them with `vitrail train segment --data {path}`",
}
IMAGE_FOLDERS = frozenset(
    [
        *("image", "images", "img", "imgs", "jpegimages", "jpgs", "photos", "pictures", "input", "inputs", "rgb"),
        *("frames", "leftimgbit", "original", "originals"),
    ]
)
TARGET_FOLDERS = frozenset(
    [
        *("mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots", "gt", "gtfine"),
        *("gtcoarse", "groundtruth", "target", "targets", "segmentation", "segmentations", "segmentationclass"),
        *("segmentationobject", "trimap", "trimaps", "bbox", "bboxes", "xml", "xmls", "maskpng", "labelspng"),
        *("gts", "groundtruths", "anno", "annos", "lbl", "lbls", "seg", "segs", "semantic", "instances", "labelmaps"),
        *("depth", "depths", "depthmap", "depthmaps", "disparity", "disparities", "normals", "output", "outputs"),
    ]
)
"""names of folders of targets, beside a folder of images; without case, digits and split"""
TARGET_WORDS = (
    "(?:masks?|segs?|segmentations?|gts?|ground[ _-]?truths?|labels?|label_?ids|annots?|annotations?|annos?|targets?|"
    "trimaps?|lbls?|mattes?|depths?)"
)
"""what a target's name adds to its image's, at the end (a number may follow) or at the beginning"""
TARGET_STEM = re.compile(
    rf"(?:[\s_.-]+|(?<=[\d)])){TARGET_WORDS}(?:[\s_.-]*\d+)?$|^{TARGET_WORDS}(?:[\s_.-]+|(?=\d))", re.IGNORECASE
)
OUTLINE = re.compile(r'"segmentation"\s*:\s*(\[\s*\[|\{)')
"""polygons or a run-length encoded mask in COCO's JSON, which may also hold boxes alone"""
EXCERPT = 1 << 16
"""bytes read at each end of a file: JSON of COCO's size is half a gigabyte"""


class OtherKind(UserError):
    """Data is of another kind than images in class folders. `sign` is the file or folder that shows it."""

    def __init__(self, path: Path, kind: str, sign: str) -> None:
        self.kind, self.sign = kind, sign
        super().__init__(
            f"{path} looks like {kind} ({sign}): {REMEDIES[kind].format(path=path)}; to classify whole images, give a "
            "folder with one folder per class and nothing else"
        )


def refuse_other_kinds(path: Path, root: Folder) -> None:
    """Refuse what looks like images with captions, boxes or masks. The error names the sign and the right recipe."""
    top = root
    places = [root]
    while len(inner := top.with_images()) == 1 and not top.images:  # outer folders, as VOCdevkit/VOC2007/
        top = inner[0]
        places.append(top)
    places += [unwrapped(folder) for folder in top.folders if split_of(folder.name) or role_of(folder.name) is not None]
    signs = [_signs_of_files(place) for place in places]
    signs += [found for folder in root.below() for found in (_signs_of_folders(folder), _signs_of_pairs(folder))]
    for found in signs:
        for kind, sign in found:
            raise OtherKind(path, kind, sign)


def _signs_of_files(place: Folder) -> Iterator[tuple[str, str]]:
    stems = {image.stem for image in place.images}
    for file in place.others:
        kind = file.suffix.lower()
        beside = file.stem in stems
        text = excerpt(file) if kind in (".json", ".jsonl", ".yaml", ".yml") or beside else ""
        named = "caption" in file.stem.lower() or file.name.lower().endswith(".token.txt")
        if kind in (".txt", ".csv", ".tsv") and named:
            yield CAPTIONS, file.name
        elif kind in (".json", ".jsonl") and (found := kind_of_json(text)) is not None:
            yield found, file.name
        elif kind in (".yaml", ".yml") and re.search(r"^(nc|names)\s*:", text, re.M) and "train" in text:
            yield BOXES, file.name
        elif beside and kind == ".xml" and "<object" in text:
            yield BOXES, f"{file.name} beside its image"
        elif beside and kind == ".txt" and text.strip():
            numbers = re.match(r"\s*\d+(\s+[-+.\deE]+){4,}\s*$", text, re.M)
            yield BOXES if numbers else CAPTIONS, f"{file.name} beside its image"


def kind_of_json(text: str) -> str | None:
    """The kind of data in JSON as COCO, Karpathy or LabelMe write it; None for other JSON."""
    has = {*re.findall(r'"(\w+)"\s*:', text)}
    lists = "images" in has and not has.isdisjoint(["annotations", "image_id", "category_id", "sentences"])
    if lists and not has.isdisjoint(["caption", "sentences"]):
        return CAPTIONS
    if lists and ("segments_info" in has or (OUTLINE.search(text) and "keypoints" not in has)):
        return MASKS
    if (lists and not has.isdisjoint(["bbox", "keypoints"])) or {"shapes", "imagePath"} <= has:
        return BOXES
    if {"file_name", "objects"} <= has:  # of the Hub's metadata.jsonl
        return BOXES
    return None


def _signs_of_folders(place: Folder) -> Iterator[tuple[str, str]]:
    """`images/` beside `masks/`, `labels/` or `Annotations/`; also `train/` beside `train_masks/` or `trainannot/`."""
    for targets in place.folders:
        if not _may_be_targets(targets):
            continue
        for images in place.with_images():
            if images is targets or not _are_images_of(images, targets):
                continue
            sign = f"{images.name}/ beside {targets.name}/"
            endings = {file.suffix.lower() for folder in targets.below() for file in folder.others}
            if not endings.isdisjoint([".txt", ".xml", ".json"]) and not targets.images:
                yield BOXES, sign
            elif targets.holds_images() or endings:
                yield MASKS, sign


def _may_be_targets(folder: Folder) -> bool:
    return "targets" in (role_of(folder.name), end_role_of(folder.name)) or any(remainders(folder.name))


def _are_images_of(images: Folder, targets: Folder) -> bool:
    """Whether the names of two folders mean that one contains the images for the targets in the other.

    If both names begin or end with such a word, or one is the other plus such a word, they may still be classes
    (`face`, `face_mask`): then the files must also have the same names.
    """
    roles = role_of(images.name), role_of(targets.name)
    ends = end_role_of(images.name), end_role_of(targets.name)
    x_and_y = words_of(images.name)[:1] == ["x"] and words_of(targets.name)[:1] == ["y"]
    if roles == ("images", "targets") or (x_and_y and ends[1] == "targets"):
        return True
    if "images" in (roles[0], ends[0]) and "targets" in (roles[1], ends[1]):
        return roles[0] == "images" or roles[1] == "targets" or _share_stems(images, targets)
    if roles[1] == "targets":
        split = split_of(targets.name)
        if split is not None and split_of(images.name, strict=True) == split and images.images:
            return True
    return joined(images.name) in remainders(targets.name) and _share_stems(images, targets)


def role_of(folder: str) -> str | None:
    """The role of a folder, "images" or "targets", by all words of its name except those of a split."""
    words = words_of(folder)
    name = "".join(word for word in words if not any(word in known for known in SPLITS.values()))
    return "images" if name in IMAGE_FOLDERS else "targets" if name in TARGET_FOLDERS else None


def end_role_of(folder: str) -> str | None:
    """The role by the first or last word of a name: `semantic_labels` and `mask_images` contain targets."""
    words = words_of(folder)
    ends = {*words[:1], *words[-1:]}
    if not ends.isdisjoint(TARGET_FOLDERS):
        return "targets"
    return None if ends.isdisjoint(IMAGE_FOLDERS) else "images"


def joined(name: str) -> str:
    """A folder's name in lower case without marks between its words."""
    return re.sub(r"[\W_]+", "", name.lower())


def remainders(name: str) -> set[str]:
    """A folder's name without a word for targets at its end or beginning: `train` for `trainannot`."""
    whole = joined(name)
    left = {cut(whole, word) for word in TARGET_FOLDERS for cut in (str.removesuffix, str.removeprefix)}
    return left - {whole, ""}


def target_base(stem: str) -> str:
    """The name of an image without its ending, in lower case, and without the word that a target's name adds."""
    return TARGET_STEM.sub("", stem.lower(), count=1) or stem.lower()


def _share_stems(images: Folder, targets: Folder) -> bool:
    """Whether most images have a file of the same name, or with a word for targets added, in the other folder."""
    own = {target_base(image.stem) for image in images.all_images()}
    other = {target_base(file.stem) for folder in targets.below() for file in (*folder.images, *folder.others)}
    return len(own & other) * 2 > len(own)


def _signs_of_pairs(folder: Folder) -> Iterator[tuple[str, str]]:
    """Masks beside most images of a folder: `1_mask.png` beside `1.png`."""
    stems = {image.stem.lower(): image for image in folder.images}
    targets = {stem: base for stem in stems if (base := target_base(stem)) != stem and base in stems}
    bases = {*targets.values()}
    if targets and len(bases) * 2 > len(stems) - len(targets):
        stem, base = next(iter(targets.items()))
        yield MASKS, f"{stems[stem].name} beside {stems[base].name}"


def excerpt(file: Path) -> str:
    """The beginning and the end of a file."""
    try:
        with file.open("rb") as opened:
            data = opened.read(EXCERPT)
            opened.seek(max(file.stat().st_size - EXCERPT, len(data)))
            return (data + opened.read(EXCERPT)).decode("utf-8-sig", "ignore")
    except OSError:
        return ""
