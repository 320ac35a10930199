"""The plain network: an image as one long vector, through fully connected layers.

B images in the batch       C channels, H and W pixels       D width of a hidden layer
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import UserError, require
from vitrail.vit import Tokens

if TYPE_CHECKING:
    from vitrail.baselines.rnn import RNNConfig


@dataclass(frozen=True)
class MLPConfig:
    """A multi-layer perceptron."""

    width: int = 512
    """units of each hidden layer"""
    depth: int = 3
    """number of hidden layers"""
    image_size: tuple[int, int] = (32, 32)
    """(height, width) in pixels: every pixel has its own weights, so no other size works"""
    channels: int = 3
    dropout: float = 0.0
    """dropout: probability of zeroing a hidden unit in a training step (Srivastava et al. 2014)"""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"an MLP needs at least one hidden layer, got depth {self.depth}")
        check_sizes(self)


class MLP(nn.Module):
    """Images through `depth` hidden layers:

        a_0 = the pixels of all channels in one row, C * H * W numbers
        a_l = max(0, W_l a_(l-1) + b_l)        for l = 1 to depth

    The layer does not know which pixels are neighbours: with one fixed shuffling of all pixels it learns equally well.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = [c.channels * math.prod(c.image_size)] + [c.width] * c.depth
        layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        for layer in layers:
            # ReLU sets half of its inputs to zero and so halves their mean square; weights of variance 2 / inputs
            # make up for it, and the signal keeps its size at any depth (He et al., arXiv 1502.01852, equation 10).
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, H, W] to the last hidden layer as the only token, [B, 1, D]."""
        check(images, self.config.channels)
        if images.shape[2:] != self.config.image_size:
            raise UserError(
                f"images of {images.shape[2]}x{images.shape[3]} do not fit an MLP for images of "
                f"{self.config.image_size[0]}x{self.config.image_size[1]}: resize them"
            )
        x = images.flatten(1)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return Tokens(x.new_empty(x.shape[0], 0, x.shape[1]), x[:, None], (1, 1))

    def pool(self, tokens: Tokens) -> Tensor:
        """The only token, [B, D]."""
        return tokens.patches[:, 0]


def check_sizes(config: MLPConfig | RNNConfig) -> None:
    """UserError for sizes that are invalid for a network of fully connected or recurrent layers."""
    require(config, 1, math.inf, "width", "channels", "image_size")
    require(config, 0, 1, "dropout")


def check(images: Tensor, channels: int) -> None:
    """UserError unless these are images [B, channels, H, W]."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise UserError(
            f"expected images [B, {channels}, H, W], got {list(images.shape)}: check the number of channels"
        )
