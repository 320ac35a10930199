"""Commands that write files of other kinds: checkpoints, exports, shards. Heavy imports are inside the functions."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vitrail.errors import UserError
from vitrail.options import DATA, GROUP, SOURCE, VERIFY, Parser, path


def convert(args: Sequence[str]) -> int:
    """Convert a checkpoint and check it: `vitrail convert SOURCE OUT --to vitrail|timm|hf|google`."""
    parser = Parser("convert", convert)
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("out", type=path, help="the folder to write; for google a file that ends in .npz")
    parser.add_argument("--to", choices=("vitrail", "timm", "hf", "google"), default="vitrail")
    parser.add_revision()
    parser.add_argument("--verify", action="store_true", help=VERIFY)
    parser.add_argument("--json", action="store_true", help="print the full certificate as one line of JSON")
    options = parser.parse_args(args)
    from vitrail.zoo import convert as write

    certificate = write(options.source, options.out, options.to, options.revision, options.verify)
    row = {**certificate.as_row(), "out": str(options.out), "to": options.to}
    print(json.dumps(row) if options.json else f"{certificate.as_text()}\nwritten to {options.out} ({options.to})")
    return 0


def export(args: Sequence[str]) -> int:
    """Write a model for an engine and prove it: `vitrail export SOURCE OUT --to pt2|onnx|openvino [--data D]`."""
    parser = Parser("export", export)
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("out", type=path, help="the folder to write; predict, eval and load take it as a model")
    parser.add_argument("--to", required=True, help="pt2 (torch.export), onnx or openvino")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or int8 (calibrated on --data); default: fp32")
    parser.add_argument("--data", help=f"score model and export on it: {DATA}")
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: test, else val, else train")
    parser.add_argument("--images", type=int, help="score at most so many images; default: all")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="HxW",
        default=(),
        help="sizes in pixels, such as 224 or 192x256; default: any",
    )
    parser.add_argument(
        "--engines",
        action="store_true",
        help="also time torch.compile, ONNX Runtime and OpenVINO; takes a minute or more",
    )
    parser.add_revision()
    parser.add_merge()
    parser.add_argument("--json", action="store_true", help="print what was written and compared as one line of JSON")
    options = parser.parse_args(args)
    from vitrail.export import export as write

    sizes = [as_size(text) for text in options.sizes]
    result = write(
        options.source,
        options.out,
        to=options.to,
        precision=options.precision,
        data=options.data,
        sizes=sizes,
        split=options.split,
        images=options.images,
        revision=options.revision,
        engines=options.engines,
        merge=options.merge,
    )
    if options.json:
        print(json.dumps(result.as_row()))
        return 0
    for line in result.lines():
        print(line)
    return 0


def data(args: Sequence[str]) -> int:
    """Pack images with classes into tar files: `vitrail data shard DATA --out FOLDER [--resize 256]`."""
    parser = Parser("data", data)
    parser.add_argument("action", choices=("shard",), help="write tar files in WebDataset's layout, with an index")
    parser.add_argument("data", help=DATA)
    parser.add_argument("--out", type=path, required=True, help="new folder, for `vitrail train --data FOLDER`")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="make larger images JPEGs of this shorter side")
    parser.add_argument("--quality", type=int, help="of these JPEGs, from 1 to 100; default: 95")
    parser.add_argument("--tar-mb", type=int, default=500, help="largest size of a tar file in MB; default: 500")
    parser.add_argument("--max-bad", type=float, default=0.01, help="largest fraction of unreadable images")
    parser.add_argument("--group", help=GROUP)
    options = parser.parse_args(args)
    if options.quality is not None and options.resize is None:
        raise UserError("--quality is that of the JPEGs which --resize writes: add --resize PIXELS, or leave it out")
    from vitrail.data.packing import pack_data

    quality = 95 if options.quality is None else options.quality
    for line in pack_data(
        options.data, options.out, options.resize, quality, options.tar_mb, options.max_bad, options.group
    ):
        print(line)
    return 0


def as_size(text: str) -> tuple[int, int]:
    """`224` or `192x256` as a height and a width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"{text!r} is not a size: write one side, such as 224, or height and width, such as 192x256")
    return int(sides[0]), int(sides[-1])
