"""Plain functions that `vit.py` and `variants/` share: fused attention, positions, stochastic depth, and checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitrail.errors import UserError, warn_once

Grid = tuple[int, ...]
"""patches along each axis: rows and columns of an image"""

FORMED = 256
"""bf16 training on a CPU computes the attention matrix explicitly up to this number of tokens"""

RESAMPLINGS = {
    "antialias": ("bicubic", False, True),
    "bilinear_antialias": ("bilinear", False, True),
    "bicubic": ("bicubic", False, False),
    "bilinear": ("bilinear", False, False),
    "bicubic_corners": ("bicubic", True, False),
    "corners": ("bilinear", True, False),
}
"""interpolation mode, whether corners are aligned, and whether to use antialiasing"""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention of each query over the values [B, heads, M, d], to [B, heads, N, d] (equations 6 and 7).

    PyTorch's fused attention never computes the matrix A. In bf16 training on a CPU it is three to four times slower
    for few tokens than the explicit products (results/attention.json), so those are used there.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # a norm on them is in float32 under autocast
    learns = torch.is_grad_enabled() and q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    weighs = mask is not None and mask.is_floating_point() and mask.shape[-2] == 1  # keys, the same for every query
    if not learns or not (mask is None or weighs) or max(q.shape[-2], k.shape[-2]) > FORMED:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(dim=-1) @ v


def stochastic_depth(rate: float, draws: Tensor) -> Tensor:
    """Factors on the residual branches from uniform random numbers in [0, 1), both [B, depth, 2] (arXiv 1603.09382).

    The probability of skipping a branch rises linearly from 0 in the first block to `rate` in the last. The factor is 0
    for a skipped branch, and 1 / (1 - its rate) for a kept one.
    """
    rates = torch.linspace(0, rate, draws.shape[1], device=draws.device)[:, None]
    return (draws >= rates) / (1 - rates)


def scale_branch(branch: Tensor, keep: Tensor | None, index: int) -> Tensor:
    """A residual branch [B, T, D] times its factor in `keep` [B, 2]."""
    return branch if keep is None else branch * keep[:, index, None, None]


def check_images(images: Tensor, channels: int, patch: int) -> None:
    """Raise UserError unless `images` is a batch [B, C, H, W] whose size divides into patches."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise UserError(f"expected images [B, {channels}, H, W], got {list(images.shape)}: check the channels")
    height, width = images.shape[2:]
    if height % patch or width % patch:
        raise UserError(
            f"images of {height}x{width} do not divide into patches of {patch} pixels: "
            f"resize or pad them to multiples of {patch}"
        )


def sine_positions(grid: Grid, width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2-D positions [h * w, D]: a quarter each for sin x, cos x, sin y and cos y (arXiv 2205.01580)."""
    if width % 4:
        raise UserError(f"2-D sine positions need a width that is divisible by 4, got {width}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    steps = torch.arange(width // 4, dtype=torch.float64) / max(width // 4 - 1, 1)
    frequencies = temperature**-steps
    x = columns.flatten()[:, None] * frequencies
    y = rows.flatten()[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def resize_positions(positions: Tensor, old: Grid, new: Grid, prefix: int, resampling: str = "antialias") -> Tensor:
    """Learned positions [1, prefix + N, D] of one grid, interpolated in 2-D for another grid (section 3.2).

    `VariantConfig` explains the values of `resampling`: each library has its own, and their results differ.
    """
    if old == new:
        return positions
    first, rest = positions[:, :prefix], positions[:, prefix:]
    image = rearrange(rest, "1 (h w) d -> 1 d h w", h=old[0]).float()
    if isinstance(new[0], torch.SymInt):  # an export for any size, whose engines have interpolations of their own
        down, right = (sampling_matrix(a, b, resampling).to(image) for a, b in zip(old, new, strict=True))
        if resampling == "offset":  # at the model's own size it is not the identity, as a copy is
            same = (torch.full((), new[0]) == old[0]) & (torch.full((), new[1]) == old[1])
            copies = [(torch.arange(b)[:, None] == torch.arange(a)).to(image) for a, b in zip(old, new, strict=True)]
            down, right = torch.where(same, copies[0], down), torch.where(same, copies[1], right)
        image = down @ image @ right.T
    elif resampling == "offset":
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        mode, corners, antialias = RESAMPLINGS[resampling]
        image = F.interpolate(image, size=new, mode=mode, align_corners=corners, antialias=antialias)
    return torch.cat([first, rearrange(image, "1 d h w -> 1 (h w) d").to(rest.dtype)], dim=1)


def sampling_matrix(old: int, new: int, resampling: str) -> Tensor:
    """Weights [new, old] of one axis of `F.interpolate`, for the ways in `RESAMPLINGS` and for "offset".

    Engines interpolate each in their own way (for cubic with antialiasing, ONNX files have been written with another
    coefficient than PyTorch's); a product with this matrix is the same in all of them. `new` may be symbolic.
    """
    mode, corners, antialias = RESAMPLINGS.get(resampling, ("bicubic", False, False))
    out, places = torch.arange(new, dtype=torch.float32), torch.arange(old, dtype=torch.float32)
    size = torch.full((), new, dtype=torch.float32)
    if antialias:
        scale = old / size
        offset = (places + 0.5 - scale * (out[:, None] + 0.5)) / scale.clamp(min=1)
        weights = _cubic(offset.abs(), -0.5) if mode == "bicubic" else (1 - offset.abs()).clamp(min=0)
        return weights / weights.sum(dim=1, keepdim=True)
    if corners:
        at = out * (old - 1) / (size - 1).clamp(min=1)
    else:
        at = old / (size + 0.1 * (resampling == "offset")) * (out + 0.5) - 0.5
    if mode == "bilinear":
        return (1 - (places - at.clamp(0, old - 1)[:, None]).abs()).clamp(min=0)
    first = at.floor()
    taps = torch.arange(-1, 3, dtype=torch.float32)
    weights = _cubic((taps - (at - first)[:, None]).abs(), -0.75)  # [new, 4]
    read = (first[:, None] + taps).clamp(0, old - 1)  # beyond the edge the last place counts again
    return ((read[..., None] == places) * weights[..., None]).sum(dim=1)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution at distances `x`; PyTorch has a = -0.5 with antialiasing, and -0.75 without."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def fit_positions(positions: Tensor, old: Grid, new: Grid, prefix: int, resampling: str = "antialias") -> Tensor:
    """`resize_positions` for images of another size than the model's; warns once."""
    # With `torch.compiler.disable` compiled models could warn too, but it imports the compiler, which takes seconds.
    if old != new and not torch.compiler.is_compiling():
        warn_once(f"positions interpolated from {old[0]}x{old[1]} patches to {new[0]}x{new[1]}")
    return resize_positions(positions, old, new, prefix, resampling)
