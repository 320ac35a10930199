"""The contract of a task: what the loop, evaluation, the command line, reports and export use.

A task is a module with an encoder, a loss, an answer and a score. `vitrail.tasks.TASKS` names them all; nothing outside
`tasks/`, `recipes/` and the readers of `zoo/` knows a particular one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vitrail.data.preprocess import AnyImage, Preprocess, as_list
from vitrail.data.random import uniform_by_key
from vitrail.data.targets import Labels, Target
from vitrail.errors import UserError
from vitrail.html import examples
from vitrail.ops import stochastic_depth
from vitrail.tasks.answers import answer_all, one_frame_each
from vitrail.tasks.checkpoint import take_fitting, write
from vitrail.tasks.exported import Engine, Program, run_whole, whole
from vitrail.tasks.values import NoOptions, Score, Section, Settings, UsedWith
from vitrail.vit import Tokens

if TYPE_CHECKING:
    from vitrail.data.augment import Augment
    from vitrail.data.loader import Loader
    from vitrail.data.prepare import Draw, Prepare, Sample, View
    from vitrail.data.sets import ImageSet, Splits
    from vitrail.tasks.values import Batch, Checkpoint, Features, Metric, Piece, Portable, Prediction

DROP_PATH = 0
"""stream of random numbers of stochastic depth (see `uniform_by_key`)"""


class Task(nn.Module):
    """One job. A batch is a dict; its keys are in the docstring of each task."""

    name: ClassVar[str]
    """what `config.json` calls the task"""
    settings: ClassVar[type[Settings]] = Settings
    """dataclass of the fields that a recipe may set"""
    target: ClassVar[type[Target]] = Labels
    """what its samples carry beside their images, which also opens its data"""
    options: ClassVar[type[Any]] = NoOptions
    """dataclass of the flags of `vitrail predict` and `vitrail eval`"""
    score: ClassVar[Score | None] = None
    """chooses the best checkpoint; None for a task that is not scored"""
    val_loss: ClassVar[str] = "loss"
    """the entry of the metric that is comparable with the loss in training, where there is one"""
    train_score: ClassVar[str] = ""
    """the entry of the loss that is comparable with the score, where there is one"""
    whole_batch: bool = False
    """the loss does not split over a batch: accumulation is refused, and processes join through `gather`"""
    whole_split: ClassVar[bool] = False
    """`evaluate` uses no metric, whose states merge: each of several processes evaluates the whole split"""
    metric_reads: ClassVar[Literal["outputs", "answers"]] = "outputs"
    """what the metric is updated with: what `forward` gives for a batch, or what `answer` does"""
    headless: ClassVar[bool] = False
    """an encoder and nothing after it, which the weights of any task hold (see `with_classes`)"""
    solved: ClassVar[tuple[str, ...]] = ()
    """methods of fine-tuning that leave the encoder unchanged and compute the rest from its features (see `solve`)"""
    free: ClassVar[tuple[str, ...]] = ()
    """settings that may change when training continues from weights of this task; the others are in the weights"""
    unused_when_frozen: ClassVar[tuple[str, ...]] = ()
    """settings that such a method makes no use of"""
    used_with: ClassVar[UsedWith] = {}
    """settings that only some values of another one use"""
    streams: ClassVar[bool] = False
    """`stream` tells an answer while it is made"""

    preprocess: Preprocess
    classes: Sequence[str]
    """names of the classes; empty for a task without"""
    encoder: Any
    """an `Encoder`, or another module that takes images to `Tokens`"""
    option: Any
    """an instance of `options`"""
    frozen: Sequence[nn.Module] = ()
    """modules that stay in evaluation mode in training, since nothing of them changes"""

    # Making one

    def __init__(self) -> None:
        super().__init__()
        self.classes = []
        self.option = self.options()

    @classmethod
    def create(cls, settings: Any, encoder: Any, splits: Splits, preprocess: Preprocess) -> Self:
        """A new task around an encoder, for the classes, words, ... of the training split."""
        raise UserError(f"the task {cls.name} has nothing to train: choose a recipe of another task")

    @classmethod
    def continues(cls, settings: Any, loaded: Task) -> bool:
        """Whether training from the weights of `loaded` continues that very task, and not its encoder alone."""
        return False

    @classmethod
    def merged(cls, settings: Any, loaded: Task) -> Any:
        """The settings of a run that starts from `loaded`, with what those weights fix. UserError where they clash."""
        return settings

    @classmethod
    def adopt(cls, settings: Any, loaded: Task, splits: Splits, preprocess: Preprocess) -> Self:
        """A new task around the encoder of `loaded`; of its own kind and classes, also with every weight that fits."""
        task = cls.create(settings, loaded.encoder, splits, preprocess)
        if type(loaded) is cls and list(loaded.classes) == list(task.classes):
            take_fitting(task, loaded.state_dict())
        return task

    @classmethod
    def check(cls, settings: Any, method: str) -> None:
        """Refuse settings that do not go with a method of fine-tuning, in one line."""

    @classmethod
    @abstractmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        """The task of a checkpoint's `config.json`, with new weights."""

    def with_classes(self, classes: list[str]) -> Task:
        """The same encoder with a fresh head for other classes, or without a head if there are none."""
        from vitrail.tasks.embed import Embed
        from vitrail.tasks.encoder import encoder_of

        if classes:
            raise UserError(f"the task {self.name} has no classes to change: load it with task='embed' for its encoder")
        return Embed(encoder_of(self), self.preprocess)

    # From an image to an answer

    @property
    def views(self) -> tuple[View, ...]:
        """What a sample becomes; one image of the preprocessing's size for most tasks."""
        from vitrail.data.prepare import View

        return (View(1, self.preprocess.size),)

    def prepare(self, image: AnyImage, augment: Augment | None = None, draw: Draw | None = None) -> Sample:
        """An image as the model takes it but for `preprocess.normalise`, with the affine from the original.

        Evaluation, prediction and figures see the same pixels. With a `draw` (seed, epoch, sample) it is prepared as
        training does in that epoch, by `augment`.
        """
        from vitrail.data.prepare import prepare  # imports torchvision, which takes seconds: loading does without

        return self.frames(image) if draw is None else prepare(image, self.preprocess, augment, draw)

    def frames(self, image: AnyImage) -> Sample:
        """What evaluation and prediction see of an image: one frame of the preprocessing's size.

        Tasks that see tiles, flips or the whole image at its own aspect ratio override it; sizes of frames may differ.
        """
        from vitrail.data.prepare import prepare

        return prepare(image, self.preprocess)

    @property
    def framed(self) -> bool:
        """Whether `frames` is the task's own."""
        return type(self).frames is not Task.frames

    def preparation(self, train: bool) -> Prepare | None:
        """`prepare` where a task has its own; None where it is the preprocessing's, which batches are made by."""
        return self.prepare if type(self).prepare is not Task.prepare or (not train and self.framed) else None

    @abstractmethod
    def forward(self, *inputs: Any, **named: Any) -> Tensor | dict[str, Tensor]:
        """Raw outputs under fixed names: what export and compile see."""

    @abstractmethod
    def features(self, images: Tensor) -> Tokens:
        """Tokens as they enter the pooling, for normalised images [B, C, H, W]."""

    def answer(self, batch: Batch) -> list[Prediction]:
        """Prepared tensors in, answers out."""
        raise UserError(f"the task {self.name} gives no answers: train another task from its encoder")

    @torch.inference_mode()
    def answers(self, prepared: Sequence[Sample]) -> list[Prediction]:
        """One answer for each image as `prepare` gives it. Leaves the task in eval mode.

        `answer` gets the frames of images in a row, with their affines joined, whose `image_of` tells the image of
        each. Images whose frames have different sizes are answered in different batches.
        """
        return answer_all(self.eval(), prepared)

    @torch.inference_mode()
    def stream(self, prepared: Sample, tell: Callable[[str], None]) -> Prediction:
        """One answer as `answers` gives it, of a task that `streams`: `tell` gets the text so far, which may change."""
        return answer_all(self.eval(), [prepared], tell)[0]

    def predict(self, images: AnyImage | Sequence[AnyImage], batch_size: int = 32) -> list[Prediction]:
        """One answer per image, in a list, for one image or several: anything that `Preprocess.prepare` accepts.

        One batch is prepared at a time. An image that PIL has opened and not loaded is read as `vitrail predict` reads
        the file, and stays unloaded. Leaves the task in eval mode.
        """
        given = as_list(images)
        batches = (given[start : start + batch_size] for start in range(0, len(given), batch_size))
        return [answer for batch in batches for answer in self.answers([self.prepare(image) for image in batch])]

    def outputs_for(self, batch: Batch) -> Any:
        """What `forward` gives for a batch of evaluation, with one row per image, which a metric reads."""
        return self(one_frame_each(batch))

    def choose(self, changes: Mapping[str, Any]) -> None:
        """Set fields of `option`, as the flags of `predict` and `eval` ask. UserError where the model cannot."""
        known = {entry.name for entry in fields(self.options)}
        if foreign := [name for name in changes if name not in known]:
            flag = foreign[0].replace("_", "-")
            raise UserError(f"--{flag} is not an option of this model's task, {self.name}: leave it out")
        self.option = replace(self.option, **changes)

    def data_options(self) -> dict[str, Any]:
        """Keyword arguments with which `target` opens a data set to score; in training, those of `settings`."""
        return {}

    # Training and scores

    @abstractmethod
    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """`loss` as a sum over `count` items; the loop divides over all processes and accumulation steps.

        Other entries are sums over the same items, whose means are logged under their names. For a `whole_batch` loss,
        `gather` joins the rows of all processes, by rank; it is None if there is one process.
        """

    def encode_target(self, target: Target) -> Target:
        """The target as the loss reads it, such as captions as token ids."""
        return target

    def keep(self, batch: Batch) -> Tensor | None:
        """Stochastic depth's factors [B, depth, 2], by (seed, epoch, sample); None where no branch is ever skipped.

        So a sample's network is the same whatever else is in its batch. Blocks in evaluation mode, which do not learn,
        are never skipped. A batch without a `key` leaves the draw to the encoder, by torch's generator.
        """
        rate = getattr(self.encoder.config, "drop_path", 0.0)
        if not self.training or not rate or "key" not in batch:
            return None
        blocks = self.encoder.blocks
        draws = uniform_by_key(batch["key"], batch["sample"], 2 * len(blocks), DROP_PATH)
        keep = stochastic_depth(rate, draws.view(-1, len(blocks), 2))
        for i, block in enumerate(blocks):
            if not block.training:
                keep[:, i] = 1.0
        return keep

    @property
    def draws(self) -> bool:
        """Whether the loss draws from torch's generator, as dropout does: each step of training seeds it then."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    def after_step(self, step: int, steps: int) -> None:
        """Called after each step of training: for a teacher's average, a centre."""

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> Metric:
        """A new metric, for the split `data` of any set; during training it is for the run's own.

        `train` is the set's training split, for scores that compare with it.
        """
        raise UserError(f"the task {self.name} has no score")

    @classmethod
    def human(cls, data: ImageSet) -> dict[str, Any]:
        """The scores of a split's own answers, each against the image's others: what people agree on."""
        raise UserError(f"the data of the task {cls.name} has one answer per image, and no others to compare it with")

    def evaluate(
        self,
        loaders: Mapping[str, Loader],
        split: str = "val",
        metric: Callable[[], Metric] | None = None,
        final: bool = False,
    ) -> dict[str, Any]:
        """The scores of a split: a metric on every batch of its loader. Tasks that probe or sample override it.

        A probe learns from `loaders["train"].evaluation()`. `metric` makes the metric, by default the run's. `final`
        is False while a run trains, when scores that take longer are left out.
        """
        found = self.metric() if metric is None else metric()
        for batch in loaders[split].evaluation():
            found.update(batch, self.answer(batch) if self.metric_reads == "answers" else self.outputs_for(batch))
        return found.compute()

    @classmethod
    def collapsed(cls, scores: Mapping[str, Any]) -> str | None:
        """In words, what all answers of an evaluation have in common although they should differ; None if they do."""
        return None

    def prepare_to_solve(self, method: str, images: int) -> None:
        """Make ready for a method of `solved` on so many training images. UserError where the model cannot."""
        raise UserError(f"method {method} is not for the task {self.name}: choose frozen, full, lora or last-blocks")

    def solve(self, method: str, train: Features, val: Callable[[], Features]) -> list[dict[str, float]]:
        """Compute what follows the frozen encoder. Returns a row per setting tried, which is logged.

        The row that was chosen also has the scores of the training split, under names that begin with `train_`.
        """
        raise NotImplementedError(method)

    def probe(self, train: Features, val: Features, scored: Features, classes: int) -> dict[str, float]:
        """Scores of frozen features: of classifiers that learn from `train` and whose settings are chosen on `val`.

        For tasks without a metric, in `evaluate`, and for `vitrail eval --probe`.
        """
        from vitrail.tasks.classify.probe import probe

        return probe(train, val, scored, classes)

    # What others ask

    @property
    def outputs(self) -> list[str]:
        """The names of what `forward` gives, [B, K], where that is a number per name."""
        return []

    @property
    def portable(self) -> Portable | None:
        """What other libraries' checkpoints store of it: an encoder, alone or with a head. None if they cannot."""
        return None

    def portable_state(self) -> dict[str, Tensor]:
        """The weights as other libraries' checkpoints store them."""
        return self.state_dict()

    def components(self) -> dict[str, nn.Module]:
        """The modules that prediction calls; `answer` calls only these."""
        return {"model": self}

    def programs(self, batch: Batch) -> dict[str, Program]:
        """What export writes, with example inputs from a batch (see `vitrail.tasks.exported`)."""
        return whole(self, batch)

    def run_programs(self, engines: Mapping[str, Engine], outputs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """`components` that call the engines of `programs`, whose outputs have these names."""
        return {"model": run_whole(engines["model"], outputs["model"])}

    def tables(self) -> dict[str, nn.Module]:
        """Modules that are no programs: an export stores their tensors unchanged."""
        return {}

    def explained(self, batch: Batch, outputs: Sequence[int] | None = None) -> Tensor:
        """The scalars [B] that relevance maps explain, such as the logit of the best class; or with the numbers of
        some `explainable` outputs, one scalar for each: [B, outputs]."""
        raise UserError(f"the task {self.name} has no output to explain")

    def explainable(self, batch: Batch) -> list[tuple[int, str]]:
        """Number and name of the outputs that the answer for the first image consists of, such as its best classes."""
        return []

    def pieces(self, batch: Batch) -> list[list[Piece]]:
        """The pieces of each answer and where they were read from, for tasks that answer piece by piece."""
        return []

    @classmethod
    def printed_scores(cls, scores: Mapping[str, Any]) -> dict[str, float]:
        """The scores that `vitrail eval` prints without `--json`, by name: by default those that are one number."""
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        """The task's own sections of a run's page, from what the run folder holds (`vitrail.report.RunRecord`).

        One without a title holds cards (`vitrail.html.card`), which are shown at the top of the page. The default shows
        the examples: images, or where the target is spatial the figures of `Prediction.draw`, with their text.
        """
        return [Section("Example predictions", examples(run.examples))]

    # Files

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What `config.json` holds beside `task`, `preprocess` and `classes`: plain data to rebuild it from."""

    def files(self) -> dict[str, str]:
        """Texts that stand beside `config.json` in a checkpoint, by file name."""
        return {}

    def save(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the folder `path`: `model.safetensors` and `config.json`, whole or not at all.

        `weights` are written in place of the task's own, where given.
        """
        write(self, Path(path), self.state_dict() if weights is None else weights)

    def train(self, mode: bool = True) -> Self:
        """As any module's, but for the frozen modules."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self
