"""Settings of a segmenter, and the options of `vitrail predict` and `vitrail eval`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from vitrail.errors import UserError, require_choices
from vitrail.tasks.values import Settings

UNUSED = {"linear": ("head_blocks", "queries"), "mask-transformer": ("queries",)}
"""settings of other heads"""


@dataclass(frozen=True)
class Segmentation(Settings):
    """How a segmenter is built and trained."""

    name = "segment"
    main = ("head", "dice", "class_weights")
    any_encoder = True
    resizes = True

    head: Literal["linear", "mask-transformer", "queries"] = "linear"
    """linear: one linear layer per patch; mask-transformer: blocks in which a token per class joins the patches
    (Segmenter, arXiv 2105.05633); queries: tokens that join the patches in the encoder's last blocks, each of which
    predicts one mask and its class (EoMT, arXiv 2503.19108)"""
    head_blocks: int = 2
    """blocks of the mask transformer, or the encoder's last blocks that the queries pass through"""
    queries: int = 100
    """number of queries"""
    upscale: int = 1
    """logits per patch along a side, a power of 2; the rest of the way to pixels is bilinear interpolation"""
    dice: float = 0.0
    """weight of the dice loss, which counts each class of an image equally; queries always use it"""
    class_weights: Literal["none", "log"] = "none"
    """weight of each class in the cross-entropy. log: 1 / ln(1.02 + the class's share of the training pixels), for rare
    classes (ENet, arXiv 1606.02147)"""
    void: int | None = None
    """the number in index masks of pixels that are neither trained on nor scored; default: 255, unless the masks hold
    only 0 and 255"""

    def __post_init__(self) -> None:
        require_choices(self)
        if self.head_blocks < 1 or self.queries < 1:
            raise UserError(f"head_blocks and queries must be at least 1, got {self.head_blocks} and {self.queries}")
        if self.upscale < 1 or self.upscale & (self.upscale - 1):
            raise UserError(f"upscale must be a power of 2, such as 4, got {self.upscale}")
        for entry in fields(self):
            if entry.name in UNUSED.get(self.head, ()) and getattr(self, entry.name) != entry.default:
                flag = entry.name.replace("_", "-")
                raise UserError(f"the head {self.head} does not use --{flag}: leave it out, or choose another head")
        if self.class_weights != "none" and self.head == "queries":
            raise UserError("class_weights are of the cross-entropy over pixels, which queries do not have: set none")
        if not 0 <= self.dice < float("inf"):
            raise UserError(f"dice must be a number of at least 0, got {self.dice}")

    def data_options(self) -> dict[str, Any]:
        return {"void": self.void}


@dataclass(frozen=True)
class Inference:
    """How an image is segmented."""

    inference: Literal["whole", "windows"] = "whole"
    """whole: the whole image at once; windows: overlapping windows of the size of the training crops, averaged"""
    overlap: float = 0.5
    """by how much of a window's side neighbouring windows overlap at least"""
    flip: bool = False
    """average with the predictions for the image flipped left to right"""
    void: int | None = None
    """eval: the value that marks void pixels in the masks; default: as in training"""

    def __post_init__(self) -> None:
        require_choices(self)
        if not 0 <= self.overlap < 1:
            raise UserError(f"overlap must be at least 0 and below 1, got {self.overlap}")
