"""Draw the figures of README and docs with the bundled weights and the files under `results/`.

    python docs/figures.py                       those that need no data set
    python docs/figures.py hero                  one of them
    python docs/figures.py words --data DIR      one that needs a data set: DIR holds `flickr8k/`, `photos/`, `camvid/`

`docs/gallery.md` shows each figure with its command. `page` also needs the browser chromium.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_tables import earlier, measured_rungs
from matplotlib.figure import Figure
from model_tables import BEFORE, BEFORE_DIGITS
from PIL import Image

import vitrail
from vitrail.data.captions import open_captions
from vitrail.data.masks import Masks
from vitrail.explain.command import explain
from vitrail.explain.explanation import explanation
from vitrail.explain.figures import draw_maps, png
from vitrail.explain.overlay import coloured, photo_of, spread, tinted
from vitrail.explain.packing import jpeg
from vitrail.explain.relevance import relevance
from vitrail.files import write_atomic
from vitrail.tasks.segment.figures import overlay, with_legend

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "src" / "vitrail" / "zoo" / "samples"
RETRIEVER = "photos/n02099267_flat-coated_retriever.JPEG"
COLUMNS = 4
GAP = 8
GROUND = "#17141f"
"""of the figure at the top, which stands on light and on dark pages"""


def attention() -> None:
    """The sample images, the relevance of their patches to the classifier's answers, and the answers."""
    task = vitrail.load("classify")
    paths = sorted(SAMPLES.glob("*.png"))
    figure = Figure(figsize=(1.35 * len(paths), 3.2), layout="compressed")
    axes = figure.subplots(2, len(paths))
    for column, path in enumerate(paths):
        image = Image.open(path)
        images = task.preprocess(image)[None]
        heat = relevance(task, {"image": images})[0].unflatten(0, task.features(images).grid)
        best = task.predict([image])[0].row()["labels"][0]
        photo = photo_of(task.preprocess.prepare(image).permute(1, 2, 0).numpy())
        axes[0, column].imshow(photo)
        axes[1, column].imshow(tinted(photo, spread(heat), (0, 0, 1, 1)))
        axes[1, column].set_title(f"{best['label']} {best['score']:.0%}", fontsize=9)
        for row in range(2):
            axes[row, column].set_axis_off()
    write_atomic(ROOT / "docs" / "relevance.png", png(figure, dpi=110))


def hero() -> None:
    """A photo, the class of each of its pixels, what speaks for three of them, and the colours of its patches.

    The photo is of scikit-learn's package, by danielbuechele (CC BY 2.0). The segmenter was trained on streets alone.
    """
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("china.jpg"))
    task = vitrail.load("segment")
    answer = task.predict([photo])[0]
    mask = answer.mask  # type: ignore[attr-defined]
    first = ", ".join(answer.text().split(", ")[:3])
    found = explanation(task, photo)
    pixels, frame = photo_of(found.arrays["image"]), found.facts["frame"]
    maps = dict(zip(found.facts["outputs"], torch.from_numpy(found.arrays["relevance_outputs"]).float(), strict=True))
    figure = Figure(figsize=(16, 9.55), facecolor=GROUND)
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 0.955}
    grid = figure.add_gridspec(2, 12, height_ratios=(2, 1), hspace=0.12, wspace=0.08, **edges)
    panels: list[tuple[Any, Any, str]] = [
        (grid[0, :6], photo, "a photo, unlike all that the model learned from"),
        (grid[0, 6:], overlay(photo, mask, len(task.classes)), f"vitrail predict --model segment: {first}"),
    ]
    for place, name in enumerate(("sky", "building", "tree")):
        shown = tinted(pixels, spread(maps[name]), frame)
        panels.append((grid[1, 3 * place : 3 * place + 3], shown, f"what speaks for {name}"))
    colours = torch.from_numpy(found.arrays["pca"]).float()
    panels.append((grid[1, 9:], coloured(pixels, colours, frame), "patches as panes of glass"))
    for spot, image, title in panels:
        axes = figure.add_subplot(spot)
        axes.imshow(image, aspect="auto")
        axes.set_axis_off()
        axes.set_title(title, fontsize=15, color="#f4f1fa", pad=9)
    write_atomic(ROOT / "docs" / "hero.jpg", as_jpeg(figure, 100))


def as_jpeg(figure: Figure, dpi: int, quality: int = 84) -> bytes:
    """A figure as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=dpi, pil_kwargs={"quality": quality, "optimize": True})
    return buffer.getvalue()


def page(data: Path) -> None:
    """The page of an explanation, as a browser shows it."""
    with tempfile.TemporaryDirectory() as folder:
        explain(vitrail.load("caption"), Image.open(data / RETRIEVER), Path(folder) / "seen")
        shot = Path(folder) / "page.png"
        words = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,800"]
        words += ["--virtual-time-budget=4000", f"--screenshot={shot}", f"file://{folder}/seen/index.html"]
        subprocess.run(["chromium", *words], check=True, capture_output=True)
        with Image.open(shot) as drawn:
            write_atomic(ROOT / "docs" / "explain-page.jpg", jpeg(np.asarray(drawn.convert("RGB"))))


def words(data: Path) -> None:
    """A photo, and under each word of its caption the patches that speak for it."""
    task = vitrail.load("caption")
    found = explanation(task, Image.open(data / RETRIEVER))
    maps = torch.from_numpy(found.arrays["relevance_outputs"])
    named = [(name.strip(), heat) for name, heat in zip(found.facts["outputs"], maps, strict=True)][:9]
    figure = draw_maps(photo_of(found.arrays["image"]), found.facts["frame"], named)
    with Image.open(io.BytesIO(png(figure, dpi=90))) as drawn:
        write_atomic(ROOT / "docs" / "explain-words.jpg", jpeg(np.asarray(drawn.convert("RGB"))))


def captions(data: Path) -> None:
    """24 validation images and 12 photos, chosen by a hash of their names, with the bundled captioner's captions."""
    task = vitrail.load("caption")
    val = open_captions(data / "flickr8k").val
    assert val is not None
    for name, paths, count in (("flickr8k", val.items, 24), ("photos", sorted((data / "photos").iterdir()), 12)):
        chosen = sorted(map(Path, paths), key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())[:count]
        written = [answer.text() for answer in task.predict([Image.open(path) for path in chosen])]
        write_atomic(ROOT / "docs" / f"captions-{name}.jpg", sheet(chosen, written))


def streets(data: Path) -> None:
    """Validation images of CamVid, their truth and the segmenter's answer: from the best to the worst of all."""
    data = data / "camvid"
    task, val = vitrail.load("segment"), Masks.open(data).val
    assert val is not None
    masks, images = Masks.of(val), [Image.open(data / key).convert("RGB") for key in val.keys]
    truths = [masks.read(i).indices for i in range(len(val))]
    found = [answer.mask for answer in task.predict(images)]  # type: ignore[attr-defined]
    right = [float((a == b)[b != masks.void].float().mean()) for a, b in zip(found, truths, strict=True)]
    order = sorted(range(len(val)), key=lambda i: -right[i])
    chosen = [order[round(share * (len(order) - 1))] for share in (0, 0.5, 0.9, 1)]
    width, height = images[0].size
    page = Image.new("RGB", (3 * width + 2 * GAP, len(chosen) * (height + GAP)), "white")
    for row, i in enumerate(chosen):
        truth, answer = (overlay(images[i], mask, len(masks.classes)) for mask in (truths[i], found[i]))
        for column, shown in enumerate((images[i], truth, answer)):
            page.paste(shown, (column * (width + GAP), row * (height + GAP)))
        print(f"{val.keys[i]}: {right[i]:.1%} of its pixels are right")
    figure = with_legend(page, list(enumerate(masks.classes)), len(masks.classes))
    figure.thumbnail((1200, 2400))
    buffer = io.BytesIO()
    figure.save(buffer, "JPEG", quality=85)
    write_atomic(ROOT / "docs" / "streets.jpg", buffer.getvalue())


def ladder() -> None:
    """CIDEr of the rungs that `bench/ladder.py` has measured, one dot per seed."""
    rungs = list(measured_rungs().values())
    if not rungs:
        return
    figure = Figure(figsize=(7, 0.9 + 0.45 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    for place, rung in enumerate(reversed(rungs)):
        scores = [run["cider"] for run in rung["runs"]]
        axes.barh(place, sum(scores) / len(scores), color="#9ecae1")
        axes.plot(scores, [place] * len(scores), "o", color="#08519c", markersize=4)
    titles = [rung["title"] + " (an earlier recipe)" * earlier(rung) for rung in reversed(rungs)]
    axes.set_yticks(range(len(rungs)), [textwrap.fill(title, 36) for title in titles])
    minutes = rungs[0]["budget"]["core_minutes"]
    axes.set_xlabel(f"CIDEr on the validation split after {minutes:g} minutes on one core")
    axes.spines[["top", "right"]].set_visible(False)
    write_atomic(ROOT / "docs" / "captioning-ladder.png", png(figure, dpi=110))


def baselines() -> None:
    """Accuracy over training time of the Vision Transformer and of earlier networks, one dot per seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, title, names in zip(figure.subplots(1, 2), ("CIFAR-10", "digits"), (BEFORE, BEFORE_DIGITS), strict=True):
        for name, mark in zip(names, "o+x^", strict=True):
            runs = json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]["runs"]
            minutes = [run["wall_seconds"] / 60 * run["cores"] for run in runs]
            axes.plot(minutes, [100 * run["top1"] for run in runs], mark, label=f"{name}, {runs[0]['parameters']:,}")
        axes.set(title=title, xlabel="minutes on one core", ylabel="test accuracy, %")
        axes.set_xlim(left=0)
        axes.legend(title="recipe, parameters", fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(ROOT / "docs" / "baselines.png", png(figure, dpi=110))


def sheet(paths: Sequence[Path], texts: Sequence[str]) -> bytes:
    """A JPEG of images in rows, each with its text below."""
    rows = -(-len(paths) // COLUMNS)
    figure = Figure(figsize=(2.3 * COLUMNS, 2.45 * rows), layout="constrained")
    for place, (path, text) in enumerate(zip(paths, texts, strict=True)):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        axes.imshow(Image.open(path).convert("RGB"))
        axes.set(xticks=[], yticks=[], frame_on=False)
        lines = textwrap.wrap(text.replace(" .", "\N{NO-BREAK SPACE}."), 34)  # no line of a full stop alone
        axes.set_xlabel("\n".join(lines), fontsize=8)  # which the layout makes room for
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=100, pil_kwargs={"quality": 80})
    return buffer.getvalue()


FREE: dict[str, Callable[[], None]] = {"hero": hero, "relevance": attention, "baselines": baselines, "ladder": ladder}
"""figures that need no data set, by name"""
OF_DATA: dict[str, Callable[[Path], None]] = {"words": words, "page": page, "captions": captions, "streets": streets}
"""figures that need one"""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", choices=[*FREE, *OF_DATA, []], help="by default, all that can be drawn")
    options.add_argument("--data", type=Path)
    return options


def main() -> None:
    args = parser().parse_args()
    for name in args.names or [*FREE, *(OF_DATA if args.data else ())]:
        if name in FREE:
            FREE[name]()
        elif args.data is None:
            raise SystemExit(f"{name} needs --data: a folder with flickr8k/, photos/ and camvid/")
        else:
            OF_DATA[name](args.data)


if __name__ == "__main__":
    main()
