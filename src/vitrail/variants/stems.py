"""Convolutions before the patches: the hybrids of section 3.1 and later ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.baselines.convolution import BasicBlock, channels_last
from vitrail.errors import UserError
from vitrail.ops import check_images
from vitrail.variants.config import VariantConfig
from vitrail.vit import PatchEmbedding, ViTConfig


class ConvStem(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU, before the patches are projected (arXiv 2106.14881).

    Each halves the feature map while the patch size allows; for patches below 8 pixels, as in small images, the first
    one keeps the resolution. So `widths` of (32, 64) with patches of 4 give a map of half size, whose 2x2 patches are
    then projected; (32, 64, 128, 192) with patches of 16 give one vector per patch. `blocks` adds residual blocks after
    each convolution except the first, where they would be most expensive: a small ResNet.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], patch: int, blocks: int = 0) -> None:
        super().__init__()
        self.stride, self.width = 1, widths[-1]
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            stride = 1 if i == 0 and patch < 8 else 2
            stride = stride if patch % (stride * self.stride) == 0 else 1
            # The norm has its own shift, so the convolution needs no bias.
            convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [BasicBlock(width, width) for _ in range(blocks if i else 0)]
            channels, self.stride = width, self.stride * stride
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, widths[-1], H / stride, W / stride]."""
        return self.layers(channels_last(images))


class PatchStem(nn.Module):
    """Non-overlapping convolutions, each with batch norm and GELU: 4x4, then 2x2 (MobileCLIP, arXiv 2311.17049)."""

    def __init__(self, channels: int, variant: VariantConfig) -> None:
        super().__init__()
        self.stride, self.width = 1, variant.backbone_layers[-1]
        layers: list[nn.Module] = []
        for i, width in enumerate(variant.backbone_layers):
            size = 2 if i else 4
            layers += [nn.Conv2d(channels, width, size, size, bias=False)]
            layers += [nn.BatchNorm2d(width, eps=variant.backbone_eps), nn.GELU()]
            channels, self.stride = width, self.stride * size
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, widths[-1], H / stride, W / stride]."""
        return self.layers(images)


class StandardisedConv(nn.Conv2d):
    """A convolution with weight standardisation (arXiv 1903.10520), padded as in TensorFlow."""

    def __init__(self, channels: int, out: int, size: int, stride: int = 1, *, eps: float, deviation: bool) -> None:
        super().__init__(channels, out, size, stride, bias=False)
        self.eps, self.deviation = eps, deviation

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out, ceil(H / stride), ceil(W / stride)]."""
        if self.deviation:
            variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
            weight = (self.weight - mean) * (1 / (variance.sqrt() + self.eps))
        else:
            # Batch norm of the filters rounds as timm does; 50 such layers turn another rounding into 1e-4.
            rows = self.weight.flatten(1)[None]
            weight = F.batch_norm(rows, None, None, training=True, eps=self.eps).view_as(self.weight)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, None, self.stride)


def pad_same(x: Tensor, size: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad for ceil(size / stride) outputs; odd padding has the extra pixel on the right and at the bottom."""
    pads = []
    for n in (x.shape[3], x.shape[2]):
        pad = max((-(-n // stride) - 1) * stride + size - n, 0)
        pads += [pad // 2, pad - pad // 2]
    return F.pad(x, pads, value=value) if any(pads) else x


def plain_conv(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """A bottleneck block of a ResNet: 1x1, 3x3 and 1x1 convolutions with a shortcut (arXiv 1512.03385)."""

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        shortcut: nn.Module | None,
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels, out // 4, 1), norm(out // 4)
        self.conv2, self.norm2 = conv(out // 4, out // 4, 3, stride), norm(out // 4)
        self.conv3, self.norm3 = conv(out // 4, out, 1), norm(out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, out, h / stride, w / stride]."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        y = self.norm3(self.conv3(y))
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class Shortcut(nn.Module):
    """The shortcut of a stage's first block, which changes width or resolution."""

    def __init__(
        self, channels: int, out: int, stride: int, conv: Callable[..., nn.Module], norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        # ResNet-D averages before the projection, so that no value is skipped (arXiv 1812.01187).
        averages = conv is plain_conv and stride > 1
        self.average = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if averages else nn.Identity()
        self.conv, self.norm = conv(channels, out, 1, 1 if averages else stride), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.average(x)))


class ConvNorm(nn.Module):
    """A convolution, a norm and a ReLU."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class ResNet(nn.Module):
    """A ResNet without its head, of the kind in `VariantConfig.backbone`."""

    def __init__(self, channels: int, variant: VariantConfig) -> None:
        super().__init__()
        eps = variant.backbone_eps
        self.tensorflow = variant.backbone == "resnetv2"
        conv: Callable[..., nn.Module] = plain_conv
        norm: Callable[[int], nn.Module] = partial(nn.BatchNorm2d, eps=eps)
        if self.tensorflow:
            deviation = variant.backbone_weight == "deviation"
            conv = partial(StandardisedConv, eps=variant.backbone_weight_eps, deviation=deviation)
            norm = partial(nn.GroupNorm, 32, eps=eps)
            self.root = nn.Sequential(ConvNorm(conv(channels, 64, 7, 2), norm(64)))
        else:
            widths = [(channels, 32, 2), (32, 32, 1), (32, 64, 1)]
            self.root = nn.Sequential(*(ConvNorm(conv(a, b, 3, stride), norm(b)) for a, b, stride in widths))
        self.stride, self.width = 4, 64
        self.stages = nn.ModuleList()
        for i, units in enumerate(variant.backbone_layers):
            out, first = 256 * 2**i, 1 if i == 0 else 2
            stage = []
            for j in range(units):
                stride = first if j == 0 else 1
                shortcut = Shortcut(self.width, out, stride, conv, norm) if j == 0 else None
                stage.append(Bottleneck(self.width, out, stride, conv, norm, shortcut))
                self.width, self.stride = out, self.stride * stride
            self.stages.append(nn.Sequential(*stage))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, width, H / stride, W / stride]."""
        x = self.root(images)
        # Padding with zeros is safe for max pooling: after a ReLU nothing is smaller.
        x = F.max_pool2d(pad_same(x, 3, 2), 3, 2) if self.tensorflow else F.max_pool2d(x, 3, 2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return x


Stem = ConvStem | PatchStem | ResNet | nn.Identity


class StemPatches(PatchEmbedding):
    """Patch embedding on the output of a stem (the hybrid of section 3.1)."""

    def __init__(
        self,
        config: ViTConfig,
        stem: Stem,
        bias: bool = True,
        floor: bool = False,
    ) -> None:
        """`floor` ignores pixels on the right and at the bottom that do not fill a patch."""
        width, stride = (config.channels, 1) if isinstance(stem, nn.Identity) else (stem.width, stem.stride)
        if config.patch % stride:
            raise UserError(
                f"patch size {config.patch} is not a multiple of the stem's stride {stride}: choose a multiple"
            )
        nn.Module.__init__(self)
        self.patch, self.stem, self.whole = config.patch // stride, stem, 1 if floor else config.patch
        self.projection = nn.Conv2d(width, config.width, self.patch, stride=self.patch, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        first = next(module for module in self.modules() if isinstance(module, nn.Conv2d))
        check_images(images, first.in_channels, self.whole)
        return self.projection(self.stem(images))


def patches_for(config: ViTConfig) -> PatchEmbedding | None:
    """The patch embedding of a hybrid or of a variant; None for the paper's linear projection."""
    variant = config if isinstance(config, VariantConfig) else None
    stem: Stem = nn.Identity()
    if config.stem:
        stem = ConvStem(config.channels, config.stem, config.patch, variant.stem_blocks if variant is not None else 0)
    elif variant is not None and variant.backbone != "none":
        stem = (PatchStem if variant.backbone == "conv" else ResNet)(config.channels, variant)
    bias, floor = (variant.patch_bias, variant.floor_grid) if variant is not None else (True, False)
    return None if isinstance(stem, nn.Identity) and bias and not floor else StemPatches(config, stem, bias, floor)
