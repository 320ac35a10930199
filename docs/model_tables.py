"""Tables of models: recipes, sizes, bundled weights, segmenters, loading, and the comparison with other libraries."""

from __future__ import annotations

import inspect

from table_data import Rows, plain, read, rows_of, seeds

SEGMENTERS: dict[str, str] = {
    "crops": "`vitrail train segment`",
    "ours": "the same, then the recipe `segment-whole`",
    "lraspp": "torchvision's `lraspp_mobilenet_v3_large`, for as long",
    "captioner": "fine-tuned from the captioner's encoder (`--init caption`)",
    "random": "that architecture from random weights, for as many steps",
}
"""kinds of results/camvid.json; crops: the first of the two commands of `ours`"""


def segment() -> list[list[str]]:
    """Segmenters on CamVid: mean over seeds of the scores on val, and the minutes of the quickest seed."""
    rows = [["network", "seeds", "mIoU, whole images", "mIoU, windows", "pixels right", "steps", "minutes", "cores"]]
    found = read("camvid")
    for kind, title in SEGMENTERS.items():
        own = found["rows"].get("ours" if kind == "crops" else kind) if found is not None else None
        if own is None:
            rows.append([title, "", "not measured", "", "", "", "", ""])
            continue
        runs = own.get("runs", [own])
        if kind == "crops":
            runs = [run["crops"] | {"cores": run["cores"]} for run in runs]

        def cell(name: str, runs: list[Rows] = runs) -> str:
            values = [run[name] for run in runs]
            spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
            return f"{sum(values) / len(values):.1%}{spread}"

        minutes = min(run["seconds"] for run in runs) / 60  # the others had less of a core
        if kind == "captioner":
            title += f", pretrained on captions for {_minutes_on_captions():.0f} minutes"
        last = [f"{runs[0]['steps']:,}", f"{minutes:.0f}", str(runs[0]["cores"])]
        rows.append([title, str(len(runs)), *map(cell, ("miou", "miou_windows", "pixel_accuracy")), *last])
    return rows


def exports() -> list[list[str]]:
    """Exports of bundled models with their scores on val, and of sizes with random weights."""
    rows = [["model", "export", "MB", "largest difference", "score of the model", "of the export", "images"]]
    for model, found in (rows_of("exports") or {}).items():
        for export, row in found.items():
            if "refused" in row:
                rows.append([f"`{model}`", export, "", f"not kept: {row['refused']}", "", "", ""])
                continue
            scores = row["scores"]
            told = ["random weights", "", ""]
            if scores is not None:
                apart = scores["export"] - scores["model"]
                other = f"{scores['export']:.4f} ({apart:+.4f})"
                told = [f"{scores['name']} {scores['model']:.4f}", other, f"{scores['images']:,}"]
            rows.append([f"`{model}`", export, f"{row['megabytes']:.1f}", f"{row['difference']:.2g}", *told])
    return rows


def engines() -> list[list[str]]:
    """Milliseconds of each engine for a batch, the fastest first, and how many times as fast as timm's eager it is."""
    found = rows_of("engines")
    if found is None:
        return [["engine"]]
    batches = list(found["ratios"])
    names = [key.rpartition(", ")[0] for key in found if key.endswith(f", {batches[0]}")]
    times = {name: [found[f"{name}, {batch}"]["milliseconds"] for batch in batches] for name in names}
    rows = [["engine", *(f"{batch}, ms" for batch in batches), *(f"{batch}, times timm's eager" for batch in batches)]]
    for name, own in sorted(times.items(), key=lambda entry: entry[1][-1]):
        ratios = (f"{eager / each:.2f}" for eager, each in zip(times["timm eager"], own, strict=True))
        rows.append([name, *(f"{each:.1f}" for each in own), *ratios])
    return rows


def _minutes_on_captions() -> float:
    """Of the training of the bundled captioner's encoder: its contrastive run, and the one that continues from it."""
    found = read("caption-ideas")
    assert found is not None, "results/caption-ideas.json is missing"
    runs = [
        run
        for run in found["rows"]["runs"]
        if "--out runs/match" in run["command"] or "--out runs/coca" in run["command"]
    ]
    return float(sum(run["minutes"] for run in runs))


def bundled(name: str = "classify") -> list[list[str]]:
    """Scores of the bundled classifier or segmenter."""
    found = read(name)
    rows = [["measure", "score"]]
    return rows + [[name, plain(value)] for name, value in found["rows"].items()] if found else rows


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


def encoders() -> list[list[str]]:
    """The recommended encoders, one row each, with the tasks that they are recommended for."""
    from vitrail import recommended

    by_task = {task: recommended.choice(task).encoders for task in recommended.tasks()}
    rows = [["source", "for", "parameters", "MB", "GB to train", "licence", "learned from"]]
    each = {encoder.id: encoder for own in by_task.values() for encoder in own}
    for encoder in sorted(each.values(), key=lambda encoder: (encoder.parameters, encoder.id)):
        tasks = ", ".join(task for task, own in by_task.items() if encoder in own)
        size = [f"{encoder.parameters:,}", f"{encoder.weights_mb:,.0f}", f"{encoder.train_gb:.1f}"]
        source = f"`{encoder.source}`" + " (unpinned)" * (encoder.revision is None)
        rows.append([source, tasks, *size, encoder.licence, encoder.learned])
    return rows


def formats() -> list[list[str]]:
    """What `vitrail.load` reads, by layout."""
    from vitrail import recommended

    return [["layout", "what is read"], *recommended.table()["formats"]]


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
        found = read(f"parity-{name}")
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
    found = read(f"parity-{name}")
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
    found = read("load")
    if found is None:
        return [["measure", "result"]]
    layouts = found["rows"]
    headers = ["measure", *(f"{name} layout" for name in layouts)]
    return [headers, *([LOAD[name], *(plain(row[name]) for row in layouts.values())] for name in LOAD)]


BEFORE = ("mlp-cifar10", "cnn-cifar10", "resnet-cifar10", "cifar10-quick")

BEFORE_DIGITS = ("rnn-digits", "gru-digits", "lstm-digits", "digits")
"""classifiers in the order of docs/ladder.md, the Vision Transformer last"""


def baselines() -> list[list[str]]:
    """What came before the Vision Transformer, and the Vision Transformer, on the same data."""
    header = ["recipe", "parameters", "test accuracy: mean (range), seeds, time of the whole command"]
    measured = {name: found["rows"] for name in (*BEFORE, *BEFORE_DIGITS) if (found := read(name)) is not None}
    rows = [[f"`{name}`", f"{rows['runs'][0]['parameters']:,}", seeds(rows)] for name, rows in measured.items()]
    return [header, *rows]
