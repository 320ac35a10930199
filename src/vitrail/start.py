"""Begin a run, go on with one, score a model: what the commands `train`, `eval` and `demo` do."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from vitrail import recipes, zoo
from vitrail.data.sets import ImageSet, Splits, open_data, split_val
from vitrail.errors import UserError
from vitrail.files import write_whole
from vitrail.recipes.finetune import resolve_auto
from vitrail.report import NO_SCORES, write_report
from vitrail.tasks import task_of
from vitrail.tasks.encoder import encoder_of
from vitrail.tasks.task import Task
from vitrail.train.build import (
    VAL_FRACTION,
    build,
    evaluation_loader,
    open_for,
    warn_unused,
)
from vitrail.train.device import choose_device
from vitrail.train.frozen import fit_frozen
from vitrail.train.loop import Components, evaluate, fit
from vitrail.train.probe import probe as probe_scores
from vitrail.train.run import Run, with_fields
from vitrail.train.state import RunFolder, Taken

log = logging.getLogger("vitrail")


class Trained(NamedTuple):
    """What a run ends with."""

    task: type[Task]
    scores: dict[str, Any]
    """of the split that was scored, whose name is `split`, with `seconds` and `parameters`"""


def begin(
    recipe: recipes.Recipe,
    data: str | None,
    init: str | None,
    changes: Mapping[str, Any],
    out: Path | None,
    device: str | None,
    group: str | None = None,
) -> Trained:
    """Train a recipe on `data`, from the weights `init` or from scratch.

    `changes` are fields of the run, or of its components, that replace the recipe's; `group` is the run's
    field of that name, which is needed before the others: to open the data.
    """
    if init is not None:
        recipe = recipes.TUNED.get(recipe, recipe)
    name = recipe(1).data
    if init is None and recipe in recipes.FROM_WEIGHTS:
        raise UserError(f"{recipe(1).recipe} starts from weights: name them with --init")
    if data is None and name == "folder":
        raise UserError("say which images: --data with a folder that holds one folder per class, or a built-in name")
    data, group = name if data is None else data, recipe(1).group if group is None else group
    kind = task_of(recipe(1).task)
    splits = open_for(kind, data, name, group)
    if not len(splits.train):
        names = ", ".join(splits.beside[:3]) + ", ..." * (len(splits.beside) > 3)
        found = f"put the folders of images that stand beside the others ({names}) in a folder train"
        raise UserError(
            f"{data} has no training split: {found if names else 'add one'}, or score a model on it with `vitrail eval`"
        )
    run = recipe(len(splits.train))
    weights = None
    if (init := init or run.init) is not None:
        weights = zoo.load(init)
        # Images come at the size that the checkpoint prepares them at; DINOv2's positions are for larger ones.
        config = replace(encoder_of(weights).config, image_size=weights.preprocess.size)
        run = recipes.from_weights(run, init, config)
    if (channels := splits.train.channels) not in (1, 3, run.model.channels):  # others read as these two
        log.warning("the images have %d channels, and so will the model", channels)
        run = replace(run, model=replace(run.model, channels=channels))
    if weights is not None:
        if recipe in recipes.CONTINUED and not kind.continues(run.task, weights):
            raise UserError(
                f"{run.recipe} continues training the task {kind.name}, and {init} holds the task {weights.name}: name "
                "another with --init"
            )
        run = replace(run, task=kind.merged(run.task, weights))
    given = run
    run = resolve_auto(run, len(splits.train), len(splits.train.classes), changes)
    if init is not None:
        recipes.check_fixed(init, run.model, given.model, recipes.FREE)
        if run.attention_init != given.attention_init:
            raise recipes.fixed(init, "attention_init")
        if weights is not None and kind.continues(run.task, weights):
            recipes.check_fixed(init, run.task, given.task, kind.free)
    warn_unused(given, with_fields(given, changes), run.tune.method)
    run = replace(run, data=str(data), group=group)
    chosen = choose_device(device)
    with new_folder(run, out) as folder:  # before the images are decoded, which takes its time
        marks = splits.marks(run.group)  # before the labels become a captioner's
        parts, steps = build(run, splits, chosen, weights)
        # Images kept in memory are rounded otherwise than streamed ones, so a resumed run must do as it began.
        run = replace(run, memory=parts.train.memory)
        try:
            folder.begin(run, splits.train.classes, marks)
            return Trained(kind, _train(run, parts, folder, steps, resume=False))
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


def resume_run(path: Path, device: str | None) -> Trained:
    """Resume the run in the folder `path` from its last saved step; on the processor (CPU) to the same bits.

    One that has ended gives its scores again.
    """
    folder = RunFolder(path)
    run = folder.run()
    kind = task_of(run.task)
    if (scores := folder.scores) is not None:
        log.warning(f"the run in {path} has ended: its report is {path / 'report.html'}")
        return Trained(kind, scores)
    with folder.alone():
        splits = open_for(kind, run.data, recipes.find(run.recipe)(1).data, run.group)
        folder.check_data(splits.marks(run.group), run.data)
        components, steps = build(run, splits, choose_device(device))
        return Trained(kind, _train(run, components, folder, steps, resume=True))


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
        rows.append(
            {"image": base64.b64encode(buffer.getvalue()).decode(), "truth": chosen.target.truth(i), **answer.row()}
        )
    return rows


def score(
    task: Task,
    source: str,
    data: str,
    split: str | None,
    probe: bool = False,
    shuffle: bool = False,
    images: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """The name of the split that was read, and the scores of a model on it; with `probe` also those of its features.

    `source` is where the model comes from. An encoder without a head has the scores of its features alone. `shuffle`
    gives each image the target of another one, which is the control. At most `images` of each split are read.
    """
    learned = learned_from(source, data)
    group = learned.group if learned else None
    if probe or (task.portable and not task.outputs):
        if shuffle:
            raise UserError("--shuffle-images is a control of answers, and --probe scores features: leave one out")
        return score_features(task, open_data(data, grouped=group is not None), split, images, group)
    splits = with_held_back(open_for(type(task), data, group=group), split, learned)
    name, chosen = choose_split(splits, split)
    metric = task.metric(chosen, None if name == "train" else splits.train)
    chosen = chosen.spread(images)
    device = next(task.parameters()).device
    loader = evaluation_loader(task, chosen.shuffled() if shuffle else chosen, device)
    scores = evaluate(task, {name: loader}, name, metric=metric)
    return name, {**scores, "shuffled": True} if shuffle else scores


def with_held_back(splits: Splits, split: str | None, learned: Run | None) -> Splits:
    """The splits, with what training held back where the data names no validation split.

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


def score_people(task: Task, data: str, split: str | None, images: int | None = None) -> tuple[str, dict[str, Any]]:
    """The split's name and the scores of its own answers: each as the answer, with the image's others to compare."""
    name, chosen = choose_split(with_held_back(open_for(type(task), data), split, learned=None), split)
    return name, task.human(chosen.spread(images))


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
    name, part = ("train", train) if split == "val" and val is None else choose_split(splits, split)
    if name == "train":
        name, (train, part) = "val", split_val(train, group=group)
    if val is None or name == "val":
        train, val = split_val(train, group=group)
    train, val, part = (chosen.spread(images) for chosen in (train, val, part))
    device = next(task.parameters()).device
    loaders = [evaluation_loader(task, chosen, device) for chosen in (train, val, part)]
    scores = {}
    if task.outputs:
        try:
            scores = evaluate(task, {name: loaders[2]}, name, metric=task.metric(part))
        except UserError as error:
            log.warning(f"the model's features are scored alone: {error}")
    return name, {**scores, **probe_scores(task, *loaders)}


def choose_split(splits: Splits, name: str | None) -> tuple[str, ImageSet]:
    """A part by name, or the one furthest from training."""
    there = {"test": splits.test, "val": splits.val, "train": splits.train}
    if name is not None:
        if there[name] is None:
            raise UserError(f"the data has no {name} part: it has {', '.join(k for k, v in there.items() if v)}")
        return name, there[name]  # type: ignore[return-value]
    return next((k, v) for k, v in there.items() if v is not None and len(v))
