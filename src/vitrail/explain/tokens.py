"""Numbers from tokens: their norms, colours by principal components, similarity of patches, and nearest images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OUTLIER = 3.0
"""a patch whose norm is more than this many times the median of its image's patches is an outlier"""


def token_norms(hidden: Sequence[Tensor]) -> Tensor:
    """Lengths of the tokens after each block, [L, B, T] from tokens [B, T, D] (`Trace.hidden`)."""
    return torch.stack([tokens.float().norm(dim=-1).cpu() for tokens in hidden])


def outliers(norms: Tensor, times: float = OUTLIER) -> Tensor:
    """Which patches have an outlying norm, bool [..., N] from norms [..., N] of patches alone (arXiv 2309.16588).

    Large models use patches of the background as registers; their norm is several times that of the others. The paper
    sets the limit of each model by hand; here it is `times` the median of the image's patches.
    """
    return norms > times * norms.median(dim=-1, keepdim=True).values


def pca_colours(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Colours [B, N, 3] from 0 to 1 of patches [B, N, D], and the share of the variance of each component, [3].

    The first three principal components over the patches of all images are red, green and blue, as in DINOv2 (arXiv
    2304.07193): similar patches have similar colours, also in different images. Each component has the sign that makes
    its largest weight positive, and runs from its 1st to its 99th percentile. Missing components are 0.5.
    """
    flat = patches.float().cpu().flatten(0, 1)
    centred = flat - flat.mean(dim=0)
    _, sizes, components = torch.linalg.svd(centred, full_matrices=False)
    components, count = components[:3], min(3, len(sizes))
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    values = centred @ (components * largest.sign()).T
    low, high = (values.quantile(share, dim=0) for share in (0.01, 0.99))
    tiny = torch.finfo(torch.float32).tiny
    scaled = torch.where(high > low, (values - low) / (high - low).clamp_min(tiny), 0.5).clamp(0, 1)
    colours, shares = torch.full((len(flat), 3), 0.5), torch.zeros(3)
    colours[:, :count] = scaled
    shares[:count] = sizes[:count].square() / sizes.square().sum().clamp_min(tiny)
    return colours.unflatten(0, patches.shape[:2]), shares


def patch_similarity(patches: Tensor, others: Tensor) -> Tensor:
    """Cosine similarity [N, M] of the patches [N, D] of an image with those [M, D] of the same or another one."""
    return F.normalize(patches.float(), dim=-1).cpu() @ F.normalize(others.float(), dim=-1).cpu().T


def nearest(vector: Tensor, gallery: Tensor, count: int = 5) -> tuple[list[int], list[float]]:
    """The images of a gallery [G, D] that are the most similar to `vector` [D], and their cosine similarity."""
    similarity = F.normalize(gallery.float(), dim=-1).cpu() @ F.normalize(vector.float(), dim=-1).cpu()
    scores, places = similarity.sort(descending=True, stable=True)
    return places[:count].tolist(), scores[:count].tolist()
