"""Segmentation: an encoder, a head, and the way from its logits back to the pixels of the original image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from vitrail.baselines import MLP
from vitrail.data.affine import Affine
from vitrail.data.decode import BadImage, EncodedImage
from vitrail.data.masks import Masks
from vitrail.data.preprocess import AnyImage, Preprocess
from vitrail.data.rle import encode
from vitrail.errors import UserError
from vitrail.plain import describe, from_description
from vitrail.tasks.answers import finite, one_class
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for, token_width
from vitrail.tasks.exported import CLASS, Program, whole
from vitrail.tasks.segment.heads import QUERIES_IN_NUMPY, LinearHead, MaskTransformer, QueryHead, class_logits
from vitrail.tasks.segment.losses import check_matching, pixel_loss, query_loss
from vitrail.tasks.segment.metric import SegmentMetric
from vitrail.tasks.segment.settings import Inference, Segmentation
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Checkpoint, Metric, Prediction, Score, Section
from vitrail.vit import Tokens, ViT

if TYPE_CHECKING:
    from vitrail.data.loader import Loader
    from vitrail.data.prepare import Sample
    from vitrail.data.sets import ImageSet, Splits

FRAMES = 16
"""frames that pass through the network at once: a large image has many windows"""
MAX_WHOLE = 8
"""times the pixels of an image of the model's own shape that a whole image may have: the time of attention grows with
their square, so that a file of 80 bytes, of 1 x 400 pixels, would keep a server busy for hours"""
REGIONS = 8
"""classes of an image that are explained"""
MASKS = 1_000
"""most masks that are read to count the classes, for their weights"""


@dataclass(frozen=True)
class Segments(Prediction):
    """The class of every pixel of an image."""

    mask: Tensor
    """class numbers [H, W] at the size of the original, uint8, or int32 for more than 256 classes"""
    classes: list[str]

    @cached_property
    def areas(self) -> dict[int, int]:
        """Pixels of each class number that occurs, largest first."""
        counts = torch.bincount(self.mask.flatten().int(), minlength=len(self.classes))
        return {int(k): int(counts[k]) for k in counts.argsort(descending=True, stable=True) if counts[k]}

    def row(self) -> dict[str, Any]:
        """`segments`: label, share and area in pixels, and the run-length code of each class that occurs."""
        mask = self.mask.t().contiguous().t()  # column by column, as the codes run
        codes = [encode(mask == k) for k in self.areas]
        return {"segments": [{**record, "rle": rle} for record, rle in zip(self.records(), codes, strict=True)]}

    def records(self) -> list[dict[str, Any]]:
        """Label, share and area of each class that occurs."""
        return [{"label": self.classes[k], "share": self._share(k), "area": area} for k, area in self.areas.items()]

    def images(self) -> dict[str, Image.Image]:
        """`mask`: the class numbers, in 8 bits, or 16 for more than 256 classes."""
        return {"mask": Image.fromarray(self.mask.numpy().astype("uint8" if len(self.classes) <= 256 else "uint16"))}

    def text(self) -> str:
        """`road 41.3 %, building 22.0 %, ...`: the five largest."""
        return ", ".join(f"{self.classes[k]} {100 * self._share(k):.1f} %" for k in list(self.areas)[:5])

    def draw(self, image: Image.Image) -> Image.Image:
        """The image under the colours of its classes, with a legend."""
        from vitrail.tasks.segment.figures import overlay, with_legend

        entries = [(k, f"{self.classes[k]} {100 * self._share(k):.1f} %") for k in self.areas]
        return with_legend(overlay(image, self.mask, len(self.classes)), entries, len(self.classes))

    def _share(self, k: int) -> float:
        return self.areas[k] / self.mask.numel()


class Segment(Task):
    """An encoder and a head with logits per class and place.

    Keys of a batch: `image` [B, C, H, W], `mask` int64 [B, H, W] with other numbers than those of classes for void;
    in evaluation `affine`, and `truth`, the masks as read.
    """

    name = "segment"
    settings = Segmentation
    options = Inference
    target = Masks
    score = Score("miou", label="mIoU")
    metric_reads = "answers"

    def __init__(
        self,
        encoder: Encoder,
        classes: list[str],
        preprocess: Preprocess,
        settings: Segmentation,
        class_weights: Tensor | None = None,
    ) -> None:
        """`class_weights` [K] are of the cross-entropy, with a mean of 1 over pixels."""
        super().__init__()
        self.encoder, self.classes, self.preprocess = encoder, classes, preprocess
        self.settings_used = s = settings
        width, heads = token_width(encoder.config), getattr(encoder.config, "heads", 1)
        if isinstance(encoder, MLP):
            raise UserError("an MLP sees images of one size, and segmentation images of any: choose another encoder")
        self.head: LinearHead | MaskTransformer | QueryHead
        if s.head == "linear":
            self.head = LinearHead(width, len(classes), s.upscale)
        elif s.head == "mask-transformer":
            self.head = MaskTransformer(width, len(classes), s.head_blocks, heads, s.upscale)
        else:
            check_queries(encoder, s.head_blocks)
            self.head = QueryHead(width, len(classes), s.queries, s.upscale)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor | None
        self.option = Inference()

    # Making one

    @classmethod
    def create(cls, settings: Segmentation, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        if settings.head == "queries":
            check_matching(settings.queries, len(splits.train.classes))
        weights = log_weights(splits.train) if settings.class_weights == "log" else None
        return cls(encoder, splits.train.classes, preprocess, settings, weights)

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        encoder = encoder_for(from_description(config["encoder"], KINDS, "vit"))
        preprocess = Preprocess.from_dict(config["preprocess"])
        return cls(encoder, config["classes"], preprocess, Segmentation(**config["segmentation"]))

    def config(self) -> dict[str, Any]:
        return {"encoder": describe(self.encoder.config, KINDS), "segmentation": asdict(self.settings_used)}

    def with_classes(self, classes: list[str]) -> Task:
        if not classes:
            return super().with_classes(classes)
        return self if classes == self.classes else Segment(self.encoder, classes, self.preprocess, self.settings_used)

    # From an image to an answer

    def frames(self, image: AnyImage) -> Sample:
        """The whole image at the scale of training, or overlapping windows of it; also flipped, with `flip`.

        At that scale an image just covers `preprocess.size` / `crop_fraction`, as before the centre crop elsewhere.
        Raises BadImage for one so long and thin that the whole of it would take the network minutes (see `MAX_WHOLE`).
        """
        from vitrail.data.prepare import prepare, size_of

        opened = self.preprocess.open(image)
        size = size_of(opened, self.preprocess)
        scaled = self.preprocess.resized(*size)
        if self.option.inference == "whole":
            self._refuse_long(opened, size, scaled)
            patch = getattr(self.encoder.config, "patch", 1)
            height, width = (max(patch, round(side / patch) * patch) for side in scaled)
            way = replace(self.preprocess, size=(height, width), resize="squash", crop_fraction=1.0)
            found = prepare(opened, way)
        elif self.preprocess.resize == "squash":
            raise UserError("windows keep the shape of an image, and resize squash does not: set --inference whole")
        else:
            found = self._windows(opened, size, scaled[0] / size[0])
        return found.with_flips() if self.option.flip else found

    def _refuse_long(self, opened: EncodedImage | Tensor, size: Sequence[int], scaled: Sequence[int]) -> None:
        if math.prod(scaled) > MAX_WHOLE * math.prod(self.preprocess.resized(*self.preprocess.size)):
            where = opened.name if isinstance(opened, EncodedImage) else "image"
            raise BadImage(
                f"{where}: the image is {size[1]}x{size[0]}: too long and thin: at the scale of the model it has "
                f"{scaled[1]}x{scaled[0]} pixels: cut it into pieces"
            )

    def _windows(self, opened: Any, size: tuple[int, int], scale: float) -> Sample:
        from vitrail.data.affine import tiles
        from vitrail.data.prepare import Sample, pixels_of

        affine = tiles(size, self.preprocess.size, self.option.overlap, scale)
        boxes = affine.window.round().long().tolist()
        pixels = [
            pixels_of(opened, (top, left, bottom - top, right - left), self.preprocess)
            for left, top, right, bottom in boxes
        ]
        return Sample(torch.stack(pixels), affine)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Images [B, C, H, W] to logits [B, K, h, w], or what queries predict (see `QueryHead`)."""
        if not isinstance(self.head, QueryHead):
            return self.head(self.encoder(images) if keep is None else self.encoder(images, keep))
        encoder, first = self.encoder, len(self.encoder.blocks) - self.settings_used.head_blocks
        x, grid = encoder.embed(images)
        x, _ = encoder.encode(x, grid, keep, slice(0, first))
        prefix, queries = encoder.config.prefix_tokens, self.head.queries.expand(x.shape[0], -1, -1).to(x.dtype)
        x, _ = encoder.encode(torch.cat([x[:, :prefix], queries, x[:, prefix:]], dim=1), grid, keep, slice(first, None))
        after = prefix + queries.shape[1]
        tokens = encoder.finish(torch.cat([x[:, :prefix], x[:, after:]], dim=1), grid)
        return self.head(encoder.norm(x[:, prefix:after]), tokens)

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Logits of classes [B, K, h, w], at some resolution, for any head."""
        outputs = self(images)
        return class_logits(outputs) if isinstance(outputs, dict) else outputs

    def programs(self, batch: Batch) -> dict[str, Program]:
        return whole(self, batch, QUERIES_IN_NUMPY + CLASS if isinstance(self.head, QueryHead) else CLASS)

    def answer(self, batch: Batch) -> list[Prediction]:
        """Masks at the size of the originals: the logits of an image's frames are averaged there.

        Without an `affine`, as for a batch of prepared tensors, masks have the size of `image`.
        """
        images = batch["image"]
        logits = torch.cat([finite(self.logits(chunk)).float() for chunk in images.split(FRAMES)])
        affine: Affine | None = batch.get("affine")
        if affine is None:
            sizes = torch.tensor([images.shape[-2:]]).expand(len(images), -1)
            affine = Affine.crop(torch.cat([torch.zeros_like(sizes), sizes], dim=1), sizes, tuple(images.shape[-2:]))
        kind = torch.uint8 if len(self.classes) <= 256 else torch.int32
        return [
            Segments(
                torch.cat([band.logits.argmax(dim=0).to(kind).cpu() for band in affine.bands(logits, image)]),
                list(self.classes),
            )
            for image in range(affine.images)
        ]

    # Training and scores

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """The sum of the images' losses; an image of void pixels alone has none, and still counts."""
        outputs = self(batch["image"], self.keep(batch))
        if isinstance(outputs, dict):
            losses = query_loss(outputs, batch["mask"])
        else:
            losses = pixel_loss(outputs, batch["mask"], self.class_weights, self.settings_used.dice)
        return {"loss": losses.sum(), "count": torch.full((), len(losses), device=losses.device)}

    def choose(self, changes: Mapping[str, Any]) -> None:
        super().choose(changes)
        if "overlap" in changes and self.option.inference == "whole":
            raise UserError("--overlap applies to windows: add --inference windows")

    def data_options(self) -> dict[str, Any]:
        return {"void": self.settings_used.void if self.option.void is None else self.option.void}

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> Metric:
        return SegmentMetric(self.classes, None if data is None else data.classes)

    def evaluate(
        self,
        loaders: Mapping[str, Loader],
        split: str = "val",
        metric: Callable[[], Metric] | None = None,
        final: bool = False,
    ) -> dict[str, Any]:
        """As for any task; at the end also `miou` by the other way of inference, under its own name."""
        scores = super().evaluate(loaders, split, metric)
        if not final or self.preprocess.resize == "squash":  # which has no windows
            return scores
        chosen, other = self.option, "windows" if self.option.inference == "whole" else "whole"
        try:
            self.option = replace(chosen, inference=other)
            scores[f"miou_{other}"] = super().evaluate(loaders, split, metric)["miou"]
        finally:
            self.option = chosen
        return scores

    # What others ask

    @classmethod
    def collapsed(cls, scores: Mapping[str, Any]) -> str | None:
        return one_class(scores["confusion"], scores["classes"], "pixels") if "confusion" in scores else None

    def explained(self, batch: Batch, outputs: Sequence[int] | None = None) -> Tensor:
        """The mean logit of each image's largest class, over the places where it is predicted, [B].

        Or of some classes; of one that is predicted nowhere, over the whole image.
        """
        logits = self.logits(batch["image"]).flatten(2)
        best = logits.argmax(dim=1)  # [B, h w]
        shares = torch.stack([row.bincount(minlength=logits.shape[1]) for row in best])
        chosen = shares.argmax(dim=1, keepdim=True) if outputs is None else _numbers(outputs, shares)
        there = (best[:, None] == chosen[:, :, None]).to(logits.dtype)  # [B, outputs, h w]
        there = torch.where(there.any(dim=2, keepdim=True), there, 1.0)
        own = logits.gather(1, chosen[:, :, None].expand(-1, -1, logits.shape[2]))
        means = (own * there).sum(dim=2) / there.sum(dim=2)
        return means[:, 0] if outputs is None else means

    def explainable(self, batch: Batch) -> list[tuple[int, str]]:
        """The classes that are predicted anywhere, the largest first."""
        best = self.logits(batch["image"][:1])[0].argmax(dim=0).flatten().bincount(minlength=len(self.classes))
        found = best.argsort(descending=True, stable=True)[: int((best > 0).sum())].tolist()
        return [(k, self.classes[k]) for k in found[:REGIONS]]

    @classmethod
    def printed_scores(cls, scores: Mapping[str, Any]) -> dict[str, float]:
        """With the IoU of each class under `iou NAME`."""
        each = zip(scores.get("classes", ()), scores.get("iou", ()), strict=True)
        return {**super().printed_scores(scores), **{f"iou {name}": value for name, value in each if value is not None}}

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        from vitrail.tasks.segment.report import sections

        return sections(run)


def _numbers(outputs: Sequence[int], like: Tensor) -> Tensor:
    """The numbers of some classes for each image, int64 [B, outputs]."""
    return torch.tensor([list(outputs)], device=like.device).expand(len(like), -1)


def check_queries(encoder: Encoder, blocks: int) -> None:
    """Refuse an encoder whose last blocks cannot take queries beside the patches."""
    if not isinstance(encoder, ViT):
        raise UserError("the head queries passes through the blocks of a Vision Transformer: choose --head linear")
    config = encoder.config
    if blocks > config.depth:
        raise UserError(f"head_blocks is {blocks}, but the encoder has {config.depth} blocks: choose fewer")
    last = range(config.depth - blocks, config.depth)
    if getattr(config, "window", 0) and not set(last) <= set(getattr(config, "global_blocks", ())):
        raise UserError(
            "queries need attention to the whole image in the last blocks, and the encoder's have windows: lower "
            "--head-blocks, or name those blocks in --global-blocks"
        )
    if getattr(config, "relative", "none") != "none":
        raise UserError("queries have no place in tables of relative positions, which this encoder has: choose another")
    if token_width(config) != config.width:
        raise UserError(
            "queries have the width of the blocks, and this encoder gives tokens of another: choose another"
        )


def log_weights(train: ImageSet) -> Tensor:
    """Weights [K] of the classes: 1 / ln(1.02 + share of the pixels), with a mean of 1 over pixels (arXiv 1606.02147).

    The shares are those of at most a thousand masks, evenly spaced.
    """
    from vitrail.data.decode import BadImage

    masks = Masks.of(train)
    counts = torch.zeros(len(masks.classes), dtype=torch.int64)
    for i in torch.linspace(0, len(masks) - 1, min(MASKS, len(masks))).round().long().tolist():
        try:
            indices = masks.read(i).indices.long().flatten()
        except BadImage:
            continue  # the loader reports it
        valid = (indices >= 0) & (indices < len(counts))
        counts += torch.bincount(indices[valid], minlength=len(counts))
    share = counts / counts.sum().clamp(min=1)
    weights = 1 / (1.02 + share).log()
    return (weights / (weights * share).sum().clamp(min=math.ulp(1.0))).float()
