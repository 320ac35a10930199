"""What a captioner looks at, word by word: the attention of its decoder over the patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.data.text import END, PAD, START
from vitrail.tasks.caption import Caption
from vitrail.tasks.task import numbered_by_pixels


class Word(NamedTuple):
    """A piece of a caption."""

    text: str
    """with the space before it; `<end>` for the end of the caption"""
    p: float
    """its probability, given the words before it"""
    heat: Tensor | None
    """[h, w]: the share of the attention that each patch had when the word was chosen, the mean over layers and heads;
    prefix tokens have the rest. None for a decoder that does not look again"""


@torch.no_grad()
def words_looked(task: Caption, images: Tensor) -> tuple[str, list[Word]]:
    """The best caption of one normalised image [1, C, H, W], and its words with the end."""
    device = next(task.parameters()).device
    images = images.to(device)
    written = task.write({"image": images, "sample": torch.tensor([numbered_by_pixels(images[0])], device=device)})
    words = [word for word in written.words[0, 0].tolist() if word != PAD]
    pieces = task.tokenizer.tokens([word for word in words if word != END])
    tokens, memory = task.features(images), task.memory(images)
    prefix, patches = tokens.prefix.shape[1], tokens.patches.shape[1]
    state, found = task.decoder.start(memory), []
    probabilities = written.logp[0, 0].exp().tolist()
    for before, piece, p in zip([START, *words[:-1]], [*pieces, "<end>"], probabilities, strict=False):
        _, state = task.decoder.step(torch.tensor([before], device=device), state)
        heat = None
        # A prefix for a language model may stand for the image as a whole and not for its places.
        if state.looked and state.looked[0].shape[1] == prefix + patches:
            heat = state.looked[0][0, prefix:].float().cpu().view(tokens.grid)
        found.append(Word(piece, p, heat))
    return "".join(pieces).strip(), found
