"""What a model looks at, for one picture: figures 6 and 7 of the paper, as numbers and as pictures.

The numbers come from `attention`, `positions` and `filters`, the pictures from them in `pictures`.
"""

from __future__ import annotations

import json
import logging
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vitrail.data.decode import decode
from vitrail.explain.attention import Pool, attention_distance, attention_maps, encoder_of, per_head, rollout
from vitrail.explain.filters import patch_filters
from vitrail.explain.pictures import (
    draw_distance,
    draw_filters,
    draw_heads,
    draw_positions,
    draw_rollout,
    png,
    shown_layers,
)
from vitrail.explain.positions import position_similarity
from vitrail.files import write_whole

if TYPE_CHECKING:
    from vitrail.tasks.task import Task

log = logging.getLogger("vitrail")

__all__ = [
    "attention_distance",
    "attention_maps",
    "encoder_of",
    "explain",
    "patch_filters",
    "per_head",
    "position_similarity",
    "rollout",
]


def explain(task: Task, image: Image.Image | str | Path, out: str | Path) -> dict[str, Any]:
    """Draw what the model makes of a picture into the folder `out`.

    Writes `rollout.png`, `heads.png`, `positions.png`, `filters.png`, `distance.png`, the numbers behind the attention
    in `numbers.json`, and `index.html`, which shows them. Returns `predictions` (labels and scores, best first),
    `files` (name to path) and `notes` (what was left out, and why). A model that is no Vision Transformer, and a file
    that is no picture, are UserErrors, and then nothing is written.
    """
    encoder = encoder_of(task)
    config, out = encoder.config, Path(out)
    source = "picture" if isinstance(image, Image.Image) else str(image)
    pixels = image if isinstance(image, Image.Image) else decode(Path(image), task.preprocess.channels)
    labels = task.predict([pixels])[0].labels
    picture = task.preprocess.fit(pixels)
    prepared = task.preprocess.normalise(picture)[None]

    prefix = encoder.prefix_tokens
    # Other kinds of pooling read all patches, as the average does.
    pool: Pool = "token" if config.pool in ("token", "distilled", "token_average") else "average"
    grid = (prepared.shape[2] // config.patch, prepared.shape[3] // config.patch)
    maps = attention_maps(task, prepared)
    heat = rollout(maps, prefix, pool)[0].unflatten(0, grid)
    layers = shown_layers(len(maps))
    rows = [per_head(maps, prefix, pool, layer)[0].unflatten(1, grid) for layer in layers]
    distances = attention_distance(maps, grid, config.patch)

    title = f"{labels[0]['label']} ({labels[0]['score']:.0%})" if labels else ""
    kind = "first filters of the stem" if config.stem else "principal components of the patch projection"
    figures = {
        "rollout.png": draw_rollout(picture, heat, title),
        "heads.png": draw_heads(picture, rows, [layer + 1 for layer in layers]),
        "distance.png": draw_distance(distances, math.hypot(*prepared.shape[2:])),
        "filters.png": draw_filters(patch_filters(encoder), kind),
    }
    notes = []
    if config.positions == "none":
        notes.append("no positions.png: this model has no positions")
        log.warning(notes[-1])
    else:
        figures["positions.png"] = draw_positions(position_similarity(encoder))

    numbers = {
        "predictions": labels,
        "grid": grid,
        "patch": config.patch,
        "prefix_tokens": prefix,
        "pool": pool,
        "rollout": _rounded(heat.tolist()),
        "heads": {str(layer + 1): _rounded(row.tolist()) for layer, row in zip(layers, rows, strict=True)},
        "attention_distance": _rounded(distances.tolist()),
        "notes": notes,
    }
    files = {name: png(figure) for name, figure in figures.items()}
    files["numbers.json"] = json.dumps(numbers).encode()
    files["index.html"] = _page(source, labels, list(figures), notes).encode()
    for name, data in files.items():
        write_whole(out / name, data)
    return {"predictions": labels, "files": {name: str(out / name) for name in files}, "notes": notes}


def _rounded(values: Any) -> Any:
    """Nested lists with numbers of five digits."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")


SAYS = {
    "rollout.png": "The picture, the same darkened where little attention goes, and attention rollout: the attention "
    "of all layers multiplied together, with the residual paths (figure 6 of the paper).",
    "heads.png": "What each head takes from each patch, a row a layer, bright where it takes most. "
    "Early heads mostly look nearby or everywhere, late ones at things.",
    "distance.png": "How far each head looks on average. Low points are heads that act like small convolutions.",
    "filters.png": "What the first layer looks for in the pixels.",
    "positions.png": "How alike the positions are. Each tile stands at its patch's place and compares that patch's "
    "position with all others; a trained model shows rows and columns.",
}


def _page(source: str, labels: list[dict[str, Any]], names: list[str], notes: list[str]) -> str:
    rows = "".join(f"<tr><td>{escape(row['label'])}<td>{row['score']:.1%}" for row in labels)
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
<table>{rows}</table>
{figures}
{"".join(f'<p class="note">{escape(note)}</p>' for note in notes)}
<p class="note">The numbers are in <a href="numbers.json">numbers.json</a>.</p>
</html>
"""
