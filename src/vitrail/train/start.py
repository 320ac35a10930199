"""Begin a run, go on with one, score a model: what the commands `train`, `eval` and `demo` do."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitrail import recipes, zoo
from vitrail.data.captions import open_captions
from vitrail.data.sets import ImageSet, Splits, open_data, split_val
from vitrail.data.targets import Texts
from vitrail.errors import UserError
from vitrail.files import write_whole
from vitrail.recipes.finetune import resolve_auto
from vitrail.tasks.caption import FREE, Caption, Captioning
from vitrail.tasks.caption_scores import CaptionMetric, check_scorers, human_ceiling
from vitrail.tasks.classify import Classify, ClassifyMetric
from vitrail.tasks.embed import Embed
from vitrail.tasks.regress import Regress
from vitrail.tasks.task import Task
from vitrail.train.build import (
    VAL_FRACTION,
    build,
    check_start,
    continues_from,
    evaluation_loader,
    open_for,
    warn_unused,
)
from vitrail.train.device import choose_device
from vitrail.train.frozen import fit_frozen
from vitrail.train.loop import Components, evaluate, fit
from vitrail.train.probe import probe as probe_scores
from vitrail.train.report import NO_SCORES, write_report
from vitrail.train.run import Run
from vitrail.train.state import RunFolder, Taken

log = logging.getLogger("vitrail")


def begin(
    recipe: recipes.Recipe,
    data: str | None,
    init: str | None,
    change: Callable[[Run], Run],
    out: Path | None,
    device: str | None,
    group: str | None = None,
) -> dict[str, Any]:
    """Train a recipe on `data`, from the weights `init` or from scratch; `change` sets fields. Returns the scores.

    `group` is the run's field of that name, which is needed before the others: to open the data.
    """
    if init is not None:
        recipe = recipes.TUNED.get(recipe, recipe)
    name = recipe(1).data
    if init is None and recipe in recipes.FROM_WEIGHTS:
        raise UserError(f"{recipe(1).recipe} goes on from weights: name them with --init")
    if data is None and name == "folder":
        raise UserError("say which images: --data with a folder that holds one folder per class, or a built-in name")
    data, group = name if data is None else data, recipe(1).group if group is None else group
    splits = open_for(recipe(1).task, data, name, group)
    if not len(splits.train):
        names = ", ".join(splits.beside[:3]) + ", ..." * (len(splits.beside) > 3)
        found = f"put the folders of images that stand beside the others ({names}) in a folder train"
        raise UserError(
            f"{data} has no training part: {found if names else 'add one'}, or score a model on it with `vitrail eval`"
        )
    run = recipe(len(splits.train))
    if (init := init or run.init) is not None:
        weights = zoo.load(init)
        # Images come at the size that the checkpoint prepares them at; DINOv2's positions are for larger ones.
        config = replace(zoo.encoder_of(weights).config, image_size=weights.preprocess.size)
        run = recipes.from_weights(run, init, config)
    if (channels := splits.train.channels) not in (1, 3, run.model.channels):  # others read as these two
        log.warning("the images have %d channels, and so will the model", channels)
        run = replace(run, model=replace(run.model, channels=channels))
    whole = weights if init is not None and isinstance(weights, Caption) and continues_from(run.task, weights) else None
    if recipe in recipes.FROM_WEIGHTS and isinstance(run.task, Captioning) and whole is None:
        raise UserError(f"{run.recipe} goes on from a captioner, and {init} is none: name one with --init")
    if whole is not None:
        check_start(run, whole)
        run = replace(run, task=whole.kept(run.task))
    given = run
    run = resolve_auto(run, len(splits.train), len(splits.train.classes), change)
    if init is not None:
        recipes.check_fixed(init, run.model, given.model, recipes.FREE)
        if run.attention_init != given.attention_init:
            raise recipes.fixed(init, "attention_init")
        if whole is not None:
            recipes.check_fixed(init, run.task, given.task, FREE)
    warn_unused(given, change(given), run.tune.method)
    run = replace(run, data=str(data), group=group)
    chosen = choose_device(device)
    with new_folder(run, out) as folder:  # before the images are decoded, which takes its time
        marks = splits.marks(run.group)
        parts, steps = build(run, splits, chosen)
        # Images kept in memory are rounded otherwise than streamed ones, so a resumed run must do as it began.
        run = replace(run, memory=parts.train.memory)
        try:
            folder.begin(run, splits.train.classes, marks)
            return _train(run, parts, folder, steps, resume=False)
        except BaseException:  # whatever it was, a run that saved nothing must not take the name
            folder.drop()
            raise


@contextmanager
def new_folder(run: Run, out: Path | None) -> Iterator[RunFolder]:
    """The folder `out`, or the first free one of runs/RECIPE-SEED, runs/RECIPE-SEED-2 and so on, for this run alone."""
    first = out or Path("runs") / f"{run.recipe}-{run.seed}"
    folder = RunFolder(first)
    with ExitStack() as stack:
        for number in itertools.count(2):
            try:
                stack.enter_context(folder.new())
                break
            except Taken:
                if out is not None:
                    raise
                folder = RunFolder(first.with_name(f"{first.name}-{number}"))
        if folder.path != first:
            log.warning(f"{first} holds another run, so this one is in {folder.path}")
        yield folder


def resume_run(path: Path, device: str | None) -> dict[str, Any]:
    """Resume the run in the folder `path` from its last saved step; on the processor (CPU) to the same bits.

    One that has ended gives its scores again.
    """
    folder = RunFolder(path)
    run = folder.run()
    if (scores := folder.scores) is not None:
        log.warning(f"the run in {path} has ended: its report is {path / 'report.html'}")
        return scores
    with folder.alone():
        splits = open_for(run.task, run.data, recipes.find(run.recipe)(1).data, run.group)
        folder.check_data(splits.marks(run.group), run.data)
        parts, steps = build(run, splits, choose_device(device))
        return _train(run, parts, folder, steps, resume=True)


def _train(run: Run, parts: Components, folder: RunFolder, steps: int, resume: bool) -> dict[str, Any]:
    if run.fast_dev_run:
        log.warning(f"fast dev run: {steps} steps on at most {run.images} images of each split; {NO_SCORES}")
    scores = fit_frozen(run, parts, folder) if run.tune.frozen else fit(run, parts, folder, steps, resume)
    scores |= {"fast_dev_run": True} if run.fast_dev_run else {}
    folder.end(scores)
    write_whole(folder.path / "examples.json", json.dumps(examples(parts)))
    write_report(folder.path)
    return scores


def examples(parts: Components, count: int = 24) -> list[dict[str, Any]]:
    """The first images of the held-back part with the model's answers, for the report."""
    loader = parts.test or parts.val
    task, chosen = parts.task, loader.set
    rows = []
    numbers = torch.linspace(0, len(chosen) - 1, min(count, len(chosen))).long().tolist()
    for i in numbers:
        try:
            opened = chosen.image(i, task.preprocess.channels)
            answer = task.answers([task.prepare(chosen.open(i))])[0]
        except UserError:
            continue  # an image that cannot be read was named when the loader met it
        image = Image.fromarray(
            opened[:3].permute(1, 2, 0).squeeze(2).numpy() if len(opened) != 2 else opened[0].numpy()
        )
        image.thumbnail((160, 160))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        says = (
            {"caption": answer.caption, "references": chosen.target.captions[i]}
            if isinstance(chosen.target, Texts)
            else {"label": chosen.classes[int(chosen.labels[i])], "predictions": answer.labels[:3]}
        )
        rows.append({"image": base64.b64encode(buffer.getvalue()).decode(), **says})
    return rows


def score(
    source: str,
    data: str,
    split: str | None,
    device: str | None,
    probe: bool = False,
    shuffle: bool = False,
    change: Callable[[Task], None] | None = None,
    images: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """The name of the part that was read, and the scores of a model on it; with `probe` also of its features.

    An encoder without a head has those of its features alone. `shuffle` gives each image the captions of another
    one. `change` is called with the model first. At most `images` of each split are read.
    """
    task = zoo.load(source, device=choose_device(device))
    if change is not None:
        change(task)
    learned = learned_from(source, data)
    group = learned.group if learned else None
    if isinstance(task, Caption) and not probe:
        return score_captions(task, data, split, shuffle, learned, images)
    if shuffle:
        what = "--probe scores features" if probe else f"{source} holds the task {task.name}"
        raise UserError(f"--shuffle-images is the control of a captioner's captions, and {what}: leave it out")
    if probe or isinstance(task, Embed):
        return score_features(task, open_data(data, grouped=group is not None), split, images, group)
    if isinstance(task, Regress):
        raise UserError(
            f"the head of {source} gives values ({', '.join(task.values[:3])}), and classes are no values to compare "
            f"them with: score its features with --probe, or train a head with `vitrail train folder --init {source}`"
        )
    if not isinstance(task, Classify):
        raise UserError(f"{source} has no head to score: train one with `vitrail train folder --init {source}`")
    splits = with_held_back(open_data(data, grouped=group is not None), split, learned)
    name, part = choose_part(splits, split)
    metric = class_metric(task, part)
    loader = evaluation_loader(task, part.spread(images), choose_device(device))
    return name, evaluate(task, loader, metric=metric)


def with_held_back(splits: Splits, split: str | None, learned: Run | None) -> Splits:
    """The parts, with what training held back where the data names no part for it.

    That is when `val` is asked for, or when a model whose run has `learned` from this data would else be scored on it.
    """
    if splits.val is not None or not (split == "val" or (split is None and splits.test is None and learned)):
        return splits
    train, val = split_val(splits.train, VAL_FRACTION, learned.group if learned else None)
    return replace(splits, train=train, val=val)


def learned_from(source: str, data: str) -> Run | None:
    """The run in whose folder `source` is, if its images were those of `data`."""
    for folder in (Path(source), Path(source).parent):  # best/ and last/ are in the run's folder
        try:
            run = RunFolder(folder).run()
        except UserError:
            continue  # no run's folder, or one of another version: nothing tells what it learned from
        return run if Path(run.data).resolve() == Path(data).resolve() else None
    return None


def score_captions(
    task: Caption, data: str, split: str | None, shuffle: bool, learned: Run | None, images: int | None = None
) -> tuple[str, dict[str, Any]]:
    """The part's name and the scores of a captioner's captions of it, as docs/captioning.md tells them.

    `learned` is the captioner's run, if it learned from this data (see `with_held_back`).
    """
    check_scorers()  # before the captions are written, which takes its time
    splits = with_held_back(open_captions(data, val_fraction=0), split, learned)
    name, part = choose_part(splits, split)
    part = part.spread(images)
    seen = [text for texts in Texts.of(splits.train).captions for text in texts] if name != "train" else []
    loader = evaluation_loader(task, part.shuffled() if shuffle else part, next(task.parameters()).device)
    scores = evaluate(task, loader, metric=CaptionMetric(seen=seen or None, java=None))
    return name, {**scores, "shuffled": True} if shuffle else scores


def score_people(data: str, split: str | None, images: int | None = None) -> tuple[str, dict[str, Any]]:
    """The part's name and what its own captions come to: each as the answer, with the image's others to compare."""
    name, part = choose_part(with_held_back(open_captions(data, val_fraction=0), split, learned=None), split)
    part = part.spread(images)
    return name, human_ceiling(dict(enumerate(Texts.of(part).captions)))


def score_features(
    task: Task, splits: Splits, split: str | None, images: int | None = None, group: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The part's name and its scores: the task's own where it knows the classes, and those of `train/probe.py`.

    The probes learn from the training part. It is split where a part is missing to choose the penalty on, which is
    never the part that is scored, or where there is no other part to score.
    """
    if not len(splits.train):
        raise UserError("the data has no training part, which k-NN and the linear probe learn from: add a folder train")
    if split == "train":
        raise UserError("k-NN and the linear probe learn from the training part: choose --split val or test")
    train, val = splits.train, splits.val
    name, part = ("train", train) if split == "val" and val is None else choose_part(splits, split)
    if name == "train":
        name, (train, part) = "val", split_val(train, group=group)
    if val is None or name == "val":
        train, val = split_val(train, group=group)
    train, val, part = (chosen.spread(images) for chosen in (train, val, part))
    device = next(task.parameters()).device
    loaders = [evaluation_loader(task, chosen, device) for chosen in (train, val, part)]
    scores, metric = {}, None
    if isinstance(task, Classify):
        try:
            metric = class_metric(task, part)
        except UserError as error:
            log.warning(f"the model's features are scored alone, since its head is for other classes: {error}")
    if metric is not None:
        scores = evaluate(task, evaluation_loader(task, part, device), metric=metric)
    return name, {**scores, **probe_scores(task, *loaders)}


def choose_part(splits: Splits, name: str | None) -> tuple[str, ImageSet]:
    """A part by name, or the one furthest from training."""
    there = {"test": splits.test, "val": splits.val, "train": splits.train}
    if name is not None:
        if there[name] is None:
            raise UserError(f"the data has no {name} part: it has {', '.join(k for k, v in there.items() if v)}")
        return name, there[name]  # type: ignore[return-value]
    return next((k, v) for k, v in there.items() if v is not None and len(v))


def class_metric(task: Classify, part: ImageSet) -> ClassifyMetric:
    """The metric of a classifier on a part whose classes are the model's, or some of them, by whatever name."""
    metric = ClassifyMetric(task, part.classes)
    if (count := len(part.classes)) < (known := len(task.classes)):
        log.warning(
            f"the data has {count:,} of the model's {known:,} classes: an answer is one of all {known:,}, and right "
            "only where it is the image's own"
        )
    return metric
