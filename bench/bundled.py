"""Score the bundled weights.

    python bench/bundled.py --data DIR             the classifier
    python bench/bundled.py caption --data DIR     the captioner, with a control experiment and people's captions
    python bench/bundled.py segment --data DIR     the segmenter

DIR contains CIFAR-10, Flickr8k or CamVid. The captioner chooses among captions by their match with the image and by
people's captions of similar images (consensus); it is also scored without either.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import Parser, Row, record, tiny_captions, tiny_cifar10, tiny_streets, vitrail

KEPT = {
    "classify": ("top1", "top5", "cross_entropy", "calibration_error", "count"),
    "caption": (
        *("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor", "ptb_cider", "ptb_bleu4", "ptb_rouge_l"),
        *("length", "vocabulary", "identical", "new", "count"),
    ),
    "segment": ("miou", "miou_windows", "pixel_accuracy", "count", "classes", "iou"),
}

CLASSES = (*("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),)

CHOOSING = {
    "the likeliest": ("--match", "0", "--consensus", "0"),
    "with its match": ("--consensus", "0"),
    "with the consensus": ("--match", "0"),
}


def parser() -> Parser:
    # METEOR, which is left out if there is no Java, takes longer to start than the rest of a tiny run.
    parser = Parser(__doc__, needs=["data"], ways=["the likeliest"], environment={"PATH": ""})
    parser.set_defaults(ways=[*CHOOSING], environment={})
    parser.add_argument("--data", help="CIFAR-10, Flickr8k or CamVid")
    parser.add_argument("name", nargs="?", choices=list(KEPT), default="classify")
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        if args.name == "caption":
            rows = caption(args.data or str(tiny_captions(Path(place), 2)), args.ways, args.environment)
        elif args.name == "segment":
            data = args.data or str(tiny_streets(Path(place), CLASSES))
            rows = scores("segment", "segment", "--data", data, "--split", "val")
            rows["iou"] = dict(zip(rows.pop("classes"), rows["iou"], strict=True))
        else:
            rows = scores("classify", "classify", "--data", args.data or str(tiny_cifar10(Path(place))))
    print(rows)
    record(args.name, rows, args.results)


def caption(data: str, ways: list[str], environment: dict[str, str]) -> Row:
    """The captioner's scores on `val`: the test split is reserved for a final evaluation."""

    def of(*words: str) -> Row:
        return scores("caption", *words, "--data", data, "--split", "val", **environment)

    rows = of("caption")
    rows["captions of other images"] = of("caption", "--shuffle-images")
    rows["chosen"] = {way: of("caption", *CHOOSING[way]) for way in ways}
    rows["people"] = of("caption", "--human")
    return rows


def scores(name: str, *words: str, **environment: str) -> Row:
    """The scores that `vitrail eval` prints."""
    found, _ = vitrail("eval", *words, **environment)
    return {measure: found[measure] for measure in ("split", *KEPT[name]) if measure in found}


if __name__ == "__main__":
    main()
