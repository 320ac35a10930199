"""Loading photos for training: vitrail's streaming path beside torchvision's ImageFolder, PIL and DataLoader.

    python bench/loading.py --data PHOTOS

links the photos to 2,000 files in class folders (a class is a name up to its first `_`), makes JPEGs of 3,000 pixels
from them, and reads both at random crops of 224 pixels with two workers. Both sides get the same crops, bilinear, and
end with normalised float batches; rounds alternate, and the medians count. It also compares the crops with those
of full decoding, and prints how many are decoded at which scale. Results go to `results/loading.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import ROOT, record
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, Normalize, ToTensor
from torchvision.transforms import functional as TF

from vitrail.data.augment import CROP, CROP_DRAWS, Augment, crop_boxes
from vitrail.data.decode import Box, Preprocess
from vitrail.data.fetch import Fetch, Want
from vitrail.data.jpeg import scale_for
from vitrail.data.loader import Loader
from vitrail.data.random import uniform
from vitrail.data.sets import ImageSet, open_data

SIZE = (224, 224)
AUGMENT = Augment(crop="resized")
PREPROCESS = Preprocess(SIZE, interpolation="bilinear")
MEAN = STD = (0.5, 0.5, 0.5)


class Peer(ImageFolder):
    """torchvision's folder, with crops that are given and not drawn."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.boxes: list[Box] = []
        self.to_tensor, self.normalise = ToTensor(), Normalize(MEAN, STD)

    def crop(self, index: int) -> Image.Image:
        image = self.loader(self.samples[index][0])
        return TF.resized_crop(image, *self.boxes[index], list(SIZE), InterpolationMode.BILINEAR, antialias=True)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.to_tensor(self.crop(index))), self.samples[index][1]


def link(photos: list[Path], root: Path, count: int, pixels: int | None) -> Path:
    """`count` files in class folders: the photos, or JPEGs whose longer side has `pixels` made from them."""
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


def boxes_of(part: ImageSet, epoch: int) -> list[Box]:
    """The crops that the loader draws in an epoch."""
    sizes = torch.tensor([Image.open(part.read(i)).size for i in range(len(part))])  # type: ignore[arg-type]
    draws = uniform(0, epoch, torch.arange(len(part)), CROP_DRAWS, CROP)
    boxes = crop_boxes(draws, sizes[:, 1], sizes[:, 0], AUGMENT.scale, SIZE).tolist()
    return [(top, left, height, width) for top, left, height, width in boxes]


def images_per_second(batches: Any, steps: int) -> float:
    """The speed of an epoch after its first batch, which waits for the workers to start."""
    batches = iter(batches)
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in range(steps - 1):
        batch = next(batches)
        count += len(batch["image"] if isinstance(batch, dict) else batch[0])
    return count / (time.perf_counter() - start)


def compare(part: ImageSet, peer: Peer, count: int) -> dict[str, Any]:
    """How far crops are from those of full decoding, in levels of 255, and the scales they are decoded at."""
    fetch = Fetch(part, PREPROCESS, 0, AUGMENT, train=True)
    peer.boxes = boxes_of(part, 0)
    differences, margins, scales = [], [], Counter[str]()
    for i in range(min(count, len(part))):
        ours = fetch.__getitems__([Want(i, 0, i)]).images[0]
        theirs = TF.pil_to_tensor(peer.crop(i))
        differences.append(float((ours.float() - theirs.float()).abs().mean()))
        height, width = peer.boxes[i][2:]
        scale = scale_for(height, width, SIZE)
        scales[f"1/{scale}"] += 1
        if scale > 1:
            margins.append(min(height / scale / SIZE[0], width / scale / SIZE[1]))
    return {
        "mean_difference_of_255": round(statistics.mean(differences), 3),
        "largest_mean_difference_of_one_picture": round(max(differences), 3),
        "least_decoded_pixels_over_needed": round(min(margins), 3) if margins else None,
        "decoded_at": dict(sorted(scales.items())),
    }


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both loaders on one folder."""
    part, peer = open_data(root).train, Peer(root)
    if [Path(path) for path, _ in peer.samples] != list(part.items):
        raise SystemExit("the two loaders see different files")
    steps = len(part) // arguments.batch_size
    ours, theirs = [], []
    for epoch in range(arguments.rounds):
        peer.boxes = boxes_of(part, epoch)
        # A fresh loader a round, so that its workers see the round's crops.
        loader = DataLoader(
            peer, arguments.batch_size, shuffle=True, drop_last=True, num_workers=arguments.workers, prefetch_factor=4
        )
        theirs.append(images_per_second(loader, steps))
        mine = Loader(
            part, PREPROCESS, batch_size=arguments.batch_size, seed=0, train=True, augment=AUGMENT,
            workers=arguments.workers, memory=False,
        )  # fmt: skip
        ours.append(images_per_second(mine.batches(epoch * steps), steps))
        print(f"round {epoch + 1}: vitrail {ours[-1]:.0f}, torchvision {theirs[-1]:.0f} images/s", file=sys.stderr)
    return {
        "vitrail_images_per_second": [round(speed, 1) for speed in ours],
        "torchvision_images_per_second": [round(speed, 1) for speed in theirs],
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 3),
        "ratios": [round(a / b, 3) for a, b in zip(ours, theirs, strict=True)],
        **compare(part, peer, arguments.compared),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of photos")
    parser.add_argument("--count", type=int, default=2000, help="files that the photos are linked to")
    parser.add_argument("--pixels", type=int, default=3000, help="longer side of the large JPEGs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--compared", type=int, default=200, help="crops compared with full decoding")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    photos = sorted(path for path in arguments.data.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not photos:
        raise SystemExit(f"{arguments.data} holds no JPEGs")
    rows: dict[str, Any] = {"workers": arguments.workers, "files": arguments.count, "crop": SIZE[0]}
    with tempfile.TemporaryDirectory() as place:
        for name, pixels in (("as they are", None), (f"{arguments.pixels} pixels", arguments.pixels)):
            row = measure(link(photos, Path(place) / name, arguments.count, pixels), arguments)
            rows[name] = row
            print(
                f"{name}: {row['ratio_of_medians']:.2f} times torchvision's images a second; mean difference to full "
                f"decoding {row['mean_difference_of_255']:.2f}/255; decoded at {row['decoded_at']}, "
                f"least decoded over needed {row['least_decoded_pixels_over_needed']} of the crop's pixels"
            )
    print(f"written to {record('loading', rows, arguments.results)}", file=sys.stderr)


if __name__ == "__main__":
    main()
