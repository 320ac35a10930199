"""Export models in every format and precision, and compare each export with its model.

    python bench/exports.py classify --data DIR
    python bench/exports.py segment --data DIR
    python bench/exports.py caption --data DIR --images 300
    python bench/exports.py B/16

Each is compared at three sizes and three batches. Bundled models are also scored, on the split val of CIFAR-10, CamVid
or Flickr8k, which DIR contains; sizes have random weights, also in the head, and no scores. Adds to
results/exports.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from bundled import CLASSES
from harness import Parser, Row, random_model, record, recorded, tiny_captions, tiny_cifar10, tiny_streets

from vitrail.errors import RunError
from vitrail.export import PRECISIONS, export
from vitrail.sizes import SIZES

TINY_DATA: dict[str, Callable[[Path], Path]] = {
    "classify": tiny_cifar10,
    "segment": lambda folder: tiny_streets(folder, CLASSES),
    "caption": lambda folder: tiny_captions(folder, 2),
}
"""by bundled model"""
PRECISION = ("fp32", "bf16", "int8")


def parser() -> Parser:
    parser = Parser(__doc__, images=4, exports=[("onnx", "int8")])
    parser.set_defaults(exports=[(to, precision) for to, each in PRECISIONS.items() for precision in each])
    parser.add_argument("model", nargs="?", choices=[*TINY_DATA, *SIZES], default="classify", metavar="MODEL")
    parser.add_argument("--data", help="CIFAR-10, CamVid or Flickr8k")
    parser.add_argument("--precisions", nargs="+", choices=PRECISION, default=PRECISION, help="default: all")
    parser.add_argument("--images", type=int, help="at most so many are scored; all by default")
    return parser


def exported(source: str, to: str, precision: str, data: str | None, split: str | None, images: int | None) -> Row:
    """Differences, scores and size of one export; the reason if it is not kept."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "exported"
        try:
            row = export(source, out, to, precision, data, split=split, images=images).as_row()
        except RunError as error:
            return {"refused": str(error)}
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    told = ("difference", "relative_difference", "compared", "scores")
    return {"megabytes": round(size, 1), **{key: row[key] for key in told}}


def main() -> None:
    args = parser().parse_args()
    rows = recorded("exports", args.results)
    with tempfile.TemporaryDirectory() as place:
        source, data = args.model, args.data
        if source in SIZES:
            task, source = random_model(source), str(Path(place) / "source")
            task.save(source)
        elif args.tiny:
            data = str(TINY_DATA[source](Path(place)))
        elif data is None:
            raise SystemExit(f"--data is needed to score {source}")
        split = None if data is None or args.tiny else "val"
        for to, precision in args.exports:
            if precision not in args.precisions or (precision == "int8" and data is None):  # calibrated on images
                continue
            row = exported(source, to, precision, data, split, args.images if data else None)
            print(f"{args.model}, {to} {precision}: {row}", flush=True)
            rows.setdefault(args.model, {})[f"{to} {precision}"] = row
            record("exports", rows, args.results)


if __name__ == "__main__":
    main()
