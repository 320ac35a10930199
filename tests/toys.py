"""Small tasks that use the hooks whose first users come later: masks, boxes, views, a teacher, a whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

from vitrail.data.affine import Affine, tiles
from vitrail.data.boxes import Boxes
from vitrail.data.masks import Masks
from vitrail.data.prepare import Sample, View, pixels_of, size_of
from vitrail.data.preprocess import AnyImage, Preprocess
from vitrail.data.sets import ImageSet, Splits
from vitrail.sizes import SIZES
from vitrail.tasks.encoder import Encoder, encoder_for
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Checkpoint, Prediction, Score, Section, Settings
from vitrail.vit import Tokens


class Toy(Task):
    """What the toys share: a nano encoder and its bookkeeping."""

    def __init__(self, encoder: Encoder | None = None, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.encoder = encoder or encoder_for(SIZES["nano/2"])
        self.preprocess = preprocess or Preprocess(size=(8, 8))

    @classmethod
    def create(cls, settings: Any, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        return cls(encoder, preprocess)

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        return cls(preprocess=Preprocess.from_dict(config["preprocess"]))

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def config(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Segments(Prediction):
    """The class of every pixel of an image."""

    mask: Tensor
    """int64 [H, W], at the size of the original; -1 where no frame shows the pixel"""

    def row(self) -> dict[str, Any]:
        return {"segments": self.mask.unique().tolist()}

    def text(self) -> str:
        return f"{len(self.mask.unique())} segments"

    def draw(self, image: Image.Image) -> Image.Image:
        assert (image.height, image.width) == self.mask.shape
        return Image.fromarray((self.mask.clamp(min=0) * 255).to(torch.uint8).numpy()).convert("RGB")


@dataclass(frozen=True)
class Windows:
    """How the whole image is covered."""

    overlap: float = 0.25


@dataclass(frozen=True)
class DenseSettings(Settings):
    name = "dense"


class Dense(Toy):
    """Light or dark, per pixel: a dense task whose images are covered by tiles and flips in evaluation."""

    name = "dense"
    settings = DenseSettings
    options = Windows
    target = Masks
    score = Score("pixel_accuracy")
    metric_reads = "answers"

    def __init__(self, encoder: Encoder | None = None, preprocess: Preprocess | None = None) -> None:
        super().__init__(encoder, preprocess)
        self.classes = ["dark", "light"]
        self.head = nn.Linear(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, 2, H, W]: brightness decides, so that an answer is right by construction."""
        light = images.mean(dim=1, keepdim=True) * (1 + 0 * self.head.weight.sum())
        return torch.cat([-light, light], dim=1)

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        mask = batch["mask"]
        losses = F.cross_entropy(self(batch["image"]), mask, ignore_index=255, reduction="sum")
        return {"loss": losses, "count": (mask != 255).sum()}

    def frames(self, image: AnyImage) -> Sample:
        """Sliding windows over the whole image, each also flipped."""
        opened = self.preprocess.open(image)
        affine = tiles(size_of(opened, self.preprocess), self.preprocess.size, self.option.overlap)
        frames = []
        for x1, y1, x2, y2 in affine.window.round().long().tolist():
            frames.append(pixels_of(opened, (y1, x1, y2 - y1, x2 - x1), self.preprocess))
        both = affine.with_flips()
        return Sample(torch.stack([*frames, *[frame.flip(-1) for frame in frames]]), both)

    def answer(self, batch: Batch) -> list[Prediction]:
        """Back through the affine: several frames of an image give one answer, at the size of the original."""
        merged = batch["affine"].merge(self(batch["image"]))
        return [Segments(dense.logits.argmax(dim=0).masked_fill(dense.seen == 0, -1)) for dense in merged]

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> PixelAccuracy:
        return PixelAccuracy()

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        return [Section("Segments", "<p>light and dark</p>")]


@dataclass
class PixelAccuracy:
    """At the original size, against the masks as they were read."""

    rows: dict[int, tuple[int, int]] = field(default_factory=dict)

    def update(self, batch: Batch, answers: Sequence[Any]) -> None:
        for sample, answer, truth in zip(batch["sample"].tolist(), answers, batch["truth"], strict=True):
            assert answer.mask.shape == truth.indices.shape
            counted = (truth.indices != 255) & (answer.mask >= 0)
            right = (answer.mask == truth.indices) & counted
            self.rows[sample] = (int(right.sum()), int(counted.sum()))

    def state(self) -> dict[str, Tensor]:
        return {"rows": torch.tensor([[sample, *row] for sample, row in sorted(self.rows.items())])}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.rows |= {sample: (right, count) for sample, right, count in state["rows"].tolist()}

    def compute(self) -> dict[str, Any]:
        right, count = (sum(row[i] for row in self.rows.values()) for i in (0, 1))
        return {"pixel_accuracy": right / count, "count": len(self.rows)}


COLOURS = ["red", "green"]


class Rectangles(Boxes):
    """At most one red and one green rectangle per image: made up, whatever data is named."""

    @classmethod
    def open_splits(cls, *args: Any, **options: Any) -> Splits:
        generator = torch.Generator().manual_seed(9)
        images, boxes, labels = [], [], []
        for i in range(12):
            sides = torch.randint(20, 70, (2,), generator=generator)
            image = torch.randint(0, 40, (3, *sides.tolist()), generator=generator).to(torch.uint8)
            colours = [[0], [1], [0, 1], []][i % 4 if i < 8 else 2]
            rows = []
            for colour in colours:
                corner = (torch.rand(2, generator=generator) * sides / 2).long()
                end = corner + (sides * (0.3 + 0.2 * torch.rand(2, generator=generator))).long()
                image[colour, corner[0] : end[0], corner[1] : end[1]] = 255
                rows.append([*corner.flip(0).tolist(), *end.flip(0).tolist()])
            images.append(image)
            boxes.append(torch.tensor(rows).view(-1, 4))
            labels.append(torch.tensor(colours, dtype=torch.int64))
        keys = [str(i) for i in range(12)]
        whole = ImageSet("rectangles", keys, images, cls(boxes, labels, keys, COLOURS))
        return Splits(whole.subset(range(8)), whole.subset([8, 9]), whole.subset([10, 11]))


@dataclass(frozen=True)
class Found(Prediction):
    """The rectangles of an image."""

    labels: list[str]
    boxes: Tensor
    """[M, 4], in pixels of the original"""

    def row(self) -> dict[str, Any]:
        boxes = zip(self.labels, self.boxes.tolist(), strict=True)
        return {"boxes": [{"label": label, "score": 1.0, "box": box} for label, box in boxes]}

    def text(self) -> str:
        return ", ".join(self.labels)


@dataclass(frozen=True)
class LocateSettings(Settings):
    name = "locate"
    any_encoder = True

    weight: float = 1.0
    """of the loss"""
    slots: int = 1
    """boxes per colour, which the weights hold"""


class Locate(Toy):
    """The box around each colour: a task with boxes, whose images are letterboxed in evaluation."""

    name = "locate"
    settings = LocateSettings
    target = Rectangles
    score = Score("mean_iou")
    metric_reads = "answers"
    val_loss = "distance"
    free = ("weight",)
    unused_when_frozen = ("weight",)

    def __init__(self, encoder: Encoder | None = None, preprocess: Preprocess | None = None) -> None:
        super().__init__(encoder, preprocess)
        self.preprocess = replace(self.preprocess, resize="letterbox")
        self.classes = COLOURS
        self.offset = nn.Parameter(torch.zeros(4))
        self.weight = 1.0

    @classmethod
    def create(cls, settings: Any, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        task = cls(encoder, preprocess)
        task.weight = settings.weight
        return task

    @classmethod
    def continues(cls, settings: Any, loaded: Task) -> bool:
        return isinstance(loaded, cls)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] to a box per colour, [B, 2, 4], by where the colour is bright; the offset is learned."""
        bright = images[:, :2] > 0.5
        edges = []
        for axis, side in ((2, images.shape[3]), (3, images.shape[2])):  # over rows for columns, and the reverse
            line = bright.any(dim=axis).long()
            edges.append((line.argmax(dim=-1) / side, 1 - line.flip(-1).argmax(dim=-1) / side))
        (x1, x2), (y1, y2) = edges
        return {"box": torch.stack([x1, y1, x2, y2], dim=-1) + self.offset, "score": bright.flatten(2).any(dim=2)}

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """The distance of each true box [B, M, 4] from that of its colour; padding, of class -1, does not count."""
        real = batch["box_class"] >= 0
        places = batch["box_class"].clamp(min=0)[..., None].expand(-1, -1, 4)
        distance = (self(batch["image"])["box"].gather(1, places) - batch["box"]).abs().mean(dim=-1)
        return {"loss": self.weight * (distance * real).sum(), "count": real.sum()}

    def answer(self, batch: Batch) -> list[Prediction]:
        outputs, affine = self(batch["image"]), batch["affine"]
        height, width = affine.size
        boxes = outputs["box"] * outputs["box"].new_tensor([width, height, width, height])
        boxes = affine.boxes_back(boxes, torch.arange(len(affine))[:, None])
        return [
            Found([COLOURS[i] for i in shown.nonzero()[:, 0].tolist()], rows[shown])
            for rows, shown in zip(boxes, outputs["score"], strict=True)
        ]

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> MeanIoU:
        return MeanIoU()


@dataclass
class MeanIoU:
    """Of each true box and the answer of its colour, in pixels of the original."""

    rows: dict[int, tuple[float, float, int]] = field(default_factory=dict)

    def update(self, batch: Batch, answers: Sequence[Any]) -> None:
        for sample, answer, truth in zip(batch["sample"].tolist(), answers, batch["truth"], strict=True):
            overlap, distance = 0.0, 0.0
            for box, label in zip(truth.boxes, truth.labels.tolist(), strict=True):
                if COLOURS[label] in answer.labels:
                    own = answer.boxes[answer.labels.index(COLOURS[label])].detach()
                    overlap += float(box_iou(own[None], box[None]))
                    distance += float((own - box).abs().mean())
            self.rows[sample] = (overlap, distance, len(truth.boxes))

    def state(self) -> dict[str, Tensor]:
        return {"rows": torch.tensor([[sample, *row] for sample, row in sorted(self.rows.items())])}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.rows |= {int(sample): (o, d, int(count)) for sample, o, d, count in state["rows"].tolist()}

    def compute(self) -> dict[str, Any]:
        overlap, distance, count = (sum(row[i] for row in self.rows.values()) for i in range(3))
        return {"mean_iou": overlap / count, "distance": distance / count, "count": len(self.rows)}


@dataclass(frozen=True)
class TeacherSettings(Settings):
    name = "teacher"


class Teacher(Toy):
    """Two large and two small views of an image, a teacher that is an average, and a probe in place of a metric.

    Its score is a distance: lower is better.
    """

    name = "teacher"
    settings = TeacherSettings
    whole_split = True
    score = Score("distance", best="min", unit="")

    def __init__(self, encoder: Encoder | None = None, preprocess: Preprocess | None = None) -> None:
        super().__init__(encoder, preprocess)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.frozen = [self.teacher]
        self.updates: list[tuple[int, int]] = []

    @property
    def views(self) -> tuple[View, ...]:
        return (View(2, self.preprocess.size), View(2, (4, 4)))

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.pool(self.encoder(images))

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted = self.teacher.pool(self.teacher(batch["views"][0]))
        losses = [(self(view) - wanted).square().mean(dim=1).sum() for view in batch["views"][1:]]
        count = torch.full((), len(wanted), device=wanted.device)
        return {"loss": torch.stack(losses).mean(), "count": count}

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.updates.append((step, steps))
        for average, value in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            average.lerp_(value, 0.1)

    def evaluate(
        self, loaders: Mapping[str, Any], split: str = "val", metric: Any = None, final: bool = False
    ) -> dict[str, Any]:
        """How far the features of the split are from the nearest of the training split."""
        means = [torch.cat([self(batch["image"]) for batch in loaders[name].evaluation()]) for name in ("train", split)]
        return {"distance": torch.cdist(means[1], means[0]).amin(dim=1).mean().item(), "count": len(means[1])}


@dataclass(frozen=True)
class MatchSettings(Settings):
    name = "twins"


class Twins(Toy):
    """Two views of an image are each other's match among all of the batch: the loss needs the whole batch."""

    name = "twins"
    settings = MatchSettings
    whole_split = True
    score = Score("distance", best="min", unit="")
    whole_batch = True

    @property
    def views(self) -> tuple[View, ...]:
        return (View(2, self.preprocess.size),)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder.pool(self.encoder(images)), dim=1)

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        one, other = (self(view) for view in batch["views"])
        if gather is not None:
            one, other = gather(one), gather(other)
        losses = F.cross_entropy(10 * one @ other.T, torch.arange(len(one), device=one.device), reduction="sum")
        return {"loss": losses, "count": torch.full((), len(one), device=one.device)}

    def evaluate(
        self, loaders: Mapping[str, Any], split: str = "val", metric: Any = None, final: bool = False
    ) -> dict[str, Any]:
        vectors = torch.cat([self(batch["image"]) for batch in loaders[split].evaluation()])
        return {"distance": torch.cdist(vectors, vectors).mean().item(), "count": len(vectors)}


def covered(size: tuple[int, int], source: tuple[int, int]) -> Affine:
    """The frames that `Dense` makes of an image of this size."""
    return tiles(source, size, 0.25).with_flips()


@dataclass(frozen=True)
class LinearSettings(Settings):
    name = "linear-toy"

    width: int = 4


class Linear(Toy):
    """A hidden layer and one output per class: what the default `adopt` keeps of such a head."""

    name = "linear-toy"
    settings = LinearSettings

    def __init__(self, encoder: Encoder, classes: Sequence[str], width: int) -> None:
        super().__init__(encoder)
        self.classes = list(classes)
        self.hidden, self.head = nn.Linear(64, width), nn.Linear(width, len(classes))

    @classmethod
    def create(cls, settings: LinearSettings, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        return cls(encoder, splits.train.classes, settings.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(self.encoder.pool(self.encoder(images))))

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        losses = F.cross_entropy(self(batch["image"]), batch["label"], reduction="sum")
        return {"loss": losses, "count": torch.full((), len(batch["label"]))}
