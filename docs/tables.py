"""Write the tables of README.md and docs/*.md, each between `<!-- table:NAME -->` and `<!-- /table -->`.

    python docs/tables.py            write them
    python docs/tables.py --check    change nothing; name the stale ones and end with 1

Their content comes from the code and from `results/*.json`. A file there holds
`{"command": ..., "commit": ..., "changed": ..., "machine": ..., "date": ..., "rows": {measure: value}}`, as
`record` in `bench/harness.py` writes it; a value is a number, a text, or a dict or list of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # a test loads this file from elsewhere

import scale_tables

ROOT = Path(__file__).resolve().parent.parent

Rows = dict[str, Any]
"""what a file under `results/` holds by measure"""

MEASURES: dict[str, tuple[str, str, Callable[[Rows], str]]] = {
    "digits": (
        "`digits` from scratch, test split",
        "97.5 %; each run within 2 minutes",
        lambda rows: _seeds(rows),
    ),
    "cifar10-quick": (
        "`cifar10-quick` from scratch, test split",
        "80 %; each run within 30 minutes on 2 cores",
        lambda rows: _seeds(rows),
    ),
    "cifar10-quick-plain": (
        "the same with a plain patch projection, without the convolutional stem",
        "none, for comparison",
        lambda rows: _seeds(rows),
    ),
    "classify": (
        "bundled CIFAR-10 classifier, trained within two hours on two cores; test split",
        "84 %; the recipe `cifar10` on a GPU 94 %",
        lambda rows: f"{rows['top1']:.2%} of {rows['count']:,} images",
    ),
    "training-step": (
        "training step: timm's time divided by vitrail's",
        "1, better 1.3",
        lambda rows: (
            f"bf16 {rows['bf16, best of timm / best of vitrail']:.2f}, "
            f"fp32 {rows['fp32, best of timm / best of vitrail']:.2f}"
        ),
    ),
    "loading": (
        "loading photos: vitrail's images per second divided by torchvision's",
        "1.3 (better 2) at the original size; 3 at 3,000 pixels",
        lambda rows: (
            f"{rows['as they are']['ratio_of_medians']:.2f} at the original size; "
            f"{rows['3000 pixels']['ratio_of_medians']:.2f} at 3,000 pixels"
        ),
    ),
    "shards": (
        "loading photos from tar files: images per second divided by those of their folder, 2 workers",
        "1.5 after `--resize 256`",
        lambda rows: (
            f"{rows['resized tar files / folder']:.2f} after `vitrail data shard --resize 256`, "
            f"{rows['tar files / folder']:.2f} without `--resize`"
        ),
    ),
    "folder": (
        "`vitrail train folder` on photos of ants and bees, beside timm's ViT",
        "within 10 minutes; from scratch not below timm's",
        lambda rows: (
            f"from scratch {rows['scratch mean top-1']:.1%}; from the bundled weights "
            f"{rows['weights mean top-1']:.1%}; timm's ViT {rows['timm mean top-1']:.1%}; at most "
            f"{max(rows['scratch most seconds'], rows['weights most seconds']) / 60:.1f} minutes"
        ),
    ),
    "transfer": (
        "gain of the bundled weights over training from scratch: ants and bees; CIFAR-10 at twice the image size",
        "above twice its standard error; above 0",
        lambda rows: "; ".join(_gain(rows[name]) for name in TRANSFERS if "gain" in rows.get(name, {})),
    ),
    "caption": (
        "bundled captioner, Flickr8k's validation split",
        "CIDEr 0.42, BLEU-4 0.16; with shuffled images less than a quarter of that CIDEr",
        lambda rows: (
            f"CIDEr {rows['cider']:.3f}, BLEU-4 {rows['bleu4']:.3f}; with shuffled images "
            f"CIDEr {rows['captions of other images']['cider']:.3f}"
        ),
    ),
    "caption-decoding": (
        "beam search with 5 beams: speed with a cache divided by speed without, for 20 and 60 tokens; time per caption",
        "3 and 5 times, with the same tokens; 150 ms",
        lambda rows: "; ".join(
            [
                *(
                    f"{_faster(rows, 16, n)} times in batches of 16 on {'one thread' if n == 1 else f'{n} threads'}"
                    for n in rows["threads"]
                ),
                f"{_faster(rows, 1, rows['threads'][-1])} times for one image",
                f"{rows['agreement']['same']:,} of {rows['images']:,} captions identical",
                f"{rows['latency']['as its checkpoint']['median']:.0f} ms per caption",
            ]
        ),
    ),
    "caption-match": (
        "what the bundled captioner tells of its captions, AUROC: right against swapped images by `match`; Flickr8k "
        "against other photos by the image's likeness",
        "printed",
        lambda rows: "; ".join(
            [
                f"right against swapped {rows['right_against_swapped']['match']['auroc']:.2f}",
                *(f"{name} {row['likeness']['auroc']:.2f}" for name, row in rows["against_other_photos"].items()),
            ]
        ),
    ),
    "serving": (
        "`vitrail serve` under load: images per second divided by the engine's own, and by LitServe's; with more "
        "clients than the queue takes, divided by before",
        "0.9; 1; 0.9, with no answer but 200 and 503",
        lambda rows: "; ".join(
            [
                f"{rows['model']}, {rows['settings']['clients']} clients: {rows['of_own_rate']:.2f}",
                f"{rows['of_litserve']:.2f}" if "of_litserve" in rows else "LitServe not installed",
                f"{rows['kept_with_more_clients']:.2f}" if "kept_with_more_clients" in rows else "not measured",
            ]
        ),
    ),
    "hostile": (
        "hostile requests to `vitrail serve`: mutated image files, bombs, heads, paths, and requests made up by "
        "schemathesis",
        "no status of 500 or above but 503, no crash, bounded memory",
        lambda rows: (
            f"{rows['mutated']['files']:,} files; "
            f"{sum(len(row.get('wrong', ())) for row in rows.values() if isinstance(row, dict))} wrong answers"
        ),
    ),
    "deploy": (
        "the Dockerfile's steps in a clean virtual environment: `vitrail serve` answers after",
        "60 s, after installation",
        lambda rows: f"{rows['first_answer_seconds']:.0f} s ({rows['target']})",
    ),
    "doctor": (
        "flipped labels among the first 5 % that `vitrail doctor` lists, of 2,000 images of CIFAR-10",
        "60 %, within 5 minutes of 2 cores",
        lambda rows: (
            f"{rows['flipped labels']['mean']['found']:.0%}, {rows['flipped labels']['mean']['seeds']} seeds; "
            f"{max(row.get('cpu_seconds', 0) for row in rows['flipped labels'].values()) / 60:.1f} minutes of one core"
        ),
    ),
    "ranks": (
        "training in 2 and 4 processes, with whole weights and with `--shard`, compared with one process",
        "the same images and scores, losses within rounding",
        lambda rows: _ranks([found for case in rows.values() for found in case.values()]),
    ),
    "startup": (
        "`vitrail --help`, median time",
        "0.4 s",
        lambda rows: f"{rows['vitrail --help, median seconds']:.2f} s",
    ),
    "ray-predict": (
        "prediction by Ray for 20,000 images, 20 of them damaged, one of its workers killed midway",
        "20,000 rows, none twice, none missing",
        lambda rows: (
            f"{rows['rows']:,} rows, {rows['rows of an image that has another']} twice, "
            f"{rows['images without a row']} missing, {rows['rows with an error']} with an error"
        ),
    ),
}
"""the files that the README shows, in order: the task, the goal, and the result in words"""

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def results() -> list[list[str]]:
    """What was measured, one row per file."""
    rows = [["task", "score and cost", "command"]]
    for name, (task, _, _) in MEASURES.items():
        found = _read(name)
        rows.append([task, _result(name), f"`{found['command']}`" if found else ""])
    return rows


def goals() -> list[list[str]]:
    """The results beside the goals that were set before they were measured."""
    return [["task", "goal", "result"], *([task, goal, _result(name)] for name, (task, goal, _) in MEASURES.items())]


def _result(name: str) -> str:
    """A result in words; each seed of a series names its own number of cores."""
    found = _read(name)
    if found is None:
        return "not measured"
    where = " (on one core)" if found["machine"]["cores"] == 1 and "runs" not in found["rows"] else ""
    return MEASURES[name][2](found["rows"]) + where


def _ranks(found: list[Rows]) -> str:
    """How far runs in several processes are from one, over all comparisons."""
    same = sum(each["the same images"] and each["scores of the same weights are equal"] for each in found)
    most = max(value for each in found for name, value in each.items() if "loss" in name)
    return f"the same images and scores in {same} of {len(found)} comparisons; losses differ by at most {most:.0e}"


def _faster(rows: Rows, batch: int, threads: int) -> str:
    """The speed-up from the cache at 20 and at 60 tokens."""
    found = (rows[f"batch {batch}, {words} words, {threads} threads"]["times as fast"] for words in (20, 60))
    return " and ".join(f"{times:.1f}" for times in found)


def _seeds(rows: Rows) -> str:
    """Mean, range and time of a series of `bench/seeds.py`."""
    scores = [run["top1"] for run in rows["runs"]]
    minutes: dict[int, list[float]] = {}
    for run in sorted(rows["runs"], key=lambda run: -int(run["cores"])):
        minutes.setdefault(run["cores"], []).append(run["wall_seconds"] / 60)
    spans = (
        " to ".join(dict.fromkeys([f"{min(each):.1f}", f"{max(each):.1f}"]))
        + f" minutes on {'one core' if cores == 1 else f'{cores} cores'}"
        for cores, each in minutes.items()
    )
    spread = f" ({min(scores):.2%} to {max(scores):.2%})" if len(scores) > 1 else ""
    seeds = f"{len(scores)} seeds" if len(scores) > 1 else "one seed"
    told = ", by an earlier version of the recipe" * _changed(rows)
    return f"{rows['mean_top1']:.2%}{spread}, {seeds}, {', '.join(spans)}{told}"


def _changed(rows: Rows) -> bool:
    """Whether the recipe of a series of `bench/seeds.py` has changed since; older series do not tell."""
    from vitrail.recipes import RECIPES

    return "recipe" in rows and rows["recipe"] != RECIPES[rows["train"].split()[2]](50_000).fingerprint


TRANSFERS: dict[str, str] = {"hymenoptera": "ants and bees", "cifar10": "CIFAR-10"}
"""data sets of results/transfer.json"""
TRANSFER_ROWS: dict[str, str] = {
    "weights_top1": "from the bundled weights",
    "scratch_top1": "from scratch",
    "gain": "gain, mean of the pairs",
    "gain_standard_error": "its standard error",
    "gain_corrected_standard_error": "its standard error, corrected for overlapping training folds",
    "least_gain": "smallest gain of a pair",
    "linear_top1": "linear probe of the bundled weights",
    "knn_top1": "k-NN with the bundled weights",
    "untouched_top1": "the bundled weights without training, at their own 32 pixels",
    "untouched_at_twice_the_size_top1": "the bundled weights without training, at 64 pixels",
}


def _gain(rows: Rows) -> str:
    """A mean gain with its standard error, or with the smallest gain of a pair."""
    error = rows.get("gain_standard_error")
    if error:
        corrected = 100 * rows["gain_corrected_standard_error"]
        spread = f"standard error {100 * error:.1f}, corrected for overlapping folds {corrected:.1f}"
    else:
        spread = f"smallest {100 * rows['least_gain']:+.1f}"
    return f"{100 * rows['gain']:+.1f} points ({spread}, {rows['pairs']} pairs)"


def transfer() -> list[list[str]]:
    """Training from the bundled weights beside training from scratch."""
    rows, found = [["data set", "budget", "measure", "result"]], _read("transfer")
    for data, title in TRANSFERS.items():
        if found is None or data not in found["rows"]:
            rows.append([title, "", "not measured", ""])
            continue
        own = found["rows"][data]
        budget = own["settings"]
        given = f"{budget['size']} pixels, {budget['epochs']:g} epochs" + (
            f" of {budget['images']:,}" if budget["images"] else ""
        )
        for name, measure in TRANSFER_ROWS.items():
            if name in own:
                points = f"{100 * own[name]:.1f} points" if "gain" in name else f"{own[name]:.1%}"
                rows.append([title, given, measure, points])
                title = given = ""
    return rows


FOLDER: dict[str, str] = {
    "scratch": "`vitrail train folder`, from scratch",
    "weights": "the same with `--init classify`",
    "timm": "timm's ViT of the same width and depth, AdamW, for as long as the first row",
}
"""kinds of results/folder.json"""


def folder() -> list[list[str]]:
    """The recipe `folder` on a small folder, one column per seed."""
    found = _read("folder")
    if found is None:
        return [["training", "mean"]]
    runs = found["rows"]["runs"]
    rows = [["training", "parameters", *(f"seed {run['seed']}" for run in runs), "mean", "longest run, seconds"]]
    for kind, title in FOLDER.items():
        done = [run[kind] for run in runs]
        scores = [f"{run['top1']:.1%}" for run in done]
        slowest = f"{max(run['wall_seconds'] for run in done):.0f}"
        rows.append(
            [title, f"{done[0]['parameters']:,}", *scores, f"{found['rows'][f'{kind} mean top-1']:.1%}", slowest]
        )
    return rows


SEGMENTERS: dict[str, str] = {
    "ours": "`vitrail train segment`",
    "lraspp": "torchvision's `lraspp_mobilenet_v3_large`, for as long",
    "captioner": "fine-tuned from the captioner's encoder (`--init caption`)",
    "random": "that architecture from random weights, for as many steps",
}
"""kinds of results/camvid.json"""


def segment() -> list[list[str]]:
    """Segmenters on CamVid: mean over seeds of the scores on val."""
    rows = [["network", "seeds", "mIoU, whole images", "mIoU, windows", "pixels right", "steps", "minutes", "cores"]]
    found = _read("camvid")
    for kind, title in SEGMENTERS.items():
        own = found["rows"].get(kind) if found is not None else None
        if own is None:
            rows.append([title, "", "not measured", "", "", "", "", ""])
            continue
        runs = own.get("runs", [own])

        def cell(name: str, runs: list[Rows] = runs) -> str:
            values = [run[name] for run in runs]
            spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
            return f"{sum(values) / len(values):.1%}{spread}"

        minutes = max(run["seconds"] for run in runs) / 60
        last = [f"{runs[0]['steps']:,}", f"{minutes:.0f}", str(runs[0]["cores"])]
        rows.append([title, str(len(runs)), *map(cell, ("miou", "miou_windows", "pixel_accuracy")), *last])
    return rows


def bundled(name: str = "classify") -> list[list[str]]:
    """Scores of the bundled classifier or segmenter."""
    found = _read(name)
    rows = [["measure", "score"]]
    return rows + [[name, _plain(value)] for name, value in found["rows"].items()] if found else rows


def captioner() -> list[list[str]]:
    """Scores of the bundled captioner, of its captions for the wrong images, and of people's captions."""
    found = _read("caption")
    if found is None:
        return [["measure", "score"]]
    model = found["rows"]
    columns = {"bundled captioner": model, "shuffled images": model["captions of other images"]}
    columns["people"] = model["people"]
    measures = [name for name, value in model.items() if not isinstance(value, dict)]

    def cells(name: str) -> list[str]:
        return [_plain(column[name]) if name in column else "" for column in columns.values()]

    return [["measure", *columns], *([name, *cells(name)] for name in measures)]


CHOSEN: dict[str, str] = {
    "the likeliest": "log-probability alone",
    "with its match": "log-probability and match",
    "with the consensus": "log-probability and consensus",
    "with both": "all three",
}
"""how the bundled captioner chooses among its captions, by the names in results/caption.json"""


def choosing() -> list[list[str]]:
    """Scores of the bundled captioner by how it chooses among the captions that it finds."""
    rows, found = [["caption chosen by", "CIDEr", "BLEU-4", "length"]], _read("caption")
    if found is None or "chosen" not in found["rows"]:
        return rows
    ways = {**found["rows"]["chosen"], "with both": found["rows"]}
    return rows + [
        [CHOSEN[how], f"{row['cider']:.3f}", f"{row['bleu4']:.3f}", f"{row['length']:.1f}"] for how, row in ways.items()
    ]


def sure() -> list[list[str]]:
    """What tells right captions of the bundled captioner from others, and images that it knows from other photos."""
    rows = [["Flickr8k's validation split against", "images", "AUROC of match", "AUROC of likeness", "not sure"]]
    found = _rows("caption-match")
    if found is None:
        return rows

    def cell(row: Rows) -> str:
        return f"{row['auroc']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"

    own = found["right_against_swapped"]
    count = own["match"]["images"][0]
    rows.append(["nothing: its own images and captions", str(count), "", "", f"{own['not_sure']['right']:.0%}"])
    rows.append(["captions of other images", str(count), cell(own["match"]), "", f"{own['not_sure']['swapped']:.0%}"])
    for name, row in found["against_other_photos"].items():
        count = row["match"]["images"][1]
        rows.append([OTHERS[name], str(count), cell(row["match"]), cell(row["likeness"]), f"{row['not_sure']:.0%}"])
    return rows


OTHERS = {
    "photos": "photos of many kinds, of ImageNet",
    "hymenoptera": "ants and bees",
    "bccd": "blood cells under a microscope",
}
"""photos of other things, by the name of their folder"""


def runs() -> list[list[str]]:
    """Where and when each file under `results/` was made."""
    rows = [["file", "command", "commit", "machine", "date"]]
    for path in sorted((ROOT / "results").glob("*.json")):
        found = json.loads(path.read_text())
        commit = f"`{found['commit'][:10]}`" + (" with uncommitted changes" if found.get("changed") else "")
        link, command = f"[{path.name}](../results/{path.name})", f"`{found['command']}`"
        rows.append([link, command, commit, _plain(found["machine"]), found["date"][:10]])
    return rows


def recipes() -> list[list[str]]:
    """First paragraph and command of every recipe."""
    from vitrail.recipes import RECIPES

    rows = [["task", "command"]]
    for recipe in RECIPES.values():
        text = inspect.getdoc(recipe) or ""
        paragraph, _, rest = text.partition("\n\n")
        command = rest.partition("Command: ")[2].partition("\n")[0]
        rows.append([" ".join(paragraph.split()), f"`{command}`"])
    return rows


def sizes() -> list[list[str]]:
    """The named sizes, with the parameters of the encoder and of a head for 1000 classes."""
    import torch

    from vitrail.sizes import SIZES
    from vitrail.vit import Head, ViT

    rows = [["size", "width", "depth", "heads", "patch", "image", "parameters"]]
    for name, c in SIZES.items():
        with torch.device("meta"):
            modules = [ViT(c), Head(c.width, 1000)]
        count = sum(p.numel() for module in modules for p in module.parameters())
        image = f"{c.image_size[0]} × {c.image_size[1]}"
        numbers = [str(n) for n in (c.width, c.depth, c.heads, c.patch)]
        rows.append([f"`{name}`", *numbers, image, f"{count:,}"])
    return rows


PARITY = {"timm": "timm", "huggingface": "transformers", "torchvision": "torchvision"}
"""the libraries that `bench/parity.py` compares vitrail with, by the name of their results"""


def parity() -> list[list[str]]:
    """For each library: its release, how many models were compared, and the largest differences of all."""
    rows = [["library", "release", "models", "largest absolute difference", "largest relative difference", "commit"]]
    for name, library in PARITY.items():
        found = _read(f"parity-{name}")
        models = [*found["rows"].values()] if found else []
        columns = [", ".join(sorted({str(row[key])[:10] for row in models})) for key in ("release", "commit")]
        worst = [
            f"{max((max(_largest(row, kinds)) for row in models), default=0):.1e}" for kinds in (ABSOLUTE, RELATIVE)
        ]
        rows.append([library, columns[0], str(len(models)), *worst, columns[1]])
    return rows


ABSOLUTE, RELATIVE = ("tokens", "output"), ("relative",)


def _largest(row: Rows, kinds: tuple[str, ...]) -> list[float]:
    """The largest difference of each kind, at all sizes and in what was written."""
    places = [*row["sizes"].values(), *([row["written"]] if "written" in row else [])]
    return [max(place[kind] for place in places) for kind in kinds]


def compared(name: str) -> list[list[str]]:
    """For each model of a library: the sizes, and the largest differences over them."""
    found = _read(f"parity-{name}")
    models: Rows = found["rows"] if found else {}
    written = any("written" in row for row in models.values())
    rows = [["model", "sizes", "tokens", "output", "relative", *(["written and read again"] if written else [])]]
    for model, row in models.items():
        sizes = ", ".join(row["sizes"]) + (f"; {row['note']}" if row["note"] else "")
        worst = [f"{value:.1e}" if value else "0" for value in _largest(row, (*ABSOLUTE, *RELATIVE))]
        again = [("same weights" if row["same bits"] else "other weights")] if written else []
        rows.append([f"`{model}`", sizes, *worst, *again])
    return rows


LOAD: dict[str, str] = {
    "seconds after import torch, median": "time after `import torch`, median, s",
    "slowest": "time after `import torch`, slowest, s",
    "of the processor, median": "CPU time, median, s",
    "of these in vitrail.load, median": "CPU time in `vitrail.load`, median, s",
    "weights, MB": "size of the weights, MB",
    "copied, MB": "weights copied, MB",
    "while loading, MB": "extra memory while loading, MB",
    "beside the weights, MB": "extra memory after loading, MB",
}
"""measures of results/load.json"""


def load() -> list[list[str]]:
    """Time and memory of loading, one column per layout."""
    found = _read("load")
    if found is None:
        return [["measure", "result"]]
    layouts = found["rows"]
    headers = ["measure", *(f"{name} layout" for name in layouts)]
    return [headers, *([LOAD[name], *(_plain(row[name]) for row in layouts.values())] for name in LOAD)]


BEFORE = ("mlp-cifar10", "cnn-cifar10", "resnet-cifar10", "cifar10-quick")
BEFORE_DIGITS = ("rnn-digits", "gru-digits", "lstm-digits", "digits")
"""classifiers in the order of docs/ladder.md, the Vision Transformer last"""


def baselines() -> list[list[str]]:
    """What came before the Vision Transformer, and the Vision Transformer, on the same data."""
    header = ["recipe", "parameters", "test accuracy: mean (range), seeds, time of the whole command"]
    measured = {name: found["rows"] for name in (*BEFORE, *BEFORE_DIGITS) if (found := _read(name)) is not None}
    rows = [[f"`{name}`", f"{rows['runs'][0]['parameters']:,}", _seeds(rows)] for name, rows in measured.items()]
    return [header, *rows]


def trained(name: str) -> list[list[str]]:
    """Trainings of captioners, as `bench/ideas.py` gathered them, with their best scores on validation."""
    rows, found = [["command", "minutes", "CIDEr", "BLEU-4"]], _read(name)
    for run in found["rows"]["runs"] if found else []:
        scores = [f"{run[key]:.3f}" if key in run else "" for key in ("cider", "bleu4")]
        rows.append([f"`{run['command']}`", f"{run['minutes']:.0f}", *scores])
    return rows


def tried() -> list[list[str]]:
    """`trained` with the recipes of an earlier commit, whose commands no longer run."""
    (_, *header), *rows = trained("caption-tried")
    found = _read("caption-tried")
    title = f"recipe and options, at commit {found['commit'][:7]}" if found else "recipe and options"
    return [[title, *header], *([f"`{name[1:-1].removeprefix('vitrail train ')}`", *rest] for name, *rest in rows)]


LADDER: dict[str, str] = {
    "a": "a. CNN + RNN",
    "b": "b. CNN + LSTM",
    "c": "c. CNN + LSTM with attention",
    "d": "d. ViT + LSTM with attention",
    "e": "e. ViT + Transformer",
    "f": "f. e, after learning to match images with captions",
    "cifar10": "e, with an encoder trained on CIFAR-10 first",
}
"""rungs of `bench/ladder.py`, in order, with their titles"""


def earlier(rung: Rows) -> bool:
    """Whether a rung was measured with recipes that have changed since."""
    from vitrail.recipes import RECIPES

    return rung["recipes"] != [RECIPES[stage](6_000).fingerprint for stage in rung["stages"]]


def measured_rungs() -> dict[str, Rows]:
    """The rungs that have been measured, as `bench/ladder.py` wrote them."""
    found = {name: _read(f"ladder-{name}") for name in LADDER}
    measured = {name: each["rows"] for name, each in found.items() if each is not None and each["rows"]["runs"]}
    return {name: rows | {"title": LADDER[name]} for name, rows in measured.items()}


def ladder() -> list[list[str]]:
    """The rungs with the mean and range of their seeds on validation, and people."""
    columns = ["parameters", "of the encoder", "CIDEr", "BLEU-4", "epochs", "core minutes"]
    columns += ["learning rate ×", "CIDEr of the short trials"]
    rows = [["rung", "recipes", *columns, "seeds"]]
    for rung in measured_rungs().values():
        done = rung["runs"]

        def mean(key: str, done: list[Rows] = done) -> str:
            scores = [run[key] for run in done]
            spread = f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""
            return f"{sum(scores) / len(scores):.3f}{spread}"

        minutes = sum(run["training_seconds"] * run["cores"] for run in done) / len(done) / 60
        epochs = " + ".join(f"{done[0][key]:.1f}" for key in reversed(done[0]) if key.startswith("epochs"))
        tries = ", ".join(f"{tried['cider']:.3f}" for tried in rung["tries"])
        stages = ", ".join(f"`{stage}`" for stage in rung["stages"])
        stages += " of an earlier version" * earlier(rung)
        sizes = [f"{done[0]['parameters']:,}", "" if earlier(rung) else f"{_encoder_size(rung['stages'][-1]):,}"]
        scores = [mean("cider"), mean("bleu4"), epochs, f"{minutes:.0f}"]
        rows.append([rung["title"], stages, *sizes, *scores, f"{rung['rate']:g}", tries, str(len(done))])
    if len(rows) == 1:
        return [["rung", "CIDEr"], ["not measured", ""]]
    if (found := _read("caption")) is not None:
        people = found["rows"]["people"]
        scores = [f"{people[key]:.3f}" for key in ("cider", "bleu4")]
        rows.append(["people, each caption against the others", *[""] * 3, *scores, *[""] * 5])
    return rows


def _encoder_size(recipe: str) -> int:
    from vitrail.recipes import RECIPES
    from vitrail.tasks.encoder import encoder_for

    return sum(parameter.numel() for parameter in encoder_for(RECIPES[recipe](6000).model).parameters())


def ladder_commands() -> list[list[str]]:
    """The commands, for the first seed, of the rungs that were measured with today's recipes."""
    from vitrail.recipes import RECIPES

    rows = [["rung", "commands"]]
    for name, rung in measured_rungs().items():
        if earlier(rung):
            continue
        run, commands = rung["runs"][0], []
        for i, stage in enumerate(rung["stages"]):
            recipe = RECIPES[stage](6000)
            epochs = run["epochs" if stage == rung["stages"][-1] else f"epochs of {stage}"]
            rates = f"--lr {recipe.optim.lr * rung['rate']:g} --muon-lr {recipe.optim.muon_lr * rung['rate']:g}"
            init = f" --init runs/{rung['stages'][i - 1]}-{run['seed']}" if i else ""
            words = f"--epochs {epochs:g} --eval-every {epochs:g} {rates} --seed {run['seed']}"
            commands.append(f"`vitrail train {stage} --data {recipe.data} {words}{init}`")
        rows.append([name, ", ".join(commands)])
    return rows


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "results": results,
    "goals": goals,
    "bundled": bundled,
    "bundled-segment": partial(bundled, "segment"),
    "captioner": captioner,
    "choosing": choosing,
    "sure": sure,
    "ideas": partial(trained, "caption-ideas"),
    "tried": tried,
    "runs": runs,
    "recipes": recipes,
    "sizes": sizes,
    "parity": parity,
    **{f"parity-{name}": partial(compared, name) for name in PARITY},
    "baselines": baselines,
    "ladder": ladder,
    "ladder-commands": ladder_commands,
    "load": load,
    "transfer": transfer,
    "folder": folder,
    "segment": segment,
    "scale-tokens": lambda: scale_tables.tokens(_rows("scale")),
    "scale-devices": lambda: scale_tables.devices(_rows("scale")),
    "scale-shard": lambda: scale_tables.shard(_rows("shard-memory")),
    "scale-hosts": lambda: scale_tables.hosts(_rows("hosts")),
}


def fresh(text: str) -> str:
    """The text with fresh tables."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}: choose from {', '.join(TABLES)}")
        header, *rows = TABLES[name]()
        return match[1] + "".join(map(_line, [header, ["---"] * len(header), *rows])) + match[3]

    return MARKED.sub(table, text)


def pages() -> list[Path]:
    cards = sorted((ROOT / "src" / "vitrail" / "zoo" / "weights").glob("*/CARD.md"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *cards]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of README.md and docs/*.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 if a table is stale")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in pages():
        old = page.read_text()
        new = fresh(old)
        if new == old:
            continue
        stale += 1
        if not check:
            page.write_text(new)
        print(f"{page.relative_to(ROOT)}: {'stale, run `make tables`' if check else 'written'}", file=sys.stderr)
    return int(check and stale > 0)


def _read(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _rows(name: str) -> Rows | None:
    found = _read(name)
    return None if found is None else found["rows"]


def _line(cells: list[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |\n"


def _plain(value: Any) -> str:
    """A value as a cell shows it."""
    if isinstance(value, dict):
        return "; ".join(
            f"{name} ({_plain(each).replace(';', ',')})" if isinstance(each, dict) else f"{name} {_plain(each)}"
            for name, each in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
