"""Everything that a page shows for a model and an image, as plain numbers: no figure, and bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.prepare import Sample
from vitrail.data.preprocess import AnyImage
from vitrail.errors import UserError
from vitrail.explain.attention import attention_distance, from_patches, per_head, rollout
from vitrail.explain.filters import patch_filters
from vitrail.explain.image import ExplainedImage, explained_image
from vitrail.explain.lens import layer_by_layer
from vitrail.explain.packing import Array, jpeg_url, packed
from vitrail.explain.positions import position_similarity
from vitrail.explain.relevance import relevance
from vitrail.explain.tokens import nearest, outliers, patch_similarity, pca_colours, token_norms
from vitrail.explain.trace import Pause, Trace, image_tokens, no_pause, trace
from vitrail.ops import Grid
from vitrail.tasks.answers import numbered_by_pixels
from vitrail.tasks.encoder import one_vector
from vitrail.tasks.exported import Exported, refuse
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch
from vitrail.vit import PatchEmbedding, Tokens

T = TypeVar("T")

VALUES = 6_000_000
"""numbers of the attention between all patches that an explanation holds, and of the similarity of patches"""
ROLLED = 1_024
"""patches of a large image: for more, rollout is not computed for each, which takes the third power of the number"""
MATRICES = 4
"""matrices between all patches that fit in `VALUES`: otherwise neighbouring patches are joined to blocks"""
OUTPUTS = 24
"""outputs of an answer whose relevance is computed, such as the words of a caption"""
GALLERY = 32
"""images of a gallery that pass through the encoder at once"""


@dataclass
class Explanation:
    """What is known about a model's answer for an image. `arrays` are on the CPU."""

    row: dict[str, Any]
    """the answer, as `Prediction.row` gives it"""
    text: str
    """the answer in one line"""
    facts: dict[str, Any] = field(default_factory=dict)
    """plain data: sizes, and what the rows of the arrays are (see docs/explain.md)"""
    arrays: dict[str, Array] = field(default_factory=dict)
    """by name: see docs/explain.md"""
    notes: list[str] = field(default_factory=list)
    """what is missing, with the reason"""

    def packed(self) -> dict[str, Any]:
        """All of it as plain data for JSON: arrays in 8 bits and base64, as `packed` describes, and images as JPEG."""
        shown = ("image", "image_beside")
        images: dict[str, Any] = {name: jpeg_url(self.arrays[name]) for name in shown if name in self.arrays}
        arrays = {name: packed(array) for name, array in self.arrays.items() if name not in images}
        return {"answer": self.row, "text": self.text, **self.facts, **images, "arrays": arrays, "notes": self.notes}


def explanation(
    task: Task,
    image: AnyImage | ExplainedImage,
    beside: AnyImage | ExplainedImage | None = None,
    gallery: Sequence[Path] = (),
    values: int = VALUES,
    of_class: str | None = None,
    outputs_of_large: int = OUTPUTS,
    pause: Pause = no_pause,
) -> Explanation:
    """Explain a task's answer for an image (see docs/explain.md for the arrays).

    Args:
        image: what `explained_image` takes, or what it gives.
        beside: another image, whose patches are compared with those of the first.
        gallery: files among which the nearest are found.
        values: about how many numbers of the attention between all patches are kept: of a large model some layers, or
            the mean over heads; of a large image, blocks of neighbouring patches stand for them.
        of_class: a class whose relevance is computed too, whether or not it belongs to the answer.
        outputs_of_large: outputs whose relevance is computed for an image of more than `ROLLED` patches.
        pause: called between steps, while the model has no hooks and may run for others. At all other times no other
            thread may run it.

    Raises:
        UserError: a bad image, an export, or a class that the model does not have.
    """
    check_explainable(task, of_class)
    image = image if isinstance(image, ExplainedImage) else explained_image(task, image)
    beside = beside if beside is None or isinstance(beside, ExplainedImage) else explained_image(task, beside)
    answer = task.answers([image.sample])[0]
    found = Explanation(answer.row(), answer.text())
    found.arrays["image"] = image.shown
    pause()
    batch, tokens = _tokens_and_pieces(found, task, image.sample, image.frame)
    pause()
    if tokens is not None:
        _relevance(found, task, batch, tokens.grid, pause)
        most = OUTPUTS if math.prod(tokens.grid) <= ROLLED else outputs_of_large
        _relevance_of_outputs(found, task, batch, tokens.grid, most, of_class, pause)
    traced = _or_note(found, lambda: _traced(task, batch, pause), "no figures of the encoder")
    if traced is not None:
        _encoder(found, traced, values)
        found.facts["lens"] = [
            {"layer": i, "text": a.text(), "answer": a.row()}
            for i, (a,) in enumerate(layer_by_layer(task, batch, pause), 1)
        ]
    if tokens is not None:
        _tokens(found, task, tokens, beside, values)
        _nearest(found, task, tokens, gallery)
    return found


def maps_of_answer(task: Task, sample: Sample, frame: list[float], pause: Pause = no_pause) -> Explanation:
    """The maps of an answer as a whole: `relevance`, `words` and `rollout`; without the answer.

    A small subset of `explanation`, in a fraction of its time and size.
    """
    check_explainable(task)
    found = Explanation({}, "")
    batch, tokens = _tokens_and_pieces(found, task, sample, frame)
    pause()
    if tokens is not None:
        _relevance(found, task, batch, tokens.grid, pause)
    traced = _or_note(found, lambda: _traced(task, batch, pause), "no rollout")
    if traced is not None:
        _rollout(found, traced)
    return found


def check_explainable(task: Task, of_class: str | None = None) -> None:
    """UserError for a task or a class that cannot be explained."""
    if isinstance(task, Exported):
        refuse(task.made_from)
    if of_class is not None and of_class not in task.classes:
        first = ", ".join(task.classes[:5])
        have = f"its {len(task.classes):,} classes begin with {first}" if task.classes else "it has no classes at all"
        raise UserError(f"the model has no class {of_class[:100]!r}: {have}")


def _tokens_and_pieces(
    found: Explanation, task: Task, sample: Sample, frame: list[float]
) -> tuple[Batch, Tokens | None]:
    """The model's input, and the tokens if they have places in the image. Adds the pieces of the answer."""
    prepared = task.preprocess.normalise(sample.images[:1])
    weight = next(task.parameters())
    batch = {"image": prepared.to(weight.device, weight.dtype)}
    batch["sample"] = torch.tensor([numbered_by_pixels(prepared[0])], device=batch["image"].device)
    found.facts["frame"] = frame
    if (count := len(sample.images)) > 1:
        found.notes.append(f"the model reads this image in {count} frames: the figures show the first")
    tokens = _or_note(found, lambda: image_tokens(task, batch["image"]), "no figures of tokens")
    if tokens is not None:
        found.facts["grid"] = list(tokens.grid)
    _pieces(found, task, batch)
    return batch, tokens


def _or_note(found: Explanation, compute: Callable[[], T], missing: str) -> T | None:
    """What `compute` gives; None, with a note, where the model refuses it."""
    try:
        return compute()
    except UserError as error:
        found.notes.append(f"{missing}: {error}")
        return None


@torch.inference_mode()
def _pieces(found: Explanation, task: Task, batch: Batch) -> None:
    """The pieces of an answer such as a caption, and the attention over the patches at each."""
    pieces = next(iter(task.pieces(batch)), [])
    if not pieces:
        return
    found.facts["pieces"] = [{"text": piece.text, "p": piece.p} for piece in pieces]
    heats = [piece.heat for piece in pieces if piece.heat is not None]
    if len(heats) == len(pieces):
        found.arrays["words"] = torch.stack(heats).float().cpu().numpy()
    else:
        found.notes.append("no words: this model reads the image once, as a whole, and then has no attention over it")


def _relevance(found: Explanation, task: Task, batch: Batch, grid: Grid, pause: Pause) -> None:
    """The relevance of each patch to the answer."""
    whole = _or_note(found, lambda: relevance(task, batch, pause=pause), "no relevance")
    if whole is not None:
        found.arrays["relevance"] = whole[0].unflatten(0, grid).numpy()
    pause()


def _relevance_of_outputs(
    found: Explanation, task: Task, batch: Batch, grid: Grid, most: int, of_class: str | None, pause: Pause
) -> None:
    """The relevance of each patch to the outputs that the answer consists of, and to a class."""
    if "relevance" not in found.arrays:
        return
    with torch.no_grad():
        outputs = task.explainable(batch)[:most]
    if of_class is not None and of_class not in [name for _, name in outputs]:
        outputs.append((list(task.classes).index(of_class), of_class))
    if outputs:
        each = relevance(task, batch, [number for number, _ in outputs], pause)[0]
        found.arrays["relevance_outputs"] = each.unflatten(1, grid).numpy()
        found.facts["outputs"] = [name for _, name in outputs]


def _traced(task: Task, batch: Batch, pause: Pause) -> Trace:
    found = trace(task, batch["image"])
    found.pause = pause
    found.maps[0]  # refuses attention without one matrix per head, or one that is too large, before anything is drawn
    return found


def _rollout(found: Explanation, traced: Trace) -> None:
    """Rollout, and what the rows of maps are."""
    config, grid = traced.encoder.config, (traced.grid[0], traced.grid[1])
    found.arrays["rollout"] = rollout(traced.maps, traced.prefix, traced.pool)[0].unflatten(0, grid).numpy()
    found.facts |= {"grid": list(grid), "patch": config.patch, "prefix_tokens": traced.prefix, "pool": traced.pool}


def _encoder(found: Explanation, traced: Trace, values: int) -> None:
    """Attention, norms, positions and filters."""
    encoder, maps, prefix, pool = traced.encoder, traced.maps, traced.prefix, traced.pool
    config, grid = encoder.config, (traced.grid[0], traced.grid[1])
    _rollout(found, traced)
    heads = [per_head(maps, prefix, pool, layer)[0] for layer in range(len(maps))]
    norms = token_norms(traced.hidden)[:, 0]
    found.arrays |= {
        "heads": torch.stack(heads).unflatten(2, grid).numpy(),
        "distance": attention_distance(maps, grid, config.patch).numpy(),
        "norms": norms[:, prefix:].unflatten(1, grid).numpy(),
        "outliers": outliers(norms[-1, prefix:]).unflatten(0, grid).numpy(),
        "filters": patch_filters(encoder).numpy(),
    }
    found.facts["filters"] = (
        "principal components of the patch projection"
        if type(encoder.patches) is PatchEmbedding
        else "first filters of the first convolution"
    )
    if prefix:
        found.arrays["norms_prefix"] = norms[:, :prefix].numpy()
    count = math.prod(grid)
    if count <= ROLLED and count**2 <= values:
        found.arrays["rollout_patches"] = rollout(maps, prefix, patches=range(count))[0].numpy().astype(np.float16)
    positions = _or_note(found, lambda: position_similarity(encoder), "no positions")
    if positions is not None:
        found.arrays["positions"] = positions.numpy()
    _between_patches(found, traced, values)


def _between_patches(found: Explanation, traced: Trace, values: int) -> None:
    """The attention from each patch to each other: all layers and heads, or what fits in so many values."""
    maps, heads, grid = traced.maps, found.arrays["heads"].shape[1], (traced.grid[0], traced.grid[1])
    block = block_for(math.prod(grid), values)
    cells = math.prod(-(-side // block) for side in grid)
    fit = values // (heads * cells**2)
    mean = fit < 2
    layers = spaced(len(maps), max(1, values // cells**2) if mean else fit)
    chosen = []
    for layer in layers:
        # Of a block of patches, the mean attention of its patches to all patches of another block together.
        among = in_blocks(from_patches(maps, traced.prefix, layer)[0], grid, block, total=True)
        chosen.append(in_blocks(among.mT, grid, block).mT)
    chosen = [layer.mean(dim=0, keepdim=True) for layer in chosen] if mean else chosen
    found.arrays["attention"] = torch.stack(chosen).numpy().astype(np.float16)
    found.facts["attention_layers"] = [layer + 1 for layer in layers]
    if mean:
        found.notes.append("the attention from each patch is the mean over heads: all heads would be too large")


def block_for(patches: int, values: int) -> int:
    """The smallest side of blocks of patches whose square matrix fits in so many values a few times."""
    return max(1, math.ceil((MATRICES * patches**2 / values) ** 0.25))


def in_blocks(values: Tensor, grid: Grid, block: int, total: bool = False) -> Tensor:
    """Values of patches [..., N] as means, or with `total` sums, of blocks of `block` x `block` patches: [..., cells].

    Blocks at the right and lower edge may be smaller.
    """
    if block == 1:
        return values
    planes = values.unflatten(-1, grid).reshape(-1, 1, *grid)
    pooled = F.avg_pool2d(planes, block, ceil_mode=True, divisor_override=1 if total else None)
    return pooled.reshape(*values.shape[:-1], -1)


def spaced(layers: int, most: int) -> list[int]:
    """At most so many layers, counted from 0: all, or evenly spaced ones with the last, and of several the first."""
    if most >= layers:
        return list(range(layers))
    if most <= 1:
        return [layers - 1] * most
    return [round(i * (layers - 1) / (most - 1)) for i in range(most)]


def _tokens(found: Explanation, task: Task, tokens: Tokens, beside: ExplainedImage | None, values: int) -> None:
    """Colours and similarity of the patches, also with those of another image."""
    count, grid, other = tokens.patches.shape[1], tokens.grid, None
    if beside is not None:
        other = image_tokens(task, task.preprocess.normalise(beside.sample.images[:1]))
        found.arrays["image_beside"] = beside.shown
        found.facts |= {"frame_beside": beside.frame, "grid_beside": list(other.grid)}
    both = tokens.patches if other is None else torch.cat([tokens.patches, other.patches], dim=1)
    colours, shares = pca_colours(both)
    found.facts["pca_shares"] = shares.tolist()
    found.arrays["pca"] = colours[0, :count].unflatten(0, grid).numpy()
    if other is not None:
        found.arrays["pca_beside"] = colours[0, count:].unflatten(0, other.grid).numpy()
    block = block_for(max(count, 0 if other is None else other.patches.shape[1]), values)
    found.facts["block"] = block
    for name, their in (("similarity", tokens), ("similarity_beside", other)):
        if their is not None:
            own, theirs = (in_blocks(each.patches[0].float().T, each.grid, block).T for each in (tokens, their))
            found.arrays[name] = patch_similarity(own, theirs).numpy().astype(np.float16)


def pooled(task: Task, tokens: Tokens) -> Tensor:
    """The vectors [B, D] that stand for images."""
    with torch.no_grad():
        return one_vector(task.encoder.pool(tokens)).float().cpu()


def _first_frame(task: Task, path: Path) -> Tensor:
    return task.prepare(path).images[:1]


def _nearest(found: Explanation, task: Task, tokens: Tokens, gallery: Sequence[Path]) -> None:
    """The images of a gallery whose vectors are the most similar. Files that are no images are noted."""
    paths: list[Path] = []
    vectors: list[Tensor] = []
    for start in range(0, len(gallery), GALLERY):
        images = []
        for path in gallery[start : start + GALLERY]:
            image = _or_note(found, partial(_first_frame, task, path), "left out of the nearest images")
            if image is not None:
                paths.append(path)
                images.append(task.preprocess.normalise(image))
        if images:
            vectors.append(pooled(task, image_tokens(task, torch.cat(images))))
    if not paths:
        return
    places, scores = nearest(pooled(task, tokens)[0], torch.cat(vectors))
    found.facts["nearest"] = [
        {"image": str(paths[place]), "score": score} for place, score in zip(places, scores, strict=True)
    ]
