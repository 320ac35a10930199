"""Regression: numbers predicted from an image, such as an age or an angle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.data.targets import Numbers, Target
from vitrail.errors import UserError
from vitrail.plain import from_description
from vitrail.tasks.answers import finite
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for
from vitrail.tasks.exported import Program, whole
from vitrail.tasks.headed import Headed
from vitrail.tasks.regress.metric import RegressMetric
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Checkpoint, Metric, Prediction, Score, Section, Settings

if TYPE_CHECKING:
    from vitrail.data.sets import ImageSet, Splits

EXAMPLE = """\
answer = ", ".join(f"{name} {value:.4g}" for name, value in zip(config["values"], outputs[0]))
"""
"""see `Program.answer`"""
SHOWN = 8
"""values that are explained"""


@dataclass(frozen=True)
class Regression(Settings):
    """Training settings of a model of numbers."""

    name = "regress"

    values: tuple[str, ...] | None = None
    """columns of the table to learn; None: all but those of the image and the split"""
    hidden: int | None = None
    """width of the hidden tanh layer of the paper's pre-training head; None for a linear head"""

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, or None for a linear head, got {self.hidden}")
        if self.values is not None and not 0 < len(self.values) == len(set(self.values)):
            raise UserError(f"values must name columns, each once, got {', '.join(self.values) or 'none'}")

    def data_options(self) -> dict[str, Any]:
        return {"values": self.values}


@dataclass(frozen=True)
class Values(Prediction):
    """The predicted numbers of an image."""

    values: list[dict[str, Any]]
    """`{"name": name, "value": number}`, in the head's order"""

    def row(self) -> dict[str, Any]:
        return {"values": self.values}

    def records(self) -> list[dict[str, Any]]:
        """One column per value, by its name; one that the file has already gets `_value` behind it."""
        taken = ("image", "task", "error")
        names = [f"{each['name']}_value" if each["name"] in taken else each["name"] for each in self.values]
        return [{name: each["value"] for name, each in zip(names, self.values, strict=True)}]

    def text(self) -> str:
        """`age 31.4, angle -0.25`."""
        return ", ".join(f"{value['name']} {short(value['value'])}" for value in self.values)


def short(number: float) -> str:
    """Four significant digits, or all digits before the decimal point if more."""
    return f"{number:.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:.4g}"


class Units(NamedTuple):
    """Mean and standard deviation of each value in the training split: the head's outputs are in these units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both, on the device of another tensor and of its type, without waiting for the device."""
        mean, std = (torch.tensor(numbers, dtype=like.dtype) for numbers in self)
        return mean.to(like.device, non_blocking=True), std.to(like.device, non_blocking=True)

    def normalise(self, values: Tensor) -> Tensor:
        """Values [..., V] of the table to mean 0 and standard deviation 1."""
        mean, std = self.tensors(values)
        return (values - mean) / std

    def denormalise(self, outputs: Tensor) -> Tensor:
        """The inverse of `normalise`: outputs [..., V] in the units of the table."""
        mean, std = self.tensors(outputs)
        return outputs * std + mean


class Regress(Headed):
    """An encoder, its pooling and a head whose outputs are the values.

    It learns values in the `units` of its training split, in which all are of one size, and answers in the table's. A
    head of another library has no units: its outputs are the values. Keys of a batch: `image` [B, C, H, W], `values`
    [B, V] in those units; in training `key` (see `Task.keep`).
    """

    name = "regress"
    settings = Regression
    target = Numbers
    score = Score("r2", unit="", label="R²")
    val_loss = "smooth_l1"
    problem = "regression"

    def __init__(
        self,
        encoder: Encoder,
        values: list[str],
        preprocess: Preprocess,
        *,
        hidden: int | None = None,
        units: Units | None = None,
    ) -> None:
        """`values` are the names of the outputs."""
        super().__init__(encoder, len(values), preprocess, hidden)
        self.values, self.units = values, units

    @classmethod
    def create(cls, settings: Regression, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        target = Numbers.of(splits.train)
        return cls(encoder, target.names, preprocess, hidden=settings.hidden, units=units_of(target))

    @classmethod
    def adopt(cls, settings: Regression, loaded: Task, splits: Splits, preprocess: Preprocess) -> Self:
        """With the head of the weights too if they predict the same values, in the units of the new training split."""
        task = cls.create(settings, loaded.encoder, splits, preprocess)
        same = isinstance(loaded, Regress) and loaded.values == task.values
        if same and loaded.hidden == task.hidden:
            assert isinstance(loaded, Regress) and task.units is not None
            mean, std = (numbers.double() for numbers in task.units.tensors(torch.zeros(())))
            state = _head_in_other_units(loaded.portable_state(), 1 / std, -mean / std)
            task.load_state_dict(state)
        return task

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        encoder = encoder_for(from_description(config["encoder"], KINDS, "vit"))
        values, preprocess = config["values"], Preprocess.from_dict(config["preprocess"])
        units = None if config["units"] is None else Units(*(tuple(map(float, each)) for each in config["units"]))
        if units is not None and not len(values) == len(units.mean) == len(units.std):
            raise TypeError("units do not have one mean and std per value")
        return cls(encoder, values, preprocess, hidden=config["hidden"], units=units)

    @property
    def outputs(self) -> list[str]:
        return self.values

    def data_options(self) -> dict[str, Any]:
        return {"values": tuple(self.values)}

    def encode_target(self, target: Target) -> Target:
        """The values in the head's units."""
        assert isinstance(target, Numbers)
        return target.changed((target.values if self.units is None else self.units.normalise(target.values)).float())

    def portable_state(self) -> dict[str, Tensor]:
        """The weights of a head whose outputs are the values."""
        state = self.state_dict()
        if self.units is None:
            return state
        mean, std = (numbers.double() for numbers in self.units.tensors(torch.zeros(())))
        return _head_in_other_units(state, std, mean)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised images [B, C, H, W] to the values [B, V]; `keep` is stochastic depth's."""
        outputs = super().forward(images, keep)
        return outputs if self.units is None else self.units.denormalise(outputs.float())

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Sum of the images' losses: of each, the mean smooth L1 loss of its values (Fast R-CNN, arXiv 1504.08083).

        It is half the squared error up to one standard deviation, and grows with the error beyond: one wrong value in
        the table does not decide what is learned.
        """
        outputs = super().forward(batch["image"], self.keep(batch)).float()
        losses = F.smooth_l1_loss(outputs, batch["values"], reduction="none").mean(dim=1)
        # Created on the device: copying a number there would wait for the GPU's queued work.
        return {"loss": losses.sum(), "count": torch.full((), len(outputs), device=outputs.device)}

    def answer(self, batch: Batch) -> list[Prediction]:
        """The values, in the head's order."""
        return [
            Values([{"name": name, "value": value} for name, value in zip(self.values, row, strict=True)])
            for row in finite(self.outputs_for(batch)).float().tolist()
        ]

    def explained(self, batch: Batch, outputs: Sequence[int] | None = None) -> Tensor:
        """The first value of each image, [B]; or some of the values."""
        values = self(batch["image"])
        return values[:, 0] if outputs is None else values[:, list(outputs)]

    def explainable(self, batch: Batch) -> list[tuple[int, str]]:
        """The values, in the head's order."""
        return list(enumerate(self.values))[:SHOWN]

    def programs(self, batch: Batch) -> dict[str, Program]:
        return whole(self, batch, EXAMPLE)

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> Metric:
        return RegressMetric(self)

    @classmethod
    def printed_scores(cls, scores: Mapping[str, Any]) -> dict[str, float]:
        """With the scores of each value under `mae NAME` and `r2 NAME`, if there are several."""
        each = scores.get("per_value", ())
        own = {f"{name} {row['name']}": row[name] for row in each for name in ("mae", "r2") if row[name] is not None}
        return {**super().printed_scores(scores), **(own if len(each) > 1 else {})}

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        from vitrail.tasks.regress.report import sections

        return sections(run)

    def config(self) -> dict[str, Any]:
        units = None if self.units is None else [list(numbers) for numbers in self.units]
        return {**super().config(), "values": self.values, "units": units}


def units_of(target: Numbers) -> Units:
    """Those of a training split. UserError for a value that is the same in all images."""
    std, mean = torch.std_mean(target.values, dim=0, correction=0)
    for name, least, most in zip(target.names, target.values.amin(0), target.values.amax(0), strict=True):
        if least == most:
            raise UserError(
                f"{name} is {short(float(least))} in all training images, so there is nothing to learn: leave the "
                "column out, or choose others with --values"
            )
    return Units(tuple(mean.tolist()), tuple(std.tolist()))


def _head_in_other_units(state: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Weights whose head gives its outputs times `scale` [V] plus `shift` [V], computed in double precision."""
    changed = dict(state)
    for name in ("head.linear", "head.distillation"):  # the second is DeiT's, averaged with the first
        if f"{name}.weight" not in state:
            continue
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        scale, shift = scale.to(weight.device), shift.to(weight.device)
        changed[f"{name}.weight"] = (weight.double() * scale[:, None]).to(weight.dtype)
        changed[f"{name}.bias"] = (bias.double() * scale + shift).to(bias.dtype)
    return changed
