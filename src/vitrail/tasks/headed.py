"""Shared by classification and regression: an encoder, its pooling, and a head with named outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitrail.data.affine import Affine
from vitrail.data.preprocess import AnyImage, Preprocess
from vitrail.plain import describe
from vitrail.tasks.encoder import KINDS, Encoder
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Portable, Problem
from vitrail.variants import head_for
from vitrail.vit import Head, Tokens, ViTConfig

if TYPE_CHECKING:
    from vitrail.data.prepare import Sample


EXPLAINED = 5
"""classes whose relevance is shown"""


class Headed(Task):
    """A task that predicts from the head's outputs; each task defines their meaning."""

    problem: Problem | None = None
    """what the outputs mean, in transformers' words; None if there is only one possible meaning"""

    def __init__(
        self, encoder: Encoder, outputs: int, preprocess: Preprocess, hidden: int | None = None, bias: float = 0.0
    ) -> None:
        """`hidden` is the width of the paper's pre-training head; `bias` is the initial bias of the outputs."""
        super().__init__()
        self.encoder = encoder
        config = encoder.config
        if isinstance(config, ViTConfig):  # its pooling may concatenate tokens or return two
            self.head = head_for(config, outputs, hidden, bias)
        else:
            self.head = Head(config.width, outputs, hidden, bias)
        self.preprocess = preprocess
        self.hidden = hidden

    def with_classes(self, classes: list[str]) -> Task:
        from vitrail.tasks.classify import Classify

        return Classify(self.encoder, classes, self.preprocess) if classes else super().with_classes(classes)

    @property
    def portable(self) -> Portable | None:
        return Portable(self.outputs, self.hidden, self.problem)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised images [B, C, H, W] to the head's outputs [B, K]; `keep` is stochastic depth's."""
        return self.head(self.encoder.pool(self.encoder(images) if keep is None else self.encoder(images, keep)))

    @property
    def flips(self) -> bool:
        """Whether evaluation and prediction also see each image flipped left to right, and average the outputs."""
        return False

    @property
    def framed(self) -> bool:
        return self.flips or type(self).frames is not Headed.frames

    def frames(self, image: AnyImage) -> Sample:
        found = super().frames(image)
        return found.with_flips() if self.flips else found

    def outputs_for(self, batch: Batch) -> Tensor:
        """The head's outputs of each image, [images, K]: the mean over its frames."""
        outputs: Tensor = self(batch["image"])
        affine: Affine | None = batch.get("affine")
        if affine is None or len(outputs) == affine.images:
            return outputs
        sums = outputs.new_zeros(affine.images, outputs.shape[1])
        counts = affine.image_of.bincount(minlength=affine.images).to(outputs)
        return sums.index_add_(0, affine.image_of.to(outputs.device), outputs) / counts[:, None]

    def explained(self, batch: Batch, outputs: Sequence[int] | None = None) -> Tensor:
        """The largest logit of each image, [B]; or the logits of some classes."""
        logits = self(batch["image"])
        return logits.amax(dim=1) if outputs is None else logits[:, list(outputs)]

    def explainable(self, batch: Batch) -> list[tuple[int, str]]:
        """The classes with the largest logits, largest first."""
        best = self(batch["image"][:1])[0].topk(min(EXPLAINED, len(self.classes))).indices.tolist()
        return [(k, self.classes[k]) for k in best]

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def config(self) -> dict[str, Any]:
        return {"encoder": describe(self.encoder.config, KINDS), "hidden": self.hidden}
