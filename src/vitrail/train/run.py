"""A run: everything that defines a training run, as plain data. Recipes return one; every field is a flag."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from vitrail.data.augment import Augment
from vitrail.errors import UserError, require_choices
from vitrail.plain import describe, flat_fields, from_description, rebuild
from vitrail.tasks import TASKS, task_class
from vitrail.tasks.encoder import KINDS, EncoderConfig
from vitrail.tasks.values import Settings
from vitrail.train.device import Precision
from vitrail.train.optim import Optim
from vitrail.train.tune import Tune
from vitrail.variants import as_variant, simplest
from vitrail.variants.initial import Initial
from vitrail.vit import ViTConfig

LENGTH = ("epochs", "max_steps")
"""fields that extend a run"""
MEANS = ("save_every", "keep", "workers", "max_bad", "tensorboard")
"""fields on which no result of a run depends"""
FREE = (*LENGTH, "patience", *MEANS)
"""fields of a run that may change when it is resumed: no step before its old end depends on them"""
FAST_STEPS, FAST_IMAGES = 3, 8
"""steps of a fast dev run, and the images that it reads of each split"""


def _first_task() -> Settings:
    """The default task of a recipe: the first of `TASKS`."""
    return task_class(next(iter(TASKS))).settings()


@dataclass(frozen=True)
class Run:
    """One training run."""

    recipe: str
    """name of the recipe that these values came from"""
    data: str
    """a built-in name, a folder with one folder per class, or Parquet files"""
    task: Settings = field(default_factory=_first_task)
    """the task and its training settings"""
    model: EncoderConfig = field(default_factory=ViTConfig)
    """the encoder; with `init`, only its image size and drop path are used"""
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    tune: Tune = field(default_factory=Tune)
    attention_init: Literal["xavier", "mimetic"] = "xavier"
    """initialisation of attention. mimetic: like trained models, which helps on small data (arXiv 2305.09828)"""
    weights_init: Initial = "google"
    """initial weights. google: the paper's code; big-vision: positions of standard deviation 1 / sqrt(width); deit:
    matrices of standard deviation 0.02, the head's too (DeiT-III)"""
    init: str | None = None
    """pretrained weights to start from: a run, a checkpoint, or the name of bundled weights"""
    group: str | None = None
    """keep all images of a group (a slide, patient or day) in the same split: parent, a regular expression on the path
    inside the data folder, or a CSV file with the columns image and group"""
    seed: int = 0
    """of the initial weights, the order of the images and their augmentation"""
    epochs: float = 10.0
    """passes over the training images"""
    max_steps: int | None = None
    """number of optimizer steps, instead of `epochs`; the schedule covers them"""
    fast_dev_run: bool = False
    """test the whole pipeline in seconds: 3 steps on 8 images per split, without compiling. Scores mean nothing"""
    batch_size: int = 128
    """images per optimizer step"""
    accumulate: int | Literal["auto"] = 1
    """gradient accumulation: micro-batches per optimizer step; more of them need less memory. auto: on a CUDA GPU the
    fewest that fit in its memory, found when the run starts, elsewhere 1"""
    early_size: int | None = None
    """progressive resizing: short side in pixels of the training images in early steps, which are faster (arXiv
    2104.00298, section 4); None for full size throughout"""
    early: float = 0.6
    """fraction of the steps that use `early_size`"""
    mean: tuple[float, ...] | None = None
    """normalisation mean per channel, for pixels in [0, 1]; None: the checkpoint's, or 0.5"""
    std: tuple[float, ...] | None = None
    """normalisation standard deviation per channel; None: the checkpoint's, or 0.5"""
    resize: Literal["crop", "squash", "letterbox"] | None = None
    """for other aspect ratios. crop: center crop; squash: ignore the aspect ratio; letterbox: show the whole image,
    between bars; None: the checkpoint's, or crop"""
    crop_fraction: float | None = None
    """fraction of the short side that the center crop keeps at evaluation; None: the checkpoint's, or 1"""
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    """interpolation for resizing; None: the checkpoint's, or bicubic"""
    precision: Precision = "auto"
    """number format for training; auto: bf16 if the device supports it natively, else fp16 on a GPU with tensor cores,
    else fp32. In fp16 the loss is scaled. Evaluation uses fp32"""
    compile: bool = False
    """compile the network with torch.compile"""
    cuda_graphs: bool = False
    """with `compile` on a CUDA device: record the compiled network as CUDA graphs, so that a step launches few kernels;
    for small networks and batches of one size"""
    eval_every: float = 1.0
    """epochs between evaluations on the validation split"""
    patience: int | None = None
    """early stopping: end after so many evaluations without a better score; None: train all steps"""
    save_every: int | None = None
    """steps between saved states, which are also saved at evaluations and every five minutes; None: only then"""
    keep: int = 2
    """saved states to keep: if the newest is damaged, the one before is used"""
    workers: int = 2
    """worker processes that decode images, if the data set does not fit in memory"""
    memory: bool | None = None
    """keep decoded images in memory; None: decide by their size when the run starts"""
    max_bad: float = 0.01
    """largest fraction of unreadable images to tolerate"""
    tensorboard: bool = False
    """also write the log of the run for TensorBoard, to `tensorboard/` in its folder"""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("batch_size", "accumulate", "keep"):
            if (number := getattr(self, name)) != "auto" and number < 1:
                raise UserError(f"{name} must be at least 1, got {number}")
        for name in ("epochs", "eval_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("early", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be a fraction from 0 to 1, got {getattr(self, name)}")
        if self.weights_init == "deit" and self.attention_init == "mimetic":
            raise UserError("weights_init deit sets attention as well: add --attention-init xavier")
        if self.cuda_graphs and self.accumulate != 1:
            raise UserError("cuda_graphs records one batch per step: remove --accumulate, or add --no-cuda-graphs")
        for name in ("max_steps", "patience", "save_every"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"{name} must be at least 1, got {number}")
        if self.workers < 0:
            raise UserError(f"workers must not be negative, got {self.workers}")
        patch = getattr(self.model, "patch", 1)
        if self.early_size is not None and (self.early_size < 1 or self.early_size % patch):
            raise UserError(f"early_size must be a multiple of the patch size {patch}, got {self.early_size}")

    @property
    def early_shape(self) -> tuple[int, int] | None:
        """Height and width in early steps: the shape of the images, rounded to whole patches."""
        patch, (height, width) = getattr(self.model, "patch", 1), self.model.image_size
        if self.early_size is None or self.early_size >= min(height, width):
            return None
        scale = self.early_size / min(height, width) / patch
        return round(height * scale) * patch, round(width * scale) * patch

    def steps(self, per_epoch: int) -> int:
        """The number of training steps, with `per_epoch` steps per epoch."""
        steps = self.max_steps or max(1, round(self.epochs * per_epoch))
        return min(steps, FAST_STEPS) if self.fast_dev_run else steps

    @property
    def images(self) -> int | None:
        """The number of images to read of each split; None for all."""
        return FAST_IMAGES if self.fast_dev_run else None

    @property
    def network(self) -> str:
        """The kind of the encoder, for messages: ViT for the paper's and its variants, CNN, ..."""
        kind = ViTConfig if isinstance(self.model, ViTConfig) else type(self.model)
        return kind.__name__.removesuffix("Config")

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
        """A hash of the values that differ from the defaults: new fields do not change it, edits of the recipe do.

        If you change a default, set the old value in the measured recipes, or measure them again.
        """
        return hashlib.sha256(json.dumps(_chosen(self), sort_keys=True).encode()).hexdigest()[:16]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Run:
        """The run of a `recipe.json`."""
        values = dict(values)
        entries = dict(values.pop("task"))
        task = rebuild(task_class(entries.pop("kind")).settings, entries)
        model = from_description(values.pop("model"), KINDS, "vit")
        return rebuild(Run, {**values, "task": task, "model": model})


def with_fields(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run with these fields changed, its own or its components'. UserError for an unknown field."""
    whole = replace(run, model=as_variant(run.model)) if isinstance(run.model, ViTConfig) else run
    known = flat_fields(whole)
    for name in changes:
        if name not in known:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} does not apply to this run's model ({run.network}): leave it out")
    changed: Run = replaced(run, changes)
    return changed


def replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    """A dataclass, of a run or of its components, with those of the changes that are fields of it."""
    if isinstance(value, ViTConfig):
        whole = as_variant(value)
        own = {entry.name: changes[entry.name] for entry in fields(whole) if entry.name in changes}
        return simplest(replace(whole, **own)) if own else value
    own = {}
    for entry in fields(value):
        old = getattr(value, entry.name)
        new = replaced(old, changes) if is_dataclass(old) else changes.get(entry.name, old)
        if new is not old:
            own[entry.name] = new
    return replace(value, **own) if own else value


def changed_fields(before: Any, after: Any) -> list[str]:
    """The fields that differ, of a run and of its nested dataclasses."""
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
    """A dataclass as its name and the fields that differ from their defaults; other values unchanged."""
    if not is_dataclass(value):
        return value
    chosen: dict[str, Any] = {"": type(value).__name__}
    for entry in fields(value):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if (own := getattr(value, entry.name)) != default:
            chosen[entry.name] = _chosen(own)
    return chosen
