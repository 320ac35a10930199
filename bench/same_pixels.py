"""Compare the pixels that `eval` and `predict` see: VITRAIL_DATA=... python bench/same_pixels.py [--tiny]

Makes images of mixed sizes, JPEG, PNG and WebP, in all eight EXIF orientations, from the photos of `photos/` and
`flickr8k/`. It tests each preprocessing of the bundled models and of the zoo (timm's table, torchvision, transformers,
Google's, the papers' own code): the tensors of an evaluation loader, streaming with workers and from memory, are
compared bit for bit with those that `predict` passes to the model, for files and for images that PIL has opened.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Parser, record
from PIL import Image
from torch import Tensor

import vitrail
from vitrail.data.decode import EncodedImage
from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Labels
from vitrail.tasks.embed import Embed, Embedding
from vitrail.tasks.values import Batch, Prediction
from vitrail.variants import VariantConfig
from vitrail.zoo import originals, timm, torchvision
from vitrail.zoo.huggingface.kinds import KINDS
from vitrail.zoo.huggingface.processor import preprocess
from vitrail.zoo.timm.arguments import encoder_config, table
from vitrail.zoo.timm.shapes import input_size

BUNDLED = ("classify", "caption")
FEW = 20
"""images of a chunk that are also opened by PIL"""
CHUNK = 100
"""images at a time: a thousand prepared at 1024 pixels fill 3 GB"""


def parser() -> Parser:
    parser = Parser(__doc__, images=12)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> int:
    options = parser().parse_args()
    ways = distinct(bundled() + zoo())
    if options.tiny:
        ways = [way for way in ways if max(way.size) <= 64] + [replace(ways[-1], size=(32, 40), crop_fraction=0.875)]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), options.images, options.seed, options.tiny)
        kinds = {ending: sum(path.suffix == ending for path in paths) for ending in (".jpg", ".png", ".webp")}
        differing: dict[str, int] = {}
        for number, way in enumerate(ways, 1):
            for name, count in compare(way, paths).items():
                differing[name] = differing.get(name, 0) + count
            print(f"{number}/{len(ways)} {way.size} {way.resize} {way.crop_fraction:.4f} {differing}", flush=True)
    rows = {"images": len(paths), "of which": kinds, "preparations": len(ways), "images that differ": differing}
    record("same-pixels", rows, options.results)
    print(rows)
    return 1 if any(differing.values()) else 0


def bundled() -> list[Preprocess]:
    """The preprocessing of the bundled weights, and of a model of grey images."""
    found = [vitrail.load(name).preprocess for name in BUNDLED]
    return [*found, replace(found[0], channels=1, mean=(0.5,), std=(0.5,))]


def zoo() -> list[Preprocess]:
    """The preprocessing of every architecture in timm's table, and of checkpoints that the other readers support."""
    found = []
    for values in table().values():
        values = values | {"in_chans": 3}
        config = encoder_config(values, input_size(values, {}, values["images"]))
        found.append(timm._preprocess(values["images"], config, []))
    for width, patch, side in ((768, 16, 224), (1024, 16, 224), (768, 16, 384), (1024, 16, 512), (1280, 14, 518)):
        found.append(
            torchvision._preprocess(VariantConfig(width=width, heads=16, patch=patch, image_size=(side, side)))
        )
    for kind in KINDS.values():
        found += [preprocess({}, kind, (side, side), 3) for side in (224, 384)]
    for side in (224, 384):
        found.append(Preprocess((side, side), "squash", 1.0, "bilinear"))  # Google's
        config = VariantConfig(image_size=(side, side))
        found += [originals._images(config, (side, side), how) for how in ("bicubic", "bilinear")]
    return [*found, Preprocess((1024, 1024), "squash", 1.0, "bilinear")]  # SAM's


def distinct(ways: Sequence[Preprocess]) -> list[Preprocess]:
    """Without those that differ only in mean and standard deviation."""
    return list({(w.size, w.resize, w.crop_fraction, w.interpolation, w.channels): w for w in ways}.values())


class Seen(Embed):
    """A task that records its inputs."""

    def __init__(self, way: Preprocess) -> None:
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.preprocess = way
        self.images: list[Tensor] = []

    def answer(self, batch: Batch) -> list[Prediction]:
        self.images += batch["image"].unbind()
        return [Embedding([]) for _ in batch["image"]]


def compare(way: Preprocess, paths: list[Path]) -> dict[str, int]:
    """The number of images that differ from those in `vitrail predict`, by reader."""
    differing = {"streamed": 0, "from memory": 0, "opened by PIL": 0}
    for start in range(0, len(paths), CHUNK):
        some = paths[start : start + CHUNK]
        task = Seen(way)
        task.answers([task.prepare(EncodedImage(path)) for path in some])
        wanted, task.images = task.images, []
        task.predict([Image.open(path) for path in some[:FEW]])
        differing["opened by PIL"] += sum(not torch.equal(a, b) for a, b in zip(task.images, wanted, strict=False))
        found: dict[str, Iterator[Tensor]] = {}
        dataset = ImageSet(
            "images", [p.name for p in some], some, Labels(torch.zeros(len(some), dtype=torch.int64), ["a"])
        )
        for name, options in (("streamed", {"memory": False, "workers": 2}), ("from memory", {"memory": True})):
            loader = Loader(dataset, way, batch_size=16, seed=0, train=False, **options)
            found[name] = (image for batch in loader.evaluation() for image in batch["image"])
        for name, images in found.items():
            differing[name] += sum(not torch.equal(a, b) for a, b in zip(images, wanted, strict=True))
    return differing


def write_images(folder: Path, count: int, seed: int, synthetic: bool) -> list[Path]:
    """Images resized from photos, with 40 to 700 pixels per side; `synthetic`: from noise."""
    photos = [] if synthetic else sources()
    paths = []
    for i in range(count):
        draw = np.random.default_rng((seed, i))
        ending = ("jpg", "jpg", "jpg", "png", "webp")[i % 5]
        most = 700 if ending == "jpg" else 300  # a JPEG of 700 pixels is decoded at an eighth for the smallest models
        size = tuple(int(side) for side in np.exp(draw.uniform(np.log(40), np.log(most), 2)))
        if synthetic:
            image = Image.fromarray(draw.integers(0, 256, (9, 13, 3), dtype=np.uint8))
        else:
            image = Image.open(photos[i % 40 if i % 2 else int(draw.integers(len(photos)))]).convert("RGB")
        image = image.resize((min(size[0], 3 * size[1]), min(size[1], 3 * size[0])), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        options: dict[str, Any] = {"exif": exif}
        if ending == "jpg":
            options |= {"quality": int(draw.integers(60, 98)), "subsampling": i % 3, "progressive": bool(i % 4 == 0)}
        elif ending == "png":
            options["compress_level"] = 1
        if i % 7 == 0:
            image = image.convert("L")
        paths.append(folder / f"{i:04}.{ending}")
        image.save(paths[-1], **options)
    return paths


def sources() -> list[Path]:
    """The photos; the first forty are unmodified camera photos."""
    root = os.environ.get("VITRAIL_DATA")
    if root is None:
        sys.exit("set VITRAIL_DATA to a folder that contains photos/ and flickr8k/, or use --tiny")
    return sorted(Path(root, "photos").glob("*.JPEG"))[:40] + sorted(Path(root, "flickr8k").rglob("*.jpg"))


if __name__ == "__main__":
    sys.exit(main())
