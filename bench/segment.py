"""`vitrail train segment` with several seeds, against torchvision's LR-ASPP, and from the captioner's encoder.

    python bench/segment.py --data CAMVID --seeds 0 1 2
    python bench/segment.py --data CAMVID --rows lraspp
    python bench/segment.py --data CAMVID --rows captioner --seeds 0 1 2

ours: both commands of each seed, `vitrail train segment` and `vitrail train segment-whole`. `crops` has the scores
after the first command.

lraspp: torchvision's `lraspp_mobilenet_v3_large` from random weights, on the same crops with the same loss and AdamW,
for as long as `ours`: for as many steps as fit into the time of all its steps, by the medians of steps that alternate.
Its number format is the one in which its step is faster, its learning rate the best of three after a twentieth of the
time, on training images that were held back for that; that choice is kept too.

captioner: the encoder of the bundled captioner, and the same architecture from random weights, fine-tuned for the same
number of steps with the settings of `vitrail train segment --init caption`.

What was stopped is resumed, seeds that results/camvid.json already has from the same recipe are kept, and several rows
can be measured at once: the file is read again before it is written. `--tiny` trains for two steps on made-up streets.
"""

from __future__ import annotations

import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from harness import Parser, Row, in_turns, record, recorded, tiny_streets, vitrail
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from vitrail import recipes, zoo
from vitrail.data.sets import Splits
from vitrail.files import write_atomic
from vitrail.process import cores
from vitrail.recipes import RECIPES
from vitrail.tasks.encoder import encoder_of
from vitrail.tasks.segment import Segment
from vitrail.train.build import build, open_for
from vitrail.train.folder import RunFolder
from vitrail.train.loop import Components, evaluate, fit
from vitrail.train.optim import factor
from vitrail.train.reliable import with_reliable_format
from vitrail.train.run import Run, with_fields
from vitrail.train.step import LossModule, train_step

CPU = torch.device("cpu")
SCORES = ("miou", "miou_windows", "pixel_accuracy", "iou", "count")
SAVE_EVERY = 250
"""steps of torchvision's network between two states on the disk"""
RATES = (1e-3, 2e-3, 4e-3)
TINY = {"max_steps": 2, "batch_size": 2, "image_size": (32, 32), "workers": 0}


def parser() -> Parser:
    kinds = ("ours", "lraspp", "captioner")
    parser = Parser(__doc__, needs=["data"], rows=list(kinds), steps=2)
    parser.add_argument("--data", type=Path, help="train/ and val/ with images/ and masks/, and classes.txt")
    parser.add_argument("--rows", nargs="+", choices=kinds, default=["ours"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=900, help="of the fine-tuning")
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.tiny:
        (args.results / "camvid.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as place:
        data = str(args.data or tiny_streets(Path(place), ("left", "right")))
        run = with_fields(RECIPES["segment"](0), TINY if args.tiny else {})
        splits = open_for(Segment, data, run.task.data_options())
        keep = partial(series, results=args.results, seeds=args.seeds)
        if "ours" in args.rows:
            both = f"{run.fingerprint} {RECIPES['segment-whole'](0).fingerprint}"
            keep("ours", partial(command, data, tiny=args.tiny), both)
        if "lraspp" in args.rows:
            write("lraspp", lraspp(run, splits, args.results), args.results)
        for start in ("captioner", "random") if "captioner" in args.rows else ():
            tuned = fine_tuning(run, args.steps, start)
            keep(start, partial(once, tuned, splits), tuned.fingerprint)


def series(name: str, one: Callable[[int], Row], recipe: str, results: Path, seeds: list[int]) -> None:
    """Measure the seeds that are missing, and write the file after each."""
    before = recorded("camvid", results).get(name, {})
    runs = {row["seed"]: row for row in before["runs"]} if before.get("recipe") == recipe else {}
    for seed in [seed for seed in seeds if seed not in runs]:
        runs[seed] = {"seed": seed, **one(seed)}
        print(name, runs[seed], flush=True)
        done = [runs[s] for s in sorted(runs)]
        means = {f"mean {score}": statistics.mean(row[score] for row in done) for score in SCORES[:3]}
        write(name, {"recipe": recipe, "seeds": len(done), **means, "runs": done}, results)


def write(name: str, row: Row, results: Path) -> None:
    record("camvid", {**recorded("camvid", results), name: row}, results)


# ---- ours


def command(data: str, seed: int, tiny: bool = False) -> Row:
    """Scores of both commands, the seconds of their training, and the cores and threads that they had."""
    words = ["--max-steps", "2", "--batch-size", "2", "--image-size", "32", "32", "--workers", "0"] if tiny else []
    folder = Path("runs") / "bench"
    first, second = folder / f"segment-{seed}", folder / f"segment-whole-{seed}"
    same = ["--data", data, "--seed", str(seed), *words]
    if tiny:
        shutil.rmtree(first, ignore_errors=True)
        shutil.rmtree(second, ignore_errors=True)
    crops = trained_or_resumed(first, "segment", *same)
    whole = trained_or_resumed(second, "segment-whole", "--init", str(first), *same)
    totals = {name: crops[name] + whole[name] for name in ("seconds", "steps")}
    kept = {name: crops[name] for name in (*SCORES[:3], "seconds", "steps")}
    return {name: whole[name] for name in (*SCORES, "parameters")} | totals | {"crops": kept} | processors()


def trained_or_resumed(out: Path, *words: str) -> Row:
    """The scores of a run, its seconds and its steps."""
    resumed = (out / "recipe.json").exists()
    scores, _ = vitrail("train", *(("--resume", str(out)) if resumed else (*words, "--out", str(out))))
    return scores | {"steps": max(row["step"] for row in RunFolder(out).rows() if row["kind"] == "train")}


def processors() -> Row:
    return {"cores": cores(), "threads": torch.get_num_threads()}


def fine_tuning(run: Run, steps: int, start: str) -> Run:
    """The run from the captioner's encoder, or from the same architecture with random weights."""
    captioner = zoo.load("caption")
    tuned = replace(recipes.from_weights(run, "caption", encoder_of(captioner).config), max_steps=steps)
    if start == "captioner":
        return tuned
    own = captioner.preprocess
    return replace(tuned, init=None, mean=own.mean, std=own.std, interpolation=own.interpolation)


def once(run: Run, splits: Splits, seed: int) -> Row:
    """Scores after the last step, and the seconds."""
    run = replace(run, seed=seed, eval_every=1e6)
    with tempfile.TemporaryDirectory() as place:
        components, steps = build(run, splits, CPU)
        folder = RunFolder(Path(place) / "run")
        folder.begin(run, components.task.classes)
        scores = fit(run, components, folder, steps)
    return {name: scores[name] for name in (*SCORES, "seconds")} | {"steps": steps, **processors()}


# ---- torchvision's network


class Peer(Segment):
    """torchvision's network in place of encoder and head; crops, loss and inference are ours."""

    def __init__(self, own: Segment) -> None:
        super().__init__(own.encoder, list(own.classes), own.preprocess, own.settings_used, own.class_weights)
        self.network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(own.classes))

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        logits: Tensor = self.network(images)["out"]
        return logits


def lraspp(run: Run, splits: Splits, results: Path) -> Row:
    """The scores of torchvision's network after as long as the steps of `ours` take."""
    found = recorded("camvid", results)
    rates = found.get("lraspp rates") or chosen_rate(run, splits, found["ours"]["runs"][0]["steps"])
    write("lraspp rates", rates, results)
    kept = Path("runs") / "bench" / f"lraspp-{rates['lr']}-{rates['steps']}.pt"
    scores = trained(run, splits, rates["lr"], rates["steps"], rates["bf16"], kept)
    print("lraspp", scores, flush=True)
    kept.unlink(missing_ok=True)
    return {**scores, **processors()}


def chosen_rate(run: Run, splits: Splits, ours: int) -> Row:
    """The number format, the steps in the time of `ours`, and the best rate after a twentieth of them."""
    bf16, ratio = faster_format(run, splits)
    steps = run.max_steps or round(ours * ratio)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
    held = max(1, len(order) // 5)
    both = Splits(splits.train.subset(order[held:]), splits.train.subset(order[:held]))
    short = {lr: trained(run, both, lr, max(1, steps // 20), bf16)["miou"] for lr in RATES}
    print("lraspp", short, flush=True)
    return {
        "bf16": bf16,
        "steps in the time of one of ours": ratio,
        "steps": steps,
        "rates": list(short),
        "short runs": list(short.values()),
        "lr": max(RATES, key=lambda rate: short[rate]),
    }


def trained(run: Run, splits: Splits, lr: float, steps: int, bf16: bool, kept: Path | None = None) -> Row:
    """The scores after `steps` steps with the recipe's schedule, and the seconds of training.

    The state is written to `kept` now and then, and a stopped training is resumed from it.
    """
    components, task = peer(run, splits)
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=lr, weight_decay=run.optim.weight_decay, fused=True)
    first, spent = resumed(kept, task.network, optimizer) if kept is not None and kept.exists() else (0, 0.0)
    began = time.monotonic() - spent
    for step, batch in enumerate(islice(components.train.batches(first), steps - first), first):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor(run.optim, step, steps)
        descend(task, batch, optimizer, bf16)
        if kept is not None and (step + 1) % SAVE_EVERY == 0:
            states = {"network": task.network.state_dict(), "optimizer": optimizer.state_dict()}
            save({**states, "step": step + 1, "seconds": time.monotonic() - began}, kept)
            print("lraspp: step", step + 1, "of", steps, flush=True)
    spent = time.monotonic() - began
    scores = evaluate(task, {"val": components.val}, "val", final=True)
    parameters = sum(parameter.numel() for parameter in task.network.parameters())
    return {name: scores[name] for name in SCORES} | {"parameters": parameters, "seconds": spent, "steps": steps}


def save(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, written := io.BytesIO())
    write_atomic(path, written.getvalue())


def resumed(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load what `save` wrote: the steps that are done, and their seconds."""
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def peer(run: Run, splits: Splits) -> tuple[Components, Peer]:
    components, _ = build(run, splits, CPU)
    assert isinstance(components.task, Segment)
    return components, Peer(components.task)


def descend(task: Peer, batch: Any, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
    task.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = task.loss(batch)
    (found["loss"] / found["count"]).backward()
    nn.utils.clip_grad_norm_(task.network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def faster_format(run: Run, splits: Splits) -> tuple[bool, float]:
    """Whether bf16 is the faster number format, and how many steps in the faster one fit into a step of ours."""
    components, task = peer(run, splits)
    optimizer = torch.optim.AdamW(task.network.parameters(), fused=True)
    batches = components.train.batches()

    def step(bf16: bool) -> None:
        descend(task, next(batches), optimizer, bf16)

    own, _ = build(run, splits, CPU)
    own.task.train()
    module = LossModule(own.task)
    optimizers = module.optimizers(run.optim, False, None)

    def our_step() -> None:
        train_step(run, module, next(batches), optimizers, 1.0).read()

    kinds: dict[str, Callable[[], object]] = {
        "ours": our_step,
        "fp32": partial(step, False),
        "bf16": partial(step, True),
    }
    times = in_turns(kinds, rounds=11, warm_up=2)
    each = {name: statistics.median(values) for name, values in times.items()}
    print("seconds of a step", each, flush=True)
    if with_reliable_format(run, task.network, CPU).precision == "fp32":
        return False, each["ours"] / each["fp32"]
    return each["bf16"] < each["fp32"], each["ours"] / min(each["fp32"], each["bf16"])


if __name__ == "__main__":
    main()
