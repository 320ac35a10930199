"""How well a captioner tells that its caption is right: AUROCs, and the thresholds of its `sure`.

    python bench/match.py --data flickr8k --photos DIR DIR

`match` must tell captions of the image from those of another image of the split. `likeness`, the similarity with
training images, must tell the split's images from other photos, for which a captioner has no words. The images of `val`
take turns: one half chooses the thresholds, below which `SHARE` of its right captions lie; the other half is scored.
Write `sure_from` into the `config.json` of the captioner to use them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import Parser, Row, record, tiny_captions, tiny_images
from torch import Tensor

import vitrail
from vitrail.data.captions import open_captions
from vitrail.data.decode import decode
from vitrail.data.preprocess import AnyImage
from vitrail.tasks.caption import Caption

SHARE = 0.05
"""of right captions and of images of the kind that the captioner knows, which are called not sure"""
BATCH = 32
DRAWS = 1000
"""resamplings of the images, for the intervals"""
ENDINGS = (".jpg", ".jpeg", ".png")


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"], images=4)
    parser.add_argument("--model", default="caption", help="a captioner with a contrastive loss")
    parser.add_argument("--data", help="its captioned set, with a validation split")
    parser.add_argument("--photos", type=Path, nargs="+", default=(), help="folders of other photos")
    parser.add_argument("--images", type=int, default=1000, help="images of each set, at most")
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        data, folders = args.data, args.photos
        if args.tiny:
            data = data or tiny_captions(Path(place) / "set", args.images)
            folders = folders or [tiny_images(Path(place) / "others", ["a", "b"], 2)]
        rows = measured(args.model, data, folders, args.images)
    print(json.dumps(rows, indent=1))
    print(record("caption-match", rows, args.results))


def measured(model: str, data: str | Path, folders: Sequence[Path], count: int) -> Row:
    task = vitrail.load(model)
    assert isinstance(task, Caption), f"{model} is no captioner"
    val = open_captions(data).val
    assert val is not None, "the data has no validation split"
    own = [val.image(i, task.preprocess.channels) for i in range(min(count, len(val)))]
    right, swapped, likeness = scores(task, own)
    sure_from = {"match": threshold(right[::2]), "likeness": threshold(likeness[::2])}

    def unsure(match: Tensor, similar: Tensor) -> float:
        below = (match < sure_from["match"]) | (similar < sure_from["likeness"])
        return round(float(below.float().mean()), 3)

    rows: Row = {
        "sure_from": sure_from,
        "chosen_on": len(right[::2]),
        "right_against_swapped": {
            "match": auroc(right[1::2], swapped[1::2]),
            "not_sure": {
                "right": unsure(right[1::2], likeness[1::2]),
                "swapped": unsure(swapped[1::2], likeness[1::2]),
            },
        },
        "against_other_photos": {},
    }
    for folder in folders:
        paths = spread(sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS), count)
        match, _, similar = scores(task, [decode(path, task.preprocess.channels) for path in paths])
        rows["against_other_photos"][folder.name] = {
            "match": auroc(right[1::2], match),
            "likeness": auroc(likeness[1::2], similar),
            "not_sure": unsure(match, similar),
        }
    return rows


def spread(paths: list[Path], count: int) -> list[Path]:
    """At most so many of the paths, evenly spaced."""
    return paths if len(paths) <= count else [paths[i * len(paths) // count] for i in range(count)]


@torch.inference_mode()
def scores(task: Caption, images: Sequence[AnyImage]) -> tuple[Tensor, Tensor, Tensor]:
    """The match of each image's caption, that of the caption of the image before it, and the image's likeness."""
    modules = task.components()
    pooled, captions, right, likeness = [], [], [], []
    for start in range(0, len(images), BATCH):
        prepared = [task.prepare(image).images for image in images[start : start + BATCH]]
        batch = task.preprocess.normalise(torch.cat(prepared))
        written = task.generate({"image": batch})
        assert written.match is not None and written.likeness is not None, "this captioner has not learned to match"
        right.append(written.match[:, 0])
        likeness.append(written.likeness)
        captions += list(written.words[:, :1])
        pooled.append(modules["encoder"](batch)[0])
    vectors, others = torch.cat(pooled), captions[-1:] + captions[:-1]
    swapped = [
        modules["rerank"](v[None], c[None], torch.zeros(1, 1))[1][0] for v, c in zip(vectors, others, strict=True)
    ]
    return torch.cat(right), torch.cat(swapped), torch.cat(likeness)


def threshold(values: Tensor) -> float:
    return round(float(values.quantile(SHARE)), 3)


def auroc(high: Tensor, low: Tensor) -> Row:
    """The probability that a value of `high` is above one of `low`, with its 95 % interval over drawn images."""
    generator = torch.Generator().manual_seed(0)

    def drawn(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (len(values),), generator=generator)]

    found = sorted(_auroc(drawn(high), drawn(low)) for _ in range(DRAWS))
    interval = [round(found[int(DRAWS * place)], 3) for place in (0.025, 0.975)]
    return {"auroc": round(_auroc(high, low), 3), "interval": interval, "images": [len(high), len(low)]}


def _auroc(high: Tensor, low: Tensor) -> float:
    """A tie counts as half."""
    ordered = low.sort().values
    high = high.contiguous()
    below = torch.searchsorted(ordered, high) + torch.searchsorted(ordered, high, right=True)
    return float(below.float().mean()) / 2 / len(low)


if __name__ == "__main__":
    main()
