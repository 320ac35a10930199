"""What classification and regression share: an encoder, its pooling, and a head with named outputs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from vitrail.data.decode import Preprocess
from vitrail.plain import describe
from vitrail.tasks.encoder import KINDS, Encoder
from vitrail.tasks.task import Task
from vitrail.variants import head_for
from vitrail.vit import Head, Tokens, ViTConfig


class Headed(Task):
    """A task whose answers are read from the head's outputs; what they mean is up to the task."""

    def __init__(
        self, encoder: Encoder, outputs: int, preprocess: Preprocess, hidden: int | None = None, bias: float = 0.0
    ) -> None:
        """`hidden` makes the pre-training head of the paper; `bias` is the first value of the outputs."""
        super().__init__()
        self.encoder = encoder
        config = encoder.config
        if isinstance(config, ViTConfig):  # it pools in several ways, of which some join tokens or keep two
            self.head = head_for(config, outputs, hidden, bias)
        else:
            self.head = Head(config.width, outputs, hidden, bias)
        self.preprocess = preprocess
        self.hidden = hidden

    @property
    @abstractmethod
    def outputs(self) -> list[str]:
        """The names of the head's outputs."""

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] to the head's outputs [B, K]."""
        return self.head(self.encoder.pool(self.encoder(images)))

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def config(self) -> dict[str, Any]:
        return {"encoder": describe(self.encoder.config, KINDS), "hidden": self.hidden}
