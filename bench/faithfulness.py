"""How faithful each map of `vitrail explain` is: deletion and insertion curves, beside a random map.

    python bench/faithfulness.py             200 test images of CIFAR-10, and the bundled classifier

`VITRAIL_DATA` names the folder that holds `cifar10/`. Each map orders the patches of an image, and explains the class
that the classifier predicts. Its score is that class's probability while patches become the mean colour (deletion: a
lower score is better) or come into a blurred copy (insertion: a higher one is better); `difference` is insertion less
deletion, and `error` the standard error of its mean over images. Ends with 1 unless the map that `vitrail explain`
shows first has the largest difference.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from harness import Parser, Row, code, record, tiny_cifar10
from torch import Tensor

import vitrail
from vitrail.data.sets import open_data
from vitrail.explain.attention import per_head, rollout
from vitrail.explain.command import DEFAULT
from vitrail.explain.faithful import curves
from vitrail.explain.relevance import relevance
from vitrail.explain.trace import trace
from vitrail.tasks.classify import Classify

BATCH = 50


def parser() -> Parser:
    parser = Parser(__doc__, images=20, steps=4)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=16)
    return parser


def maps_of(task: Classify, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Each map of the images' patches, [B, N]."""
    found = trace(task, images)
    generator = torch.Generator().manual_seed(seed)
    last = per_head(found.maps, found.prefix, found.pool).mean(dim=1)
    return {
        "random": torch.rand(last.shape, generator=generator),
        "attention": last,
        "rollout": rollout(found.maps, found.prefix, found.pool),
        "relevance": relevance(task, {"image": images}),
    }


def measure(task: Classify, images: Tensor, steps: int) -> dict[str, dict[str, list[float]]]:
    """The areas and the curves of each map, for every image."""
    rows: dict[str, dict[str, list[float]]] = {}
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        with torch.no_grad():
            chosen = task(batch).argmax(dim=1, keepdim=True)

        def score(changed: Tensor, chosen: Tensor = chosen) -> Tensor:
            return task.probabilities(task(changed)).gather(1, chosen)[:, 0]

        grid = task.features(batch[:1]).grid
        for name, heat in maps_of(task, batch, start).items():
            found = curves(score, batch, heat, grid, steps)
            deletion, insertion = found.areas()
            row = rows.setdefault(name, {"deletion": [], "insertion": [], "difference": []})
            row["deletion"] += deletion.tolist()
            row["insertion"] += insertion.tolist()
            row["difference"] += (insertion - deletion).tolist()
            for curve in ("deletion", "insertion"):
                total = getattr(found, curve).sum(dim=0).tolist()
                before = row.get(f"{curve}_curve", [0.0] * len(total))
                row[f"{curve}_curve"] = [a + b for a, b in zip(before, total, strict=True)]
        print(f"{min(start + BATCH, len(images))}/{len(images)} images", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    args = parser().parse_args()
    task = vitrail.load("classify")
    assert isinstance(task, Classify)
    with tempfile.TemporaryDirectory() as scratch:
        data = open_data(str(tiny_cifar10(Path(scratch)))) if args.tiny else open_data("cifar10")
        test = data.test
        assert test is not None
        count = min(args.images, len(test))
        chosen = [round(i * (len(test) - 1) / max(count - 1, 1)) for i in range(count)]
        pixels = torch.stack([task.prepare(test.items[i]).images[0] for i in chosen])
    images = task.preprocess.normalise(pixels)
    rows: Row = {}
    for name, found in measure(task, images, args.steps).items():
        means: Row = {kind: statistics.fmean(found[kind]) for kind in ("deletion", "insertion", "difference")}
        means["error"] = statistics.stdev(found["difference"]) / count**0.5
        means |= {kind: [value / count for value in found[kind]] for kind in ("deletion_curve", "insertion_curve")}
        rows[name] = {**means, "images": count, "steps": args.steps, **code()}
        told = "  ".join(f"{kind} {means[kind]:.3f}" for kind in ("deletion", "insertion", "difference", "error"))
        print(f"{name:<10} {told}", flush=True)
    best = max(rows, key=lambda name: rows[name]["difference"])
    print(f"best: {best}; vitrail explain shows {DEFAULT}")
    record("faithfulness", rows, args.results)
    return int(best != DEFAULT and not args.tiny)


if __name__ == "__main__":
    sys.exit(main())
