"""The encoder's position embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import UserError
from vitrail.vit import ViT


@torch.no_grad()
def position_similarity(encoder: ViT) -> Tensor:
    """Cosine similarity of each patch's position with every other: [h * w, h, w] (figure 7, centre).

    An encoder without positions is a UserError.
    """
    rows, columns = encoder.config.grid
    positions = encoder.positions_for((rows, columns))
    if encoder.config.positions == "none":
        raise UserError("this encoder has no positions to compare: choose one with learned or sine positions")
    vectors = F.normalize(positions[0, -rows * columns :].float().cpu(), dim=-1)
    return (vectors @ vectors.T).unflatten(1, (rows, columns))
