"""A run: everything that decides what a training does, as plain data. Recipes return one; every field is a flag."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from vitrail.data.augment import Augment
from vitrail.errors import UserError
from vitrail.plain import describe, described, flat_fields, rebuild
from vitrail.tasks import TASKS, task_class
from vitrail.tasks.encoder import KINDS, EncoderConfig
from vitrail.tasks.task import Settings
from vitrail.train.optim import Optim
from vitrail.train.tune import Tune
from vitrail.variants import as_variant, simplest
from vitrail.vit import ViTConfig

FAST_STEPS, FAST_IMAGES = 3, 8
"""of a fast dev run: its steps, and the images of each split that it reads"""


def _first_task() -> Settings:
    """What a recipe that names no task trains: the first of `TASKS`."""
    return task_class(next(iter(TASKS))).settings()


@dataclass(frozen=True)
class Run:
    """One training."""

    recipe: str
    """name of the recipe that these values came from"""
    data: str
    """a built-in name, a folder with one folder per class, or Parquet files"""
    task: Settings = field(default_factory=_first_task)
    """the job, and how it is trained"""
    model: EncoderConfig = field(default_factory=ViTConfig)
    """the encoder; with `init`, only its image size and drop path count"""
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    tune: Tune = field(default_factory=Tune)
    attention_init: Literal["xavier", "mimetic"] = "xavier"
    """mimetic: start attention as trained models have it, which helps small data (arXiv 2305.09828)"""
    init: str | None = None
    """start from these weights: a run, a checkpoint, or the name of bundled weights"""
    group: str | None = None
    """keep images of one slide, patient or day on one side of the validation split: parent, a regular expression on
    the path below the data, or a CSV file with the columns image and group"""
    seed: int = 0
    epochs: float = 10.0
    max_steps: int | None = None
    """train for so many steps, whatever `epochs` says; the schedule spans them"""
    fast_dev_run: bool = False
    """try everything within seconds: 3 steps on 8 images of each split, without compiling. Its scores mean nothing"""
    batch_size: int = 128
    """images a step"""
    accumulate: int = 1
    """parts that a step's images are cut into, to need less memory"""
    early_size: int | None = None
    """short side in pixels that larger images are shrunk to at first: quicker steps (arXiv 2104.00298, section 4)"""
    early: float = 0.6
    """share of the steps that read images of `early_size`"""
    mean: tuple[float, ...] | None = None
    """of each channel, on a scale of 0 to 1; None for the checkpoint's, or 0.5"""
    std: tuple[float, ...] | None = None
    resize: Literal["crop", "squash"] | None = None
    """images of other shapes are cropped in the middle, or squashed; None for the checkpoint's, or crop"""
    crop_fraction: float | None = None
    """share of the short side that the crop at evaluation keeps; None for the checkpoint's, or 1"""
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    """None for the checkpoint's, or bicubic"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """that training computes in; auto: bf16 where the processor computes it, fp32 elsewhere. Scores are in fp32"""
    compile: bool = False
    """compile the network with torch.compile"""
    eval_every: float = 1.0
    """epochs between evaluations on the validation part"""
    workers: int = 2
    """processes that decode images, where the set does not fit in memory"""
    memory: bool | None = None
    """keep the decoded images in memory; None decides by their size when the run begins"""
    max_bad: float = 0.01
    """largest share of images that cannot be read"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "eval_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("early", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.workers < 0:
            raise UserError(f"workers must not be negative, got {self.workers}")
        patch = getattr(self.model, "patch", 1)
        if self.early_size is not None and (self.early_size < 1 or self.early_size % patch):
            raise UserError(f"early_size must be a multiple of the patch size {patch}, got {self.early_size}")

    @property
    def early_shape(self) -> tuple[int, int] | None:
        """Height and width at first: the shape of the images, as near as whole patches come to it."""
        patch, (height, width) = getattr(self.model, "patch", 1), self.model.image_size
        if self.early_size is None or self.early_size >= min(height, width):
            return None
        scale = self.early_size / min(height, width) / patch
        return round(height * scale) * patch, round(width * scale) * patch

    def steps(self, per_epoch: int) -> int:
        """How many steps training takes, where an epoch has `per_epoch`."""
        steps = self.max_steps or max(1, round(self.epochs * per_epoch))
        return min(steps, FAST_STEPS) if self.fast_dev_run else steps

    @property
    def images(self) -> int | None:
        """How many images of each split are read; None for all."""
        return FAST_IMAGES if self.fast_dev_run else None

    @property
    def compiled(self) -> bool:
        """Whether the network is compiled, which takes a minute."""
        return self.compile and not self.fast_dev_run

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `recipe.json`."""
        return {
            **asdict(self),
            "task": {"kind": self.task.name, **asdict(self.task)},
            "model": describe(self.model, KINDS),
        }

    @property
    def fingerprint(self) -> str:
        """Of all that is not as by default: a field that is added later changes none, and a recipe that is edited does.

        Whoever changes a default sets the old one in the recipes that have been measured, or measures them anew.
        """
        return hashlib.sha256(json.dumps(_chosen(self), sort_keys=True).encode()).hexdigest()[:16]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Run:
        """The run of a `recipe.json`."""
        values = dict(values)
        entries = dict(values.pop("task"))
        task = rebuild(task_class(entries.pop("kind")).settings, entries)
        model = described(values.pop("model"), KINDS, "vit")
        return rebuild(Run, {**values, "task": task, "model": model})


def with_fields(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run with these fields of its own, or of its components, changed. UserError for one that it does not have."""
    whole = replace(run, model=as_variant(run.model)) if isinstance(run.model, ViTConfig) else run
    known = flat_fields(whole)
    for name in changes:
        if name not in known:
            flag, model = f"--{name.replace('_', '-')}", type(run.model).__name__.removesuffix("Config")
            raise UserError(
                f"{flag} does not apply to the model that this run trains, of the kind {model}: leave it out"
            )
    try:
        changed: Run = _replaced(run, changes)
    except ValueError as error:  # of data/, which knows no UserError
        raise UserError(str(error)) from None
    return changed


def _replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    if isinstance(value, ViTConfig):
        whole = as_variant(value)
        own = {entry.name: changes[entry.name] for entry in fields(whole) if entry.name in changes}
        return simplest(replace(whole, **own)) if own else value
    own = {}
    for entry in fields(value):
        old = getattr(value, entry.name)
        new = _replaced(old, changes) if is_dataclass(old) else changes.get(entry.name, old)
        if new is not old:
            own[entry.name] = new
    return replace(value, **own) if own else value


def changed_fields(before: Any, after: Any) -> list[str]:
    """The fields of a run and of its parts that differ."""
    if isinstance(before, ViTConfig) and isinstance(after, ViTConfig):
        before, after = as_variant(before), as_variant(after)
    names: list[str] = []
    for entry in fields(before):
        old, new = getattr(before, entry.name), getattr(after, entry.name)
        if is_dataclass(old) and (isinstance(old, type(new)) or isinstance(new, type(old))):
            names += changed_fields(old, new)
        elif old != new:
            names.append(entry.name)
    return names


def _chosen(value: Any) -> Any:
    """Of a dataclass its name and what differs from its defaults; anything else as it is."""
    if not is_dataclass(value):
        return value
    chosen: dict[str, Any] = {"": type(value).__name__}
    for entry in fields(value):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if (own := getattr(value, entry.name)) != default:
            chosen[entry.name] = _chosen(own)
    return chosen
