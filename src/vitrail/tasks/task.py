"""The contract that every job keeps: what the loop, evaluation, the command line and export may ask of it."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.data.decode import AnyImage, Preprocess
from vitrail.errors import UserError
from vitrail.vit import Tokens

Batch = dict[str, Any]


@dataclass
class Prediction:
    """An answer for one image; each task fills its own fields."""

    labels: list[dict[str, Any]] = field(default_factory=list)
    """classification: `{"label": name, "score": probability}`, best first"""
    values: list[dict[str, Any]] = field(default_factory=list)
    """regression: `{"name": name, "value": number}`, in the head's order"""
    caption: str = ""
    """captioning: the best caption"""
    captions: list[dict[str, Any]] = field(default_factory=list)
    """captioning: `{"caption": text, "score": s, "tokens": [{"text": piece, "p": probability}]}`, best first"""
    embedding: list[float] = field(default_factory=list)
    """an encoder without a head: its pooled vector"""

    def as_row(self) -> dict[str, Any]:
        """The filled fields, for a line of JSON; a caption may be empty."""
        return {name: value for name, value in asdict(self).items() if value or (name == "caption" and self.captions)}


def in_words(values: Sequence[dict[str, Any]]) -> str:
    """Values for people: `age 31.4, angle -0.25`."""
    return ", ".join(f"{value['name']} {_short(value['value'])}" for value in values)


def _short(number: float) -> str:
    """Four digits, or all before the point where these are more."""
    return f"{number:.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:.4g}"


class Metric(Protocol):
    """Scores of an evaluation. State is kept by sample, so a repeated or padded sample counts once."""

    def update(self, batch: Batch, outputs: Any) -> None:
        """Take in a batch and what the task gave for it (see `Task.metric_reads`)."""

    def state(self) -> dict[str, Tensor]:
        """What another process needs to merge."""

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in another process's state."""

    def compute(self) -> dict[str, Any]:
        """The scores; numbers, lists of numbers, or nested lists."""


class Task(nn.Module):
    """One job. A batch is a dict; its keys stand in the docstring of the task."""

    name: ClassVar[str]
    """what `config.json` calls the task"""
    score: ClassVar[str]
    """the entry of the metric that chooses the best checkpoint; higher is better"""
    metric_reads: ClassVar[Literal["outputs", "answers"]] = "outputs"
    """what the metric is updated with: what `forward` gives for a batch, or what `answer` does"""

    preprocess: Preprocess
    classes: list[str]
    frozen: Sequence[nn.Module] = ()
    """parts that stay in evaluation mode in training, since nothing of them is to change"""

    def train(self, mode: bool = True) -> Self:
        """As any module's, but for the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    @abstractmethod
    def forward(self, *inputs: Any, **named: Any) -> Tensor | dict[str, Tensor]:
        """Raw outputs under fixed names: what export and compile see."""

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` as a sum over `count` items; the loop divides over all ranks and accumulation steps.

        Other entries are sums over the same items, whose means are logged under their names.
        """

    @abstractmethod
    def answer(self, batch: Batch) -> list[Prediction]:
        """Prepared tensors in, answers out."""

    @abstractmethod
    def metric(self) -> Metric:
        """A fresh metric."""

    @abstractmethod
    def features(self, images: Tensor) -> Tokens:
        """Tokens as they enter the pooling, for normalised images [B, C, H, W]."""

    def files(self) -> dict[str, str]:
        """Texts that stand beside `config.json` in a checkpoint, by file name."""
        return {}

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What `config.json` holds beside `task`, `preprocess` and `classes`: plain data to rebuild it from."""

    def prepare(self, image: AnyImage) -> Tensor:
        """An image as the model takes it but for `preprocess.normalise`: uint8 [C, H, W] at `preprocess.size`.

        Evaluation, prediction and drawings all prepare images here or by `preprocess.prepare`, so that each sees the
        same pixels.
        """
        return self.preprocess.prepare(image)

    @torch.inference_mode()
    def answers(self, prepared: Sequence[Tensor]) -> list[Prediction]:
        """Answers for images as `prepare` gives them. Leaves the task in eval mode."""
        if not prepared:
            return []
        self.eval()
        device = next(self.parameters()).device
        images = [self.preprocess.normalise(image) for image in prepared]
        samples = torch.tensor([numbered_by_pixels(image) for image in images], device=device)
        return self.answer({"image": torch.stack(images).to(device), "sample": samples})

    def predict(self, images: Sequence[Image.Image | Tensor], batch_size: int = 32) -> list[Prediction]:
        """Answers for images: PIL images, or tensors [C, H, W] of uint8, uint16 or floats of 0 to 1 (or 0 to 255).

        Each is prepared by itself, so that no more than a batch of prepared ones is held. An image that PIL has opened
        and not loaded is read as `vitrail predict` reads the file, and stays unloaded. Leaves the task in eval mode.
        """
        starts = range(0, len(images), batch_size)
        batches = ([self.prepare(image) for image in images[start : start + batch_size]] for start in starts)
        return [answer for batch in batches for answer in self.answers(batch)]

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: `model.safetensors` and `config.json`, whole or not at all."""
        from vitrail.zoo.native import save

        save(self, path)


def finite(outputs: Tensor) -> Tensor:
    """The outputs of a model, where they are numbers. Raises UserError elsewhere: no answer can be read from them."""
    if not outputs.isfinite().all():
        raise UserError("the model's outputs are not finite: its weights are damaged, or overflow in this precision")
    return outputs


def numbered_by_pixels(image: Tensor) -> int:
    """A sample number for a prepared image that has none: what is drawn for it depends on it alone."""
    return zlib.crc32(image.cpu().numpy().tobytes())
