"""`vitrail train folder` on a small folder: from scratch, from the bundled weights, and compared with timm.

    python bench/folder.py --data DIR --seeds 0 1 2

The comparison is timm's ViT of the same width, depth, heads and patch, trained with fused AdamW on the same images,
with the same augmentation, for as many seconds as vitrail's whole command from scratch took, start-up and report
included. Options after `--` are passed to `vitrail train`. Seeds that results/folder.json already has from the same
options are kept, so a stopped measurement resumes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Parser, Row, record, recorded, tiny_images, vitrail
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitrail.data.loader import Loader
from vitrail.data.sets import open_data
from vitrail.train.build import build
from vitrail.train.folder import RunFolder
from vitrail.train.run import Run
from vitrail.vit import ViTConfig

KINDS = ("scratch", "weights", "timm")
LOOKS = 10
"""evaluations of timm's model, as many as the recipe makes"""
TINY = ("--epochs", "1", "--image-size", "32", "32", "--batch-size", "4", "--workers", "0")


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"], passes_on=True, words=TINY, share=0.1)
    parser.set_defaults(words=(), share=1.0)
    parser.add_argument("--data", type=Path, help="one folder per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser


def main() -> None:
    args = parser().parse_args()
    train = " ".join(["vitrail train folder", *args.train])
    before: Row = {} if args.tiny else recorded("folder", args.results)
    runs = {run["seed"]: run for run in before.get("runs", []) if before["train"] == train}
    for seed in args.seeds:
        if seed not in runs:
            runs[seed] = one(args.data, seed, [*args.words, *args.train], args.share)
            print(runs[seed], flush=True)
        done = [runs[s] for s in sorted(runs)]
        means = {f"{kind} mean top-1": statistics.mean(run[kind]["top1"] for run in done) for kind in KINDS}
        slowest = {f"{kind} most seconds": max(run[kind]["wall_seconds"] for run in done) for kind in KINDS[:2]}
        record("folder", {"train": train, "seeds": len(done), **means, **slowest, "runs": done}, args.results)


def one(data: Path | None, seed: int, options: list[str], share: float) -> Row:
    """One row: from scratch, from the bundled weights, and timm for the fraction `share` of the time from scratch."""
    with tempfile.TemporaryDirectory() as place:
        data = data or tiny_images(Path(place) / "data", ("ants", "bees"), 10)
        scratch = ours(data, seed, Path(place) / "scratch", options)
        weights = ours(data, seed, Path(place) / "weights", [*options, "--init", "classify"])
        run = RunFolder(Path(place) / "scratch").run()
        theirs = peer(data, run, share * scratch["wall_seconds"])
    return {"seed": seed, "scratch": scratch, "weights": weights, "timm": theirs}


def ours(data: Path, seed: int, out: Path, options: list[str]) -> Row:
    """Score and wall seconds of the whole command."""
    scores, seconds = vitrail("train", "folder", "--data", str(data), "--seed", str(seed), "--out", str(out), *options)
    return {name: scores[name] for name in ("split", "top1", "count", "parameters")} | {"wall_seconds": seconds}


def peer(data: Path, run: Run, seconds: float) -> Row:
    """timm's model after `seconds` of training and evaluation; as in vitrail, the best on `val` counts."""
    components, _ = build(run, open_data(data), torch.device("cpu"))
    torch.manual_seed(run.seed)
    model = timm_model(run.model, len(components.task.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    began, best, top1, looks = time.monotonic(), -1.0, 0.0, 0
    for steps, batch in enumerate(components.train.batches()):
        done = min(1.0, (time.monotonic() - began) / seconds)
        if done * LOOKS >= looks + 1:
            looks += 1
            if (score := accuracy(model, components.val)) > best:
                best, top1 = score, accuracy(model, components.test) if components.test else score
        if done >= 1:
            return {
                "top1": top1,
                "steps": steps,
                "parameters": sum(p.numel() for p in model.parameters()),
                "wall_seconds": round(time.monotonic() - began, 1),
            }
        # Linear warm-up over a tenth of the time, then linear decay to zero.
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(done / 0.1 + 1e-3, (1 - done) / 0.9)
        F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    raise AssertionError("training batches are endless")


def timm_model(config: Any, classes: int) -> VisionTransformer:
    """timm's ViT with the size and pooling of a config."""
    assert isinstance(config, ViTConfig)
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=classes,
        class_token=False,
        global_pool="avg",
        drop_path_rate=config.drop_path,
    )


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Loader) -> float:
    """Top-1 accuracy on a split."""
    model.eval()
    correct = [(model(batch["image"]).argmax(1) == batch["label"]).double() for batch in loader.evaluation()]
    model.train()
    return torch.cat(correct).mean().item()


if __name__ == "__main__":
    main()
