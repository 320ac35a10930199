"""The 3x3 convolution with its norm, and the residual block of two of them, for the baselines and for a ViT's stem."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolution(nn.Module):
    """A 3x3 convolution and batch norm. With a kernel w, at position (i, j) of output channel o,

        y[o, i, j] = sum over c, u, v of w[o, c, u, v] * x[c, s * i + u - 1, s * j + v - 1]        (s: the stride)

    The same 9 weights per pair of channels are used at every position: what is learned at one position applies
    everywhere, and a shifted image gives a shifted map. Batch norm (arXiv 1502.03167) then makes each channel's mean 0
    and variance 1 over the batch, and learns a factor and a shift of its own, so the convolution needs no bias.
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        # ReLU halves the mean square of the signal; a variance of 2 / (9 * width) keeps the gradient's size from
        # layer to layer (He et al., arXiv 1502.01852, equation 14).
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] to [B, width, h / stride, w / stride], rounded up."""
        return self.norm(self.convolution(x))


class BasicBlock(nn.Module):
    """y = max(0, x + F(x)), with F two convolutions and a ReLU between them (arXiv 1512.03385, equation 1).

    Layers learn a change of x instead of a new x, and the gradient reaches early layers through the sum. If the map
    shrinks or channels are added, x is subsampled and padded with zero channels (option A of the paper).
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.added = stride, width - channels
        self.first = Convolution(channels, width, stride)
        self.second = Convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] to [B, width, h / stride, w / stride], rounded up."""
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))

    def shortcut(self, x: Tensor) -> Tensor:
        """x at every `stride`-th position, with channels of zeros appended."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.added)) if self.added else x


def channels_last(images: Tensor) -> Tensor:
    """The same [B, C, H, W] in channels-last memory format, which is faster for convolutions."""
    return images.contiguous(memory_format=torch.channels_last)
