"""What a model looks at, for one image: figures 6 and 7 of the paper, as numbers and as images.

The numbers come from `attention`, `positions`, `filters` and `words`, the images from them in `images`.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vitrail.data.decode import EncodedImage, Preprocess
from vitrail.data.pixels import doubt
from vitrail.errors import UserError
from vitrail.explain.attention import Pool, attention_distance, attention_maps, encoder_of, per_head, rollout
from vitrail.explain.figures import (
    draw_distance,
    draw_filters,
    draw_heads,
    draw_positions,
    draw_rollout,
    draw_words,
    png,
    shown_layers,
)
from vitrail.explain.filters import patch_filters
from vitrail.explain.positions import position_similarity
from vitrail.explain.words import words_looked
from vitrail.files import printable, write_whole
from vitrail.tasks.caption import Caption
from vitrail.tasks.task import Task
from vitrail.vit import PatchEmbedding

log = logging.getLogger("vitrail")

SHOWN = 320
"""pixels of the longer side of an image that is shown in its own shape"""

__all__ = [
    "attention_distance",
    "attention_maps",
    "encoder_of",
    "explain",
    "patch_filters",
    "per_head",
    "position_similarity",
    "rollout",
    "words_looked",
]


def explain(task: Task, image: Image.Image | str | Path, out: str | Path) -> dict[str, Any]:
    """Draw what the model makes of an image into the folder `out`.

    Writes `rollout.png`, `heads.png`, `positions.png`, `filters.png`, `distance.png`, for a captioner `words.png`, the
    numbers behind the attention in `numbers.json`, and `index.html`, which shows them. Returns `predictions` (labels
    and scores, best first), `values` or `caption` and `words`, `files` (name to path) and `notes` (what was left out,
    and why).
    A model that is neither a Vision Transformer nor a captioner, and a file that is no image, are UserErrors, and
    then nothing is written.
    """
    out = Path(out)
    source = "image" if isinstance(image, Image.Image) else str(image)
    opened = image if isinstance(image, Image.Image) else EncodedImage(Path(image))
    pixels = task.prepare(opened)
    if isinstance(opened, EncodedImage) and (found := doubt([opened.source])) is not None:
        log.warning(found)
    prepared = task.preprocess.normalise(pixels)[None]
    seen = Seen()
    if isinstance(task, Caption):
        task.eval()
        _words(seen, task, _as_it_is(task.preprocess, opened, pixels), prepared)
        try:
            _encoder(seen, task, pixels, prepared, seen.says["caption"])
        except UserError as error:
            seen.leave_out(f"the decoder's attention alone: {error}")
    else:
        answer = task.answers([pixels])[0]
        seen.says |= answer.row()
        _encoder(seen, task, pixels, prepared, printable(answer.text()))

    files = {name: png(figure) for name, figure in seen.figures.items()}
    files["numbers.json"] = json.dumps({**seen.says, **seen.numbers, "notes": seen.notes}).encode()
    files["index.html"] = printable(_page(source, seen.says, list(seen.figures), seen.notes)).encode()
    for name, data in files.items():
        write_whole(out / name, data)
    return {**seen.says, "files": {name: str(out / name) for name in files}, "notes": seen.notes}


@dataclass
class Seen:
    """What there is to show of a model and an image."""

    says: dict[str, Any] = field(default_factory=dict)
    """the model's answer"""
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, note: str) -> None:
        """Say why something is missing."""
        self.notes.append(note)
        log.warning(note)


def _words(seen: Seen, task: Caption, image: Tensor, prepared: Tensor) -> None:
    """The caption, and where its decoder looked."""
    seen.says["caption"], words = words_looked(task, prepared)
    seen.says["words"] = [{"text": word.text, "p": word.p} for word in words]
    drawn = [(word.text, word.p, word.heat) for word in words if word.heat is not None]
    if drawn:
        seen.figures["words.png"] = draw_words(image, drawn)
        seen.numbers["looked"] = [_rounded(heat.tolist()) for _, _, heat in drawn]
    else:
        seen.leave_out("no words.png: this decoder sees the image once, as a whole, and has no attention over it")


def _as_it_is(preprocess: Preprocess, image: Image.Image | EncodedImage, fitted: Tensor) -> Tensor:
    """The image in its own shape where the model sees all of it, squashed; or else what the model sees of it."""
    if preprocess.resize != "squash" or preprocess.crop_fraction < 1:
        return fitted
    if isinstance(image, Image.Image):
        height, width = image.height, image.width
    else:
        height, width = image.measure(preprocess.channels)
    scale = min(1, SHOWN / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return replace(preprocess, size=size).prepare(image)


def _encoder(seen: Seen, task: Task, image: Tensor, prepared: Tensor, title: str) -> None:
    """The figures of the paper."""
    encoder = encoder_of(task)
    config = encoder.config
    prefix = encoder.config.prefix_tokens
    # Other kinds of pooling read all patches, as the average does.
    pool: Pool = "token" if config.pool in ("token", "distilled", "token_average") else "average"
    grid = (prepared.shape[2] // config.patch, prepared.shape[3] // config.patch)
    maps = attention_maps(task, prepared)
    heat = rollout(maps, prefix, pool)[0].unflatten(0, grid)
    layers = shown_layers(len(maps))
    rows = [per_head(maps, prefix, pool, layer)[0].unflatten(1, grid) for layer in layers]
    distances = attention_distance(maps, grid, config.patch)
    plain = type(encoder.patches) is PatchEmbedding
    kind = "principal components of the patch projection" if plain else "first filters of the first convolution"
    seen.figures |= {
        "rollout.png": draw_rollout(image, heat, title),
        "heads.png": draw_heads(image, rows, [layer + 1 for layer in layers]),
        "distance.png": draw_distance(distances, math.hypot(*prepared.shape[2:])),
        "filters.png": draw_filters(patch_filters(encoder), kind),
    }
    if config.positions == "none":
        seen.leave_out("no positions.png: this model has no positions")
    else:
        seen.figures["positions.png"] = draw_positions(position_similarity(encoder))
    seen.numbers |= {
        "grid": grid,
        "patch": config.patch,
        "prefix_tokens": prefix,
        "pool": pool,
        "rollout": _rounded(heat.tolist()),
        "heads": {str(layer + 1): _rounded(row.tolist()) for layer, row in zip(layers, rows, strict=True)},
        "attention_distance": _rounded(distances.tolist()),
    }


def _rounded(values: Any) -> Any:
    """Nested lists with numbers of five digits."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")


SAYS = {
    "words.png": "Where the decoder looked when it chose each word, bright where it looked most, and how likely it "
    "held the word.",
    "rollout.png": "The image, the same darkened where little attention goes, and attention rollout: the attention "
    "of all layers multiplied together, with the residual paths (figure 6 of the paper).",
    "heads.png": "What each head takes from each patch, a row a layer, bright where it takes most. "
    "Early heads mostly look nearby or everywhere, late ones at things.",
    "distance.png": "How far each head looks on average. Low points are heads that act like small convolutions.",
    "filters.png": "What the first layer looks for in the pixels.",
    "positions.png": "How alike the positions are. Each tile stands at its patch's place and compares that patch's "
    "position with all others; a trained model shows rows and columns.",
}


def _page(source: str, says: dict[str, Any], names: list[str], notes: list[str]) -> str:
    rows = "".join(f"<tr><td>{escape(row['label'])}<td>{row['score']:.1%}" for row in says.get("labels", ()))
    rows += "".join(f"<tr><td>{escape(row['name'])}<td>{row['value']:.4g}" for row in says.get("values", ()))
    rows += "".join(f"<tr><td dir=auto>{escape(row['text'])}<td>{row['p']:.1%}" for row in says.get("words", ()))
    caption = f"<h2 dir=auto>{escape(says['caption'])}</h2>" if "caption" in says else ""
    order = [name for name in SAYS if name in names]
    figures = "".join(
        f'<figure><img src="{name}" alt="{name}"><figcaption>{SAYS[name]}</figcaption></figure>' for name in order
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What the model looks at</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }}
figure {{ margin: 2.5rem 0 }} img {{ max-width: 100% }} figcaption, .note {{ color: #555 }}
td {{ padding: .1rem 1.5rem .1rem 0 }} td + td {{ text-align: right; font-variant-numeric: tabular-nums }}
</style>
<h1>What the model looks at</h1>
<p>{escape(source)}</p>
{caption}
<table>{rows}</table>
{figures}
{"".join(f'<p class="note">{escape(note)}</p>' for note in notes)}
<p class="note">The numbers are in <a href="numbers.json">numbers.json</a>.</p>
</html>
"""
