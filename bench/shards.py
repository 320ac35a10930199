"""Loading from shards: images per second from a folder of JPEGs and from its tar files, by the same loader.

    python bench/shards.py --data photos

links the photos (a folder, or one in `$VITRAIL_DATA`) to 2,000 files in class folders (a class is a name up to its
first `_`), packs them with `vitrail data shard --resize 256`, and reads both at random crops of 224 pixels with two
workers. The two alternate in rounds, and medians are compared. Tar files of the unchanged JPEGs are read too, to tell
the smaller images from the tar files. All files are in the system's cache. `--tiny` uses a few synthetic photos and
crops of 32 pixels.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from harness import Parser, Row, record, tiny_images
from loading import images_per_second, link

from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.packing import pack
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, open_data


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"], count=16, resize=48, crop=32, batch_size=4, rounds=1)
    parser.add_argument("--data", type=Path, help="folder of JPEGs, also in folders below it")
    parser.add_argument("--count", type=int, default=2000, help="files that are read in a round")
    parser.add_argument("--resize", type=int, default=256, help="shorter side of the images in the tar files")
    parser.add_argument("--crop", type=int, default=224, help="height and width of a crop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        photos = found(args.data) if args.data else tiny_images(root / "photos", ("cat", "dog"), 2, (80, 60))
        files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if not files:
            raise SystemExit(f"{photos} holds no JPEGs")
        folder = link(files, root / "links", args.count, None)
        sets = {"folder": open_data(folder)}
        bytes_of = {"folder": sum(file.stat().st_size for file in folder.rglob("*.jpg"))}
        for name, resize in (("tar files", None), ("resized tar files", args.resize)):
            packed = pack(sets["folder"], root / name, resize)
            bytes_of[name], sets[name] = packed["train"].bytes, open_data(root / name)
        speeds = measure({name: splits.train for name, splits in sets.items()}, args)
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    rows: Row = {
        "workers": args.workers,
        "files": args.count,
        "resize": args.resize,
        "crop": args.crop,
        "images_per_second": {name: [round(speed, 1) for speed in each] for name, each in speeds.items()},
        "megabytes": {name: round(count / 1e6, 1) for name, count in bytes_of.items()},
        **{f"{name} / folder": round(medians[name] / medians["folder"], 3) for name in list(sets)[1:]},
    }
    print(", ".join(f"{name} {speed:.0f} images/s" for name, speed in medians.items()))
    print(f"resized tar files: {rows['resized tar files / folder']:.2f} times the folder's images per second")
    print(f"written to {record('shards', rows, args.results)}", file=sys.stderr)


def found(folder: Path) -> Path:
    """A folder, or the one of that name in `$VITRAIL_DATA`."""
    return folder if folder.is_dir() else Path(os.environ.get("VITRAIL_DATA", ".")) / folder


def measure(sets: dict[str, ImageSet], args: Namespace) -> dict[str, list[float]]:
    """Images per second of each set in each round, with the same images and crops for all sets."""
    preprocess, augment = Preprocess((args.crop, args.crop)), Augment(crop="resized")
    speeds: dict[str, list[float]] = {name: [] for name in sets}
    for epoch in range(args.rounds):
        for name, images in sets.items():
            loader = Loader(
                images, preprocess, batch_size=args.batch_size, seed=0, train=True, augment=augment,
                workers=args.workers, memory=False,
            )  # fmt: skip
            steps = loader.steps_per_epoch
            speeds[name].append(images_per_second(loader.batches(epoch * steps), steps))
        print(
            f"round {epoch + 1}: {', '.join(f'{n} {s[-1]:.0f}' for n, s in speeds.items())} images/s", file=sys.stderr
        )
    return speeds


if __name__ == "__main__":
    main()
