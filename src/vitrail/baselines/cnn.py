"""Convolutional networks: a small one like LeNet and VGG, and the ResNet for small images.

Read convolution.py first, the convolution with its norm and the residual block; here both are stacked.

    B images in the batch       C channels, H and W pixels       D channels of the last feature map, of h x w positions
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.baselines.convolution import BasicBlock, Convolution, channels_last
from vitrail.baselines.mlp import check
from vitrail.errors import UserError, require
from vitrail.vit import Tokens


@dataclass(frozen=True)
class CNNConfig:
    """A plain convolutional network. The defaults suit 32x32 pixels; photos need one more stage.

    At 160x160, `widths=(32, 64, 128, 256), strides=(2, 2, 2, 2)` gives a feature map of 10x10.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    """channels of each stage"""
    depth: int = 2
    """number of convolutions per stage"""
    strides: tuple[int, ...] = (2, 2, 2)
    """stride of each stage's max pooling, by which the map shrinks; 1 for no pooling"""
    stem_stride: int = 1
    """stride of the first convolution"""
    image_size: tuple[int, int] = (32, 32)
    """(height, width) in pixels for training; other sizes work too"""
    channels: int = 3

    def __post_init__(self) -> None:
        _check_stages(self)

    @property
    def width(self) -> int:
        """Channels of the last feature map."""
        return self.widths[-1]


@dataclass(frozen=True)
class ResNetConfig:
    """The ResNet that its paper uses for CIFAR-10 (arXiv 1512.03385, section 4.2); the defaults are its ResNet-20.

    At 160x160, `stem_stride=2, strides=(2, 2, 2)` gives a feature map of 10x10.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    """channels of each stage"""
    depth: int = 3
    """blocks per stage, of two convolutions each: n in the paper, with 6n + 2 layers for three stages"""
    strides: tuple[int, ...] = (1, 2, 2)
    """stride of the first convolution of each stage"""
    stem_stride: int = 1
    """stride of the convolution before the stages"""
    image_size: tuple[int, int] = (32, 32)
    """(height, width) in pixels for training; other sizes work too"""
    channels: int = 3

    def __post_init__(self) -> None:
        _check_stages(self)
        if sorted(self.widths) != list(self.widths):
            raise UserError(f"shortcuts cannot drop channels: widths {self.widths} must not decrease")

    @property
    def width(self) -> int:
        """Channels of the last feature map."""
        return self.widths[-1]


def _check_stages(config: CNNConfig | ResNetConfig) -> None:
    if not config.widths or len(config.widths) != len(config.strides):
        raise UserError(f"one stride per stage is needed: got widths {config.widths} and strides {config.strides}")
    require(config, 1, math.inf, "widths", "strides", "stem_stride", "depth")


class CNN(nn.Module):
    """Stages of convolutions with ReLU, ended by max pooling, as LeNet (1998) and VGG (arXiv 1409.1556) have it.

    Pooling shrinks the map, usually by half, and the next stage has more channels: fewer positions with more features
    each.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = c = config
        layers: list[nn.Module] = []
        channels, step = c.channels, c.stem_stride
        for width, stride in zip(c.widths, c.strides, strict=True):
            for _ in range(c.depth):
                layers += [Convolution(channels, width, step), nn.ReLU(inplace=True)]
                channels, step = width, 1
            if stride > 1:
                # `ceil_mode`: the last row and column of an odd map count too.
                layers.append(nn.MaxPool2d(stride, ceil_mode=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, H, W] to the positions of the last feature map, [B, h * w, D]."""
        check(images, self.config.channels)
        return as_tokens(self.layers(channels_last(images)))

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean over all positions, [B, D] (arXiv 1312.4400, section 3.2)."""
        return tokens.patches.mean(dim=1)


class ResNet(nn.Module):
    """A convolution, then stages of residual blocks (arXiv 1512.03385, section 4.2)."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = c = config
        self.stem = Convolution(c.channels, c.widths[0], c.stem_stride)
        blocks: list[nn.Module] = []
        channels = c.widths[0]
        for width, stride in zip(c.widths, c.strides, strict=True):
            for i in range(c.depth):
                blocks.append(BasicBlock(channels, width, stride if i == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, H, W] to the positions of the last feature map, [B, h * w, D]."""
        check(images, self.config.channels)
        return as_tokens(self.blocks(F.relu(self.stem(channels_last(images)))))

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean over all positions, [B, D]."""
        return tokens.patches.mean(dim=1)


def as_tokens(x: Tensor) -> Tokens:
    """A feature map [B, D, h, w] as tokens, one per position, row by row."""
    patches = x.flatten(2).transpose(1, 2)
    return Tokens(patches[:, :0], patches, (x.shape[2], x.shape[3]))
