"""Loading photos for training: vitrail's streaming loader against torchvision's ImageFolder, PIL and DataLoader.

    python bench/loading.py --data PHOTOS

links the photos to 2,000 files in class folders (a class is a name up to its first `_`), makes JPEGs of 3,000 pixels
from them, and reads both at random crops of 224 pixels with two workers. Both loaders use the same crops, resized
bilinearly, and give normalised float batches. They alternate in rounds, and medians are compared. The script also
compares the crops with those of full decoding, and prints how many are decoded at which scale. `--tiny` uses a few
synthetic photos and crops of 32 pixels.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from harness import Parser, Row, record, tiny_images
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, Normalize, ToTensor
from torchvision.transforms import functional as TF

from vitrail.data.augment import CROP, CROP_DRAWS, Augment, aspect_roots, crop_boxes
from vitrail.data.decode import Box
from vitrail.data.fetch import Fetch, Want
from vitrail.data.jpeg import scale_for
from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import seed_for, uniform
from vitrail.data.sets import ImageSet, open_data

AUGMENT = Augment(crop="resized")
MEAN = STD = (0.5, 0.5, 0.5)


def parser() -> Parser:
    parser = Parser(
        __doc__, ["data"], count=16, pixels=160, rounds=1, workers=1, batch_size=4, compared=4, crop=(32, 32)
    )
    parser.set_defaults(crop=(224, 224))
    parser.add_argument("--data", type=Path, help="folder of photos")
    parser.add_argument("--count", type=int, default=2000, help="files that the photos are linked to")
    parser.add_argument("--pixels", type=int, default=3000, help="longer side of the large JPEGs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--compared", type=int, default=200, help="crops compared with full decoding")
    return parser


def main() -> None:
    args = parser().parse_args()
    rows: Row = {"workers": args.workers, "files": args.count, "crop": args.crop[0]}
    with tempfile.TemporaryDirectory() as place:
        folder = args.data or tiny_images(Path(place) / "photos", ("cat", "dog"), 2, (80, 60))
        photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if not photos:
            raise SystemExit(f"{folder} holds no JPEGs")
        for name, pixels in (("as they are", None), (f"{args.pixels} pixels", args.pixels)):
            row = measure(link(photos, Path(place) / name, args.count, pixels), args)
            rows[name] = row
            print(
                f"{name}: {row['ratio_of_medians']:.2f} times torchvision's images per second; mean difference to full "
                f"decoding {row['mean_difference_of_255']:.2f}/255; decoded at {row['decoded_at']}, "
                f"least decoded over needed {row['least_decoded_pixels_over_needed']} of the crop's pixels"
            )
            assert row["mean_difference_of_255"] < 4, "the crops differ from those of full decoding"
    print(f"written to {record('loading', rows, args.results)}", file=sys.stderr)


def measure(root: Path, args: Namespace) -> Row:
    """Both loaders on one folder."""
    images, peer = open_data(root).train, Peer(root, args.crop)
    if [Path(path) for path, _ in peer.samples] != list(images.items):
        raise SystemExit("the two loaders see different files")
    steps = len(images) // args.batch_size
    ours, theirs = [], []
    for epoch in range(args.rounds):
        peer.boxes = boxes_of(images, epoch, args.crop)
        # A new loader per round, so that its workers see the round's crops.
        loader = DataLoader[Any](
            peer, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers, prefetch_factor=4
        )
        theirs.append(images_per_second(loader, steps))
        own = Loader(
            images, preprocess(args), batch_size=args.batch_size, seed=0, train=True, augment=AUGMENT,
            workers=args.workers, memory=False,
        )  # fmt: skip
        ours.append(images_per_second(own.batches(epoch * steps), steps))
        print(f"round {epoch + 1}: vitrail {ours[-1]:.0f}, torchvision {theirs[-1]:.0f} images/s", file=sys.stderr)
    return {
        "vitrail_images_per_second": [round(speed, 1) for speed in ours],
        "torchvision_images_per_second": [round(speed, 1) for speed in theirs],
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 3),
        "ratios": [round(a / b, 3) for a, b in zip(ours, theirs, strict=True)],
        **compare(images, peer, args),
    }


def preprocess(args: Namespace) -> Preprocess:
    return Preprocess(args.crop, interpolation="bilinear")


class Peer(ImageFolder):  # type: ignore[misc]
    """torchvision's ImageFolder with given crops instead of random ones."""

    def __init__(self, root: Path, size: tuple[int, int]) -> None:
        super().__init__(str(root))
        self.size = list(size)
        self.boxes: list[Box] = []
        self.to_tensor, self.normalise = ToTensor(), Normalize(MEAN, STD)

    def crop(self, index: int) -> Image.Image:
        image = self.loader(self.samples[index][0])
        return TF.resized_crop(image, *self.boxes[index], self.size, InterpolationMode.BILINEAR, antialias=True)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.to_tensor(self.crop(index))), self.samples[index][1]


def link(photos: list[Path], root: Path, count: int, pixels: int | None) -> Path:
    """Link `count` files into class folders: the photos, or JPEGs made from them with a longer side of `pixels`."""
    sources = photos
    if pixels is not None:
        sources = []
        (root / "made").mkdir(parents=True)
        for photo in photos:
            image = Image.open(photo).convert("RGB")
            scale = pixels / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            sources.append(root / "made" / f"{photo.stem}.jpg")
            image.save(sources[-1], quality=90)
    for i in range(count):
        source = sources[i % len(sources)]
        place = root / "set" / source.stem.split("_")[0] / f"{i:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(source.resolve(), place)
    return root / "set"


def boxes_of(images: ImageSet, epoch: int, size: tuple[int, int]) -> list[Box]:
    """The crops that vitrail's loader draws in an epoch."""
    sizes = torch.tensor([Image.open(images.read(i)).size for i in range(len(images))])  # type: ignore[arg-type]
    draws = uniform(seed_for(0, epoch, CROP), torch.arange(len(images)), CROP_DRAWS)
    boxes = crop_boxes(draws, sizes[:, 1], sizes[:, 0], AUGMENT.scale, size, aspect_roots()).tolist()
    return [(top, left, height, width) for top, left, height, width in boxes]


def images_per_second(batches: Any, steps: int) -> float:
    """Images per second of an epoch after its first batch, which waits for the workers to start."""
    batches = iter(batches)
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in range(steps - 1):
        batch = next(batches)
        count += len(batch["image"] if isinstance(batch, dict) else batch[0])
    return count / (time.perf_counter() - start)


def compare(images: ImageSet, peer: Peer, args: Namespace) -> Row:
    """The difference of crops from those of full decoding, in levels of 255, and their decoding scales."""
    fetch = Fetch(images, images.target, [(0, preprocess(args))], AUGMENT)
    peer.boxes = boxes_of(images, 0, args.crop)
    differences, margins, scales = [], [], Counter[str]()
    for i in range(min(args.compared, len(images))):
        ours = fetch.__getitems__([Want(i, 0, i)]).views[0][0]
        theirs = TF.pil_to_tensor(peer.crop(i))
        differences.append(float((ours.float() - theirs.float()).abs().mean()))
        height, width = peer.boxes[i][2:]
        scale = scale_for(height, width, args.crop)
        scales[f"1/{scale}"] += 1
        if scale > 1:
            margins.append(min(height / scale / args.crop[0], width / scale / args.crop[1]))
    return {
        "mean_difference_of_255": round(statistics.mean(differences), 3),
        "largest_mean_difference_of_one_image": round(max(differences), 3),
        "least_decoded_pixels_over_needed": round(min(margins), 3) if margins else None,
        "decoded_at": dict(sorted(scales.items())),
    }


if __name__ == "__main__":
    main()
