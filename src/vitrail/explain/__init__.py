"""A model's attention on one image: figures 6 and 7 of the paper, as numbers and as images.

`attention`, `positions`, `filters` and the task compute the numbers; `figures` draws them.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vitrail.data.decode import EncodedImage
from vitrail.data.pixels import Doubts
from vitrail.data.preprocess import Preprocess
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
from vitrail.files import printable, refuse_existing, refuse_file_name, write_whole
from vitrail.tasks.answers import numbered_by_pixels
from vitrail.tasks.task import Task
from vitrail.tasks.values import Piece
from vitrail.vit import PatchEmbedding

log = logging.getLogger("vitrail")

SHOWN = 320
"""longer side in pixels of an image that is shown in its original shape"""

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
    """Explain a model's prediction for an image in the folder `out`.

    Writes `rollout.png`, `heads.png`, `positions.png`, `filters.png`, `distance.png`, for a task that answers piece by
    piece `words.png`, the answer and the numbers of the attention in `numbers.json`, and `index.html`, which shows them
    all. Returns what `Prediction.row` gives, `pieces` if there are any, `files` (name to path) and `notes` (missing
    figures, with the reason). Raises UserError, and writes nothing, if the model is neither a Vision Transformer nor
    answers in pieces, or if the file is not an image.
    """
    out = Path(out)
    source = "image" if isinstance(image, Image.Image) else str(image)
    opened = image if isinstance(image, Image.Image) else EncodedImage(Path(image))
    sample = task.prepare(opened)
    pixels = sample.images[0]
    if (frames := len(sample.images)) > 1:
        log.warning(f"the model reads this image in {frames} frames: the figures show the first")
    if isinstance(opened, EncodedImage) and (found := Doubts([opened.source]).text()) is not None:
        log.warning(found)
    answer = task.answers([sample])[0]
    prepared = task.preprocess.normalise(pixels)[None]
    seen = Seen(answer.row())
    pieces = _pieces(task, prepared)
    if pieces:
        _draw_pieces(seen, pieces, _unsquashed(task.preprocess, opened, pixels))
    try:
        _encoder(seen, task, pixels, prepared, printable(answer.text()))
    except UserError as error:
        if not pieces:
            raise
        seen.leave_out(f"no figures of the encoder: {error}")

    files = {name: png(figure) for name, figure in seen.figures.items()}
    files["numbers.json"] = json.dumps({**seen.says, **seen.numbers, "notes": seen.notes}).encode()
    files["index.html"] = printable(_page(source, answer.text(), seen)).encode()
    for name, data in files.items():
        write_whole(out / name, data)
    return {**seen.says, "files": {name: str(out / name) for name in files}, "notes": seen.notes}


def refuse_out(out: Path) -> None:
    """Raise UserError unless the folder `out` can take all files of an explanation without overwriting any."""
    refuse_file_name(out, "choose a folder without an ending for the figures")
    for name in (*SAYS, "numbers.json", "index.html"):
        refuse_existing(out / name)


@dataclass
class Seen:
    """The figures and numbers for a model and an image."""

    says: dict[str, Any] = field(default_factory=dict)
    """the model's answer"""
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, note: str) -> None:
        """Note why something is missing."""
        self.notes.append(note)
        log.warning(note)


@torch.inference_mode()
def _pieces(task: Task, prepared: Tensor) -> list[Piece]:
    """The pieces of the answer for one normalised image [1, C, H, W]; empty if the task does not answer in pieces."""
    device = next(task.parameters()).device
    sample = torch.tensor([numbered_by_pixels(prepared[0])], device=device)
    found = task.pieces({"image": prepared.to(device), "sample": sample})
    return found[0] if found else []


def _draw_pieces(seen: Seen, pieces: list[Piece], image: Tensor) -> None:
    """Each piece of the answer, with its attention over the image."""
    seen.says["pieces"] = [{"text": piece.text, "p": piece.p} for piece in pieces]
    drawn = [(piece.text, piece.p, piece.heat) for piece in pieces if piece.heat is not None]
    if drawn:
        seen.figures["words.png"] = draw_words(image, drawn)
        seen.numbers["attention"] = [_rounded(heat.tolist()) for _, _, heat in drawn]
    else:
        seen.leave_out("no words.png: this model reads the image once, as a whole, and then has no attention over it")


def _unsquashed(preprocess: Preprocess, image: Image.Image | EncodedImage, fitted: Tensor) -> Tensor:
    """The original image if the model sees all of it, squashed; otherwise the crop that the model sees."""
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
    # Other kinds of pooling read all patches, like the average.
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
    """Nested lists with numbers of five significant digits."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")


SAYS = {
    "words.png": "The model's attention for each piece of its answer (bright: high), and the probability of the piece.",
    "rollout.png": "The image, the image darkened where attention is low, and attention rollout: the attention "
    "of all layers multiplied together, with the residual paths (figure 6 of the paper).",
    "heads.png": "Attention of each head to each patch, one row per layer (bright: high). "
    "Early heads mostly attend nearby or everywhere, late heads to objects.",
    "distance.png": "Mean attention distance of each head. Heads with a low distance act like small convolutions.",
    "filters.png": "The filters of the first layer.",
    "positions.png": "Similarity of the position embeddings. Each tile is at its patch's place and compares it "
    "with all others; a trained model shows rows and columns.",
}


def _page(source: str, answer: str, seen: Seen) -> str:
    tables = "".join(_table(rows) for rows in seen.says.values() if _is_table(rows))
    order = [name for name in SAYS if name in seen.figures]
    figures = "".join(
        f'<figure><img src="{name}" alt="{name}"><figcaption>{SAYS[name]}</figcaption></figure>' for name in order
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What the model attends to</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }}
figure {{ margin: 2.5rem 0 }} img {{ max-width: 100% }} figcaption, .note {{ color: #555 }}
table {{ margin: 1rem 0 }} td, th {{ padding: .1rem 1.5rem .1rem 0; text-align: left }}
th {{ color: #555; font-weight: 400 }} td + td, th + th {{ text-align: right; font-variant-numeric: tabular-nums }}
</style>
<h1>What the model attends to</h1>
<p>{escape(source)}</p>
<h2 dir=auto>{escape(answer)}</h2>
{tables}
{figures}
{"".join(f'<p class="note">{escape(note)}</p>' for note in seen.notes)}
<p class="note">The numbers are in <a href="numbers.json">numbers.json</a>.</p>
</html>
"""


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = "".join(
        f"<tr>{''.join(f'<td dir=auto>{escape(_cell(value))}' for value in row.values() if _is_cell(value))}"
        for row in rows
    )
    head = "".join(f"<th>{escape(name)}" for name, value in rows[0].items() if _is_cell(value))
    return f"<table><tr>{head}{lines}</table>\n"


def _is_cell(value: Any) -> bool:
    """Whether a value of an answer's rows is text or a number."""
    return isinstance(value, str | int | float)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
