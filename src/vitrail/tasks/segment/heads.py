"""Heads of segmentation: from an encoder's patch tokens to logits per class, or to masks of queries."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.ops import Grid
from vitrail.vit import Block, Tokens, ViTConfig, init_weights


class LinearHead(nn.Module):
    """One linear layer per patch, for `upscale` x `upscale` logits of each class."""

    def __init__(self, width: int, classes: int, upscale: int) -> None:
        super().__init__()
        self.upscale, self.linear = upscale, nn.Linear(width, classes * upscale**2)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """Patches [B, h w, D] to logits [B, K, h u, w u]."""
        return F.pixel_shuffle(as_image(self.linear(tokens.patches), tokens.grid), self.upscale)


class MaskTransformer(nn.Module):
    """Segmenter (arXiv 2105.05633, section 3.2): a class's logits are products of its token with those of the patches.

    Class tokens and patches pass through blocks together; both are then projected and normalised to length 1.
    """

    def __init__(self, width: int, classes: int, blocks: int, heads: int, upscale: int) -> None:
        super().__init__()
        config = ViTConfig(width=width, depth=blocks, heads=heads)
        self.class_tokens = nn.Parameter(0.02 * torch.randn(1, classes, width))
        self.project = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.of_patches, self.of_classes = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.norm_masks = nn.LayerNorm(classes)
        for module in (self.project, *self.blocks, self.of_patches, self.of_classes):
            init_weights(module)
        self.upscale = Upscale(width, upscale)

    def forward(self, tokens: Tokens) -> Tensor:
        """Patches [B, h w, D] to logits [B, K, h u, w u]."""
        x, classes = self.project(tokens.patches), self.class_tokens.shape[1]
        x = torch.cat([self.class_tokens.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        by_class = F.normalize(self.of_classes(x[:, :classes]), dim=-1)
        image = F.normalize(self.upscale(as_image(self.of_patches(x[:, classes:]), tokens.grid)), dim=1)
        masks = torch.einsum("bkd,bdhw->bhwk", by_class, image)
        return self.norm_masks(masks).permute(0, 3, 1, 2)


class QueryHead(nn.Module):
    """EoMT (arXiv 2503.19108): queries, which pass through the encoder's last blocks, predict a class and a mask each.

    The encoder itself relates queries and patches; the task inserts the queries there (`Segment.forward`).
    """

    def __init__(self, width: int, classes: int, queries: int, upscale: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.classes = nn.Linear(width, classes + 1)  # the last one is "no object"
        layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)]
        self.masks = nn.Sequential(*layers)
        init_weights(self)
        self.upscale = Upscale(width, upscale)

    def forward(self, queries: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        """Queries [B, Q, D] and patches [B, h w, D] to `classes` [B, Q, K + 1] and `masks` [B, Q, h u, w u], logits."""
        image = self.upscale(as_image(tokens.patches, tokens.grid))
        masks = torch.einsum("bqd,bdhw->bqhw", self.masks(queries), image)
        return {"classes": self.classes(queries), "masks": masks}


class Upscale(nn.Module):
    """Doubles the resolution of [B, D, h, w] until it is `factor` times as high (EoMT, section 3.1)."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Doubling(width) for _ in range(int(math.log2(factor))))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] to [B, D, h factor, w factor]."""
        for step in self.steps:
            x = step(x)
        return x


class Doubling(nn.Module):
    """A transposed convolution of stride 2, then a depthwise convolution and a norm over the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] to [B, D, 2 h, 2 w]."""
        x = self.depthwise(F.gelu(self.up(x)))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def as_image(patches: Tensor, grid: Grid) -> Tensor:
    """[B, h w, D] to [B, D, h, w]."""
    return patches.transpose(1, 2).unflatten(2, grid)


def class_logits(outputs: dict[str, Tensor]) -> Tensor:
    """What queries predict for each pixel, [B, K, h, w]: the probabilities of the classes, weighted by the masks.

    MaskFormer's semantic inference (arXiv 2107.06278, section 3.4), up to its logarithm.
    """
    classes = outputs["classes"].float().softmax(dim=-1)[..., :-1]
    scores = torch.einsum("bqk,bqhw->bkhw", classes, outputs["masks"].float().sigmoid())
    return scores.clamp(min=1e-6).log()


QUERIES_IN_NUMPY = """\
classes, masks = (array.astype(float) for array in outputs)  # of the queries
classes = np.exp(classes - classes.max(1, keepdims=True))
classes = (classes / classes.sum(1, keepdims=True))[:, :-1]  # without "no object"
outputs = [classes.T @ (1 / (1 + np.exp(-masks))).reshape(len(masks), -1)]
"""
"""`class_logits` for the example of an export (see `Program.answer`)"""
