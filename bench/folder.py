"""`vitrail train folder` on a small folder: from scratch, from the package's weights, and beside timm.

    python bench/folder.py --data DIR --seeds 0 1 2

The peer is timm's ViT of the same width, depth, heads and patch, trained with fused AdamW on the same pictures, with
the same augmentation, for as many seconds as vitrail's own run from scratch took.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from record import record

from vitrail.data.sets import open_data
from vitrail.train.build import build
from vitrail.train.run import Run


def ours(data: str, seed: int, *options: str) -> tuple[dict[str, Any], Path]:
    """Scores and wall seconds of the whole command, and its run folder."""
    out = Path("runs/bench") / f"folder-{seed}{'-'.join(options)}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "vitrail", "train", "folder", "--data", data, "--seed", str(seed)]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--out", str(out), "--json", *options], check=True, stdout=subprocess.PIPE, text=True
    )
    scores = json.loads(done.stdout)
    return {"top1": scores["top1"], "wall_seconds": round(time.monotonic() - began, 1)}, out


def peer(data: str, run: Run, seconds: float, seed: int) -> dict[str, Any]:
    """timm's model for `seconds` of training, evaluated ten times; the best evaluation counts, as with vitrail."""
    parts, _ = build(run, open_data(data), torch.device("cpu"))
    c = run.model
    torch.manual_seed(seed)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=c.image_size,
        patch_size=c.patch,
        embed_dim=c.width,
        depth=c.depth,
        num_heads=c.heads,
        num_classes=len(parts.task.classes),
        class_token=False,
        global_pool="avg",
        drop_path_rate=c.drop_path,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    began, best, looks = time.monotonic(), 0.0, 0
    for steps, batch in enumerate(parts.train.batches()):
        done = min(1.0, (time.monotonic() - began) / seconds)
        if done * 10 >= looks + 1:
            looks += 1
            model.eval()
            with torch.inference_mode():
                right = [(model(b["image"]).argmax(1) == b["label"]).float() for b in parts.val.evaluation()]
            best = max(best, torch.cat(right).mean().item())
            model.train()
        if done >= 1:
            return {"top1": best, "steps": steps, "wall_seconds": round(time.monotonic() - began, 1)}
        # Warm-up over a tenth of the time, then down to zero along a line.
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(done / 0.1 + 1e-3, (1 - done) / 0.9)
        F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=run.task.smoothing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    raise AssertionError("training batches have no end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        scratch, out = ours(options.data, seed)
        weights, _ = ours(options.data, seed, "--init", "classify")
        run = Run.from_dict(json.loads((out / "recipe.json").read_text()))
        runs.append(
            {
                "seed": seed,
                "scratch": scratch,
                "from the package's weights": weights,
                "timm": peer(options.data, run, scratch["wall_seconds"], seed),
            }
        )
        print(runs[-1], flush=True)
        kinds = [kind for kind in runs[0] if kind != "seed"]
        means = {f"{kind}: mean top-1": statistics.mean(r[kind]["top1"] for r in runs) for kind in kinds}
        largest = max(r[kind]["wall_seconds"] for r in runs for kind in kinds[:2])
        record("folder", {"runs": runs, "seeds": len(runs), **means, "largest wall seconds of a command": largest})


if __name__ == "__main__":
    main()
