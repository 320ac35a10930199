"""`vitrail explain`: the files of an explanation."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vitrail.data.decode import EncodedImage
from vitrail.data.pixels import Doubts
from vitrail.explain.explanation import Explanation, explanation, spaced
from vitrail.explain.figures import (
    draw_colours,
    draw_distance,
    draw_filters,
    draw_heads,
    draw_maps,
    draw_nearest,
    draw_norms,
    draw_positions,
    draw_similarity,
    draw_words,
    png,
)
from vitrail.explain.image import shown_image, three_channels
from vitrail.explain.overlay import Pixels, photo_of
from vitrail.explain.packing import Array
from vitrail.explain.page import page
from vitrail.files import refuse_existing, refuse_file_name, write_atomic
from vitrail.tasks.task import Task

log = logging.getLogger("vitrail")

DEFAULT = "relevance"
"""the map that the page shows at first: the most faithful one of results/faithfulness.json"""
LAYERS = 6
"""rows of the figure of heads"""
COMPARED = 3
"""patches whose similarity is drawn"""

SAYS = {
    "relevance.png": "Relevance: how much each patch speaks for the answer, and for each output that it consists of: "
    "attention weighted by its gradient, through all layers (arXiv 2103.15679).",
    "words.png": "Words: the model's attention for each piece of its answer, and the probability of the piece.",
    "rollout.png": "Attention rollout: the attention of all layers multiplied together, with the residual paths "
    "(figure 6 of the paper).",
    "heads.png": "Heads: attention of each head to each patch, one row per layer. Early heads mostly attend nearby or "
    "everywhere, late heads to objects.",
    "pca.png": "Colours: patches with similar tokens have similar colours: three principal components.",
    "similarity.png": "Similarity: patches whose tokens are like that of one patch, for the three most relevant "
    "patches that lie apart.",
    "norms.png": "Norms: lengths of the tokens by layer. A few patches with a much longer token serve the model as "
    "registers, and say little about their place (arXiv 2309.16588).",
    "distance.png": "Attention distance: mean distance between a patch and what it attends to, for each head. Heads "
    "with a low distance act like small convolutions.",
    "positions.png": "Positions: similarity of the position embeddings. Each tile is at its patch's place and compares "
    "it with all others; a trained model shows rows and columns.",
    "filters.png": "Filters: those of the first layer.",
    "nearest.png": "Nearest images: those of the folder whose vectors are the most similar, by cosine similarity.",
}
"""what each figure shows, by file name: a title, and the rest"""
FILES = (*SAYS, "numbers.json", "arrays.npz", "index.html")


def explain(
    task: Task,
    image: Image.Image | str | Path,
    out: str | Path,
    beside: str | Path | None = None,
    gallery: Sequence[Path] = (),
) -> dict[str, Any]:
    """Explain a model's answer for an image in the folder `out`.

    Writes a PNG per figure (see `SAYS`), the answer and what the arrays are in `numbers.json`, the arrays in
    `arrays.npz`, and `index.html`, one page that shows them all and loads nothing else. `beside` is an image whose
    patches are compared with those of the first; the nearest images are found in `gallery`. Returns what
    `Prediction.row` gives, `text` (the answer in words), `files` (name to path) and `notes` (what is missing, with the
    reason). Raises UserError, and writes nothing, for an export or a file that is not an image.
    """
    out = Path(out)
    source = "image" if isinstance(image, Image.Image) else str(image)
    opened = image if isinstance(image, Image.Image) else EncodedImage(Path(image))
    found = explanation(task, opened, None if beside is None else EncodedImage(Path(beside)), gallery)
    doubts = Doubts([opened.source]).text() if isinstance(opened, EncodedImage) else None
    for note in [*([] if doubts is None else [doubts]), *found.notes]:
        log.warning(note)
    files = {name: png(figure) for name, figure in _figures(task, found).items()}
    page_bytes = page(found, source, files, SAYS, DEFAULT)
    files["numbers.json"] = json.dumps(numbers(found)).encode()
    files["arrays.npz"] = _npz(found.arrays)
    files["index.html"] = page_bytes
    for name, data in files.items():
        write_atomic(out / name, data)
    paths = {name: str(out / name) for name in files}
    return {**found.row, "text": found.text, "files": paths, "notes": found.notes}


def refuse_out(out: Path) -> None:
    """Raise UserError unless the folder `out` can take all files of an explanation without overwriting any."""
    refuse_file_name(out, "choose a folder without an ending for the figures")
    for name in FILES:
        refuse_existing(out / name)


def numbers(found: Explanation) -> dict[str, Any]:
    """What `numbers.json` holds: the answer, the facts, and the maps of the image that are small."""
    arrays = {name: {"shape": list(array.shape), "type": str(array.dtype)} for name, array in found.arrays.items()}
    shown = ("relevance", "relevance_outputs", "words", "rollout", "distance")
    small = {name: _rounded(array.tolist()) for name, array in found.arrays.items() if name in shown}
    return {**found.row, **found.facts, **small, "arrays": arrays, "notes": found.notes}


def _rounded(values: Any) -> Any:
    """Nested lists with numbers of five significant digits."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")


def _npz(arrays: dict[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _figures(task: Task, found: Explanation) -> dict[str, Figure]:
    """The figures by file name, in the order of `SAYS`."""
    arrays, facts = found.arrays, found.facts
    tensors = {name: torch.from_numpy(np.asarray(array, dtype=np.float32)) for name, array in arrays.items()}
    photo, frame = photo_of(arrays["image"]), facts["frame"]
    drawn: dict[str, Figure] = {}
    if "relevance" in tensors:
        each = zip(facts.get("outputs", []), tensors.get("relevance_outputs", []), strict=True)
        maps = [(name.strip(), heat) for name, heat in each]
        if not any(torch.allclose(heat, tensors["relevance"]) for _, heat in maps):  # one output may be the answer
            maps.insert(0, ("the answer", tensors["relevance"]))
        drawn["relevance.png"] = draw_maps(photo, frame, maps, found.text)
    if "words" in tensors:
        words = [(piece["text"], piece["p"]) for piece in facts["pieces"]]
        each_word = [(*word, heat) for word, heat in zip(words, tensors["words"], strict=True)]
        drawn["words.png"] = draw_words(photo, frame, each_word)
    if "rollout" in tensors:
        height, width = task.preprocess.size
        layers = spaced(len(tensors["heads"]), LAYERS)
        kept = [tensors["heads"][layer] for layer in layers]
        outlying = torch.from_numpy(arrays["outliers"])
        drawn |= {
            "rollout.png": draw_maps(photo, frame, [("rollout", tensors["rollout"])]),
            "heads.png": draw_heads(photo, frame, kept, [layer + 1 for layer in layers]),
            "norms.png": draw_norms(photo, frame, tensors["norms"], tensors.get("norms_prefix"), outlying),
            "distance.png": draw_distance(tensors["distance"], float(np.hypot(height, width))),
            "filters.png": draw_filters(tensors["filters"], facts["filters"]),
        }
    if "positions" in tensors:
        drawn["positions.png"] = draw_positions(tensors["positions"])
    drawn |= _of_tokens(found, tensors, photo)
    if "nearest" in facts:
        others = [(_photo_at(task, row["image"]), Path(row["image"]).name, row["score"]) for row in facts["nearest"]]
        drawn["nearest.png"] = draw_nearest(photo, others)
    return drawn


def _of_tokens(found: Explanation, tensors: dict[str, Tensor], photo: Pixels) -> dict[str, Figure]:
    """The colours of the patches and their similarity, also with the other image."""
    arrays, facts = found.arrays, found.facts
    if "pca" not in tensors:
        return {}
    photos = {"": (photo, facts["frame"], facts["grid"])}
    if "image_beside" in arrays:
        photos["_beside"] = (photo_of(arrays["image_beside"]), facts["frame_beside"], facts["grid_beside"])
    shown = [(their, at, tensors[f"pca{name}"]) for name, (their, at, _) in photos.items()]
    drawn = {"pca.png": draw_colours(shown, facts["pca_shares"])}
    if "relevance" in tensors:
        (height, width), block = facts["grid"], facts["block"]
        rows = []
        for patch in _apart(tensors["relevance"]):
            cell = patch // width // block * -(-width // block) + patch % width // block
            maps = []
            for name, (their, (left, top, right, bottom), (down, across)) in photos.items():
                # Blocks at the edge may reach beyond the image.
                cells = (-(-down // block), -(-across // block))
                wide, high = cells[1] * block / across, cells[0] * block / down
                at = (left, top, left + (right - left) * wide, top + (bottom - top) * high)
                maps.append((their, at, tensors[f"similarity{name}"][cell].unflatten(0, cells)))
            rows.append((patch, maps))
        drawn["similarity.png"] = draw_similarity(photo, facts["frame"], (height, width), rows)
    return drawn


def _apart(heat: Tensor) -> list[int]:
    """The numbers of the strongest patches of a map [h, w] that lie at least a quarter of the grid apart."""
    rows, columns = heat.shape
    far, chosen = max(rows, columns) / 4, list[int]()
    for patch in heat.flatten().argsort(descending=True, stable=True).tolist():
        at = divmod(patch, columns)
        if all(np.hypot(at[0] - a, at[1] - b) >= far for a, b in (divmod(other, columns) for other in chosen)):
            chosen.append(patch)
        if len(chosen) == COMPARED:
            break
    return chosen


def _photo_at(task: Task, path: str) -> Pixels:
    return photo_of(three_channels(shown_image(task, task.preprocess.open(path))).numpy())
