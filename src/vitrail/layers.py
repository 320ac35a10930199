"""Parts that published variants of the Vision Transformer add to the paper's model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.errors import UserError


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch, small at first so that deep models start near the identity."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return x * self.scale


class StochasticDepth(nn.Module):
    """In training, leave a residual branch out for a picture with a chance `rate`, and scale the rest up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        if not self.training:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class ConvStem(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU, before the patches are projected (arXiv 2106.14881).

    The first keeps the resolution and each later one halves it while the patch size allows, so `channels` of
    (32, 64) with patches of 4 gives a feature map at half size, whose 2x2 patches are then projected.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], patch: int) -> None:
        super().__init__()
        self.stride = 1
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            stride = 2 if i > 0 and patch % (2 * self.stride) == 0 else 1
            # The norm has its own shift, so the convolution needs no bias.
            convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels, self.stride = width, self.stride * stride
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, widths[-1], H / stride, W / stride]."""
        return self.layers(images)


def sine_positions(grid: tuple[int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2-D positions [h * w, D]: a quarter each for sin x, cos x, sin y and cos y (arXiv 2205.01580)."""
    if width % 4:
        raise UserError(f"2-D sine positions need a width that 4 divides, got {width}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    steps = torch.arange(width // 4, dtype=torch.float64) / max(width // 4 - 1, 1)
    frequencies = temperature**-steps
    x = columns.flatten()[:, None] * frequencies
    y = rows.flatten()[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


@torch.no_grad()
def mimetic_init(qkv: nn.Linear, out: nn.Linear, heads: int) -> None:
    """Start attention as trained transformers have it (arXiv 2305.09828, equations 3 to 8).

    Each head's query-key product is near the identity, so a token first looks at what resembles it; the value-output
    product is near minus the identity. `qkv` is [3D, D] and `out` [D, D].
    """
    width = out.weight.shape[0]
    per_head = width // heads
    query, key, value = qkv.weight.chunk(3)
    for head in range(heads):
        rows = slice(head * per_head, (head + 1) * per_head)
        left, right = _halves(_near_identity(width, noise=0.7, identity=0.7), per_head)
        query[rows], key[rows] = left.T, right
    left, right = _halves(_near_identity(width, noise=0.4, identity=-0.4), width)
    out.weight.copy_(left)
    value.copy_(right)


def _near_identity(width: int, noise: float, identity: float) -> Tensor:
    return noise * torch.randn(width, width) / width**0.5 + identity * torch.eye(width)


def _halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[D, rank] and [rank, D] whose product is the best approximation of `matrix` of that rank."""
    u, s, v = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
