"""`vitrail train folder` on a small folder: from scratch, from the package's weights, and beside timm.

    python bench/folder.py --data DIR --seeds 0 1 2
    python bench/folder.py --data DIR --results FOLDER -- --epochs 1 --image-size 32 32     a quick try

The peer is timm's ViT of the same width, depth, heads and patch, trained with fused AdamW on the same pictures, with
the same augmentation, for as many seconds as vitrail's whole command from scratch took, its start and report included.
What stands after `--` goes to `vitrail train`. Seeds that results/folder.json already holds from the same options are
kept, so a stopped measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, record
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitrail.data.loader import Loader
from vitrail.data.sets import open_data
from vitrail.train.build import build
from vitrail.train.run import Run
from vitrail.vit import ViTConfig

KINDS = ("scratch", "weights", "timm")
LOOKS = 10
"""evaluations of the peer, as many as the recipe makes"""


def ours(data: str, seed: int, out: Path, options: list[str]) -> dict[str, Any]:
    """Score and wall seconds of the whole command."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "vitrail", "train", "folder", "--data", data, "--seed", str(seed)]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--out", str(out), "--json", *options], check=True, stdout=subprocess.PIPE, text=True
    )
    scores = json.loads(done.stdout)
    seconds = round(time.monotonic() - began, 1)
    return {name: scores[name] for name in ("part", "top1", "count", "parameters")} | {"wall_seconds": seconds}


def peer(data: str, run: Run, seconds: float) -> dict[str, Any]:
    """timm's model after `seconds` of training, its evaluations included; as with vitrail the best on `val` is kept."""
    parts, _ = build(run, open_data(data), torch.device("cpu"))
    torch.manual_seed(run.seed)
    model = timm_model(run.model, len(parts.task.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    began, best, top1, looks = time.monotonic(), -1.0, 0.0, 0
    for steps, batch in enumerate(parts.train.batches()):
        done = min(1.0, (time.monotonic() - began) / seconds)
        if done * LOOKS >= looks + 1:
            looks += 1
            if (score := accuracy(model, parts.val)) > best:
                best, top1 = score, accuracy(model, parts.test) if parts.test else score
        if done >= 1:
            return {
                "top1": top1,
                "steps": steps,
                "parameters": sum(p.numel() for p in model.parameters()),
                "wall_seconds": round(time.monotonic() - began, 1),
            }
        # Warm-up over a tenth of the time, then down to zero along a line.
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(done / 0.1 + 1e-3, (1 - done) / 0.9)
        F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    raise AssertionError("training batches have no end")


def timm_model(config: Any, classes: int) -> VisionTransformer:
    """timm's ViT of the size that a config has, pooled in the same way."""
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
    """Share of a part's pictures that the model has right."""
    model.eval()
    right = [(model(batch["image"]).argmax(1) == batch["label"]).double() for batch in loader.evaluation()]
    model.train()
    return torch.cat(right).mean().item()


def one(data: str, seed: int, options: list[str]) -> dict[str, Any]:
    """A row: from scratch, from the package's weights, and timm for the time that scratch took."""
    with tempfile.TemporaryDirectory() as place:
        scratch = ours(data, seed, Path(place) / "scratch", options)
        weights = ours(data, seed, Path(place) / "weights", [*options, "--init", "classify"])
        run = Run.from_dict(json.loads((Path(place) / "scratch" / "recipe.json").read_text()))
    return {"seed": seed, "scratch": scratch, "weights": weights, "timm": peer(data, run, scratch["wall_seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of folder.json")
    parser.add_argument("options", nargs="*", help="for `vitrail train`, after --")
    asked = parser.parse_args()
    train = " ".join(["vitrail train folder", *asked.options])
    file = asked.results / "folder.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    runs = {run["seed"]: run for run in rows.get("runs", []) if rows["train"] == train}
    for seed in asked.seeds:
        if seed not in runs:
            runs[seed] = one(asked.data, seed, asked.options)
            print(runs[seed], flush=True)
        done = [runs[s] for s in sorted(runs)]
        means = {f"{kind} mean top-1": statistics.mean(run[kind]["top1"] for run in done) for kind in KINDS}
        slowest = {f"{kind} most seconds": max(run[kind]["wall_seconds"] for run in done) for kind in KINDS[:2]}
        record("folder", {"train": train, "seeds": len(done), **means, **slowest, "runs": done}, asked.results)


if __name__ == "__main__":
    main()
