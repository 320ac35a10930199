"""Start a run, resume one, score a model: the work of the commands `train`, `eval` and `demo`."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vitrail import announce, recipes, zoo
from vitrail.data import hub_sets
from vitrail.data.loader import Loader
from vitrail.data.sets import ImageSet, Splits, open_data, split_val
from vitrail.data.tally import Tally
from vitrail.errors import UserError
from vitrail.examples import examples
from vitrail.files import write_atomic
from vitrail.recipes.finetune import resolve_auto
from vitrail.report import NO_SCORES, write_report
from vitrail.tasks import task_of
from vitrail.tasks.encoder import encoder_of
from vitrail.tasks.task import Task
from vitrail.train.build import VAL_FRACTION, build, open_for
from vitrail.train.device import choose_device
from vitrail.train.feeding import decoding_line
from vitrail.train.finite import not_numbers
from vitrail.train.fitting import with_micro_batches
from vitrail.train.folder import Follower, RunFolder, Taken
from vitrail.train.frozen import fit_frozen
from vitrail.train.loaders import Loaders, evaluation_loader
from vitrail.train.loop import Components, evaluate, fit
from vitrail.train.parallel import ALONE, World
from vitrail.train.probe import probe as probe_scores
from vitrail.train.reliable import with_reliable_format
from vitrail.train.run import Run, replaced, with_fields
from vitrail.train.stop import preemptible
from vitrail.train.tensorboard import Events
from vitrail.train.unused import warn_unused

log = logging.getLogger("vitrail")


class Trained(NamedTuple):
    """The result of a run."""

    task: type[Task]
    scores: dict[str, Any]
    """scores of the evaluated split (its name under `split`), with `seconds` and `parameters`"""
    folder: RunFolder


class Plan(NamedTuple):
    """A run that is ready to be built."""

    run: Run
    splits: Splits
    weights: Task | None
    """the model that it starts from"""


@preemptible()
def begin(
    recipe: recipes.Recipe,
    data: str | None,
    init: str | None,
    changes: Mapping[str, Any],
    out: Path | None,
    device: str | None,
    group: str | None = None,
    world: World = ALONE,
    job: Sequence[str] = (),
) -> Trained:
    """Train a recipe on `data`, from the weights `init` or from scratch, in the processes of `world`.

    `changes` are fields of the run, or of its components, that replace the recipe's; `group` is the run's
    field of that name, which opening the data needs before the others. `job` is what marks the job of these processes.
    """
    data = at_commit(data, world)
    with world.main_first():  # it downloads, and refuses once
        run, splits, weights = plan(recipe, data, init, changes, group)
    chosen = choose_device(device if world.device is None else world.device)
    with new_folder(run, out, world) as folder:  # before decoding the images, which is slow
        fingerprint = splits.fingerprint(run.group) | where_is(run.data)  # before a captioner encodes the labels
        world.check_same("the data", splits.fingerprint(run.group))
        components, steps = build(run, splits, chosen, weights, world)
        if out is None and folder.path != default_folder(run):  # after `build`, which may refuse the run
            log.warning(f"{default_folder(run)} holds another run, so this one is in {folder.path}")
        # Images in memory are rounded differently from streamed ones, so a resumed run must use the same mode.
        run = replace(run, memory=components.train.memory)
        run = with_reliable_format(run, components.task, chosen)
        run = with_micro_batches(run, components.task, components.train, world)
        try:
            folder.begin(run, splits.train.classes, fingerprint | components.cut, job)
            return Trained(task_of(run.task), train_run(run, components, folder, steps, resume=False), folder)
        except BaseException:  # whatever the error, a run that saved nothing must not keep the name
            folder.drop()
            raise


def at_commit(data: str | None, world: World) -> str | None:
    """The same data; of the Hub at one commit, for all processes and for the run when it is resumed."""
    if data is None or not hub_sets.is_address(data):
        return data
    return world.broadcast(lambda: hub_sets.pinned(data).encode()).decode()


def plan(
    recipe: recipes.Recipe, data: str | None, init: str | None, changes: Mapping[str, Any], group: str | None
) -> Plan:
    """The run that `begin` starts, with its data opened. Raises UserError for whatever does not fit together."""
    if init is not None:
        recipe = recipes.TUNED.get(recipe, recipe)
    if changes.get("resize") == "letterbox":  # which shows the whole image, whatever the recipe's crop is
        changes = {"crop_fraction": 1.0, **changes}
    recipes.check_given(recipe, data, init)
    recipes.check_here(example := recipe(1), data)
    data, group = example.data if data is None else data, example.group if group is None else group
    splits = open_training(example, data, changes, group)
    run = recipe(len(splits.train))
    kind, weights, scratch = task_of(run.task), None, None
    if (init := init or run.init) is not None:
        weights = zoo.load(init)
        scratch = None if run.init or recipe in recipes.FROM_WEIGHTS else run.model
        # The size of the checkpoint's preprocessing; DINOv2's positions are for larger images.
        run = recipes.from_weights(run, init, replace(encoder_of(weights).config, image_size=weights.preprocess.size))
    if (channels := splits.train.channels) not in (1, 3, run.model.channels):  # other channel counts are read as 1 or 3
        log.warning("the images have %d channels, so the model gets as many", channels)
        run = replace(run, model=replace(run.model, channels=channels))
    if weights is not None:
        if recipe in recipes.CONTINUED and not isinstance(weights, kind):
            raise UserError(
                f"{run.recipe} continues training the task {kind.name}, and {init} holds the task {weights.name}: name "
                "another with --init"
            )
        run = replace(run, task=kind.merged(run.task, weights))
    given = run
    run = resolve_auto(run, len(splits.train), len(splits.train.classes), changes)
    if init is not None and weights is not None:
        check_kept(init, weights, given, run)
        if scratch is not None and (line := recipes.replaced_by(init, scratch, run.model, changes)):
            log.warning(line)
    warn_unused(given, with_fields(given, changes), run.tune.method)
    return Plan(replace(run, data=str(data), group=group), splits, weights)


def open_training(example: Run, data: str, changes: Mapping[str, Any], group: str | None) -> Splits:
    """The splits of the data for a recipe, of which `example` is a run. UserError if there is nothing to train on."""
    options = replaced(example.task, changes).data_options()
    splits = open_for(task_of(example.task), data, options, example.data, group)
    if not len(splits.train):
        names = ", ".join(splits.beside[:3]) + ", ..." * (len(splits.beside) > 3)
        remedy = f"move the image folders ({names}) into a folder train" if names else "add one"
        raise UserError(f"{data} has no training split: {remedy}, or score a model on it with `vitrail eval`")
    return splits


def check_kept(init: str, weights: Task, given: Run, run: Run) -> None:
    """Refuse changes of what the weights `init` fix: `given` is the run with their values, `run` the requested one."""
    recipes.check_fixed(init, run.model, given.model, recipes.FREE)
    for name in ("weights_init", "attention_init"):
        if getattr(run, name) != getattr(given, name):
            raise recipes.fixed(init, name)
    kind = task_of(run.task)
    if kind.continues(run.task, weights):
        recipes.check_fixed(init, run.task, given.task, kind.free)


def where_is(data: str) -> dict[str, str]:
    """The absolute path of a data set, by which a run finds it again from another folder; {} for a built-in name."""
    return {"path": str(Path(data).resolve())} if Path(data).exists() else {}


def default_folder(run: Run) -> Path:
    """The folder of a run without `--out`, unless it is taken."""
    return Path("runs") / f"{run.recipe}-{run.seed}"


def folders(first: Path, out: Path | None) -> Iterator[Path]:
    """The folders that a run may have: `out` if it is given, else `first`, first-2, first-3 and so on."""
    yield out or first
    if out is None:
        yield from (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))


@contextmanager
def new_folder(run: Run, out: Path | None, world: World = ALONE) -> Iterator[RunFolder]:
    """The folder `out`, or the first free one of runs/RECIPE-SEED, runs/RECIPE-SEED-2 and so on, for this run alone.

    Rank 0 of `world` takes it; the others learn which it is.
    """
    if not world.is_main:
        yield Follower(Path(world.broadcast(bytes).decode()))
        return
    with ExitStack() as stack:

        def take() -> bytes:
            for path in folders(default_folder(run), out):
                try:
                    stack.enter_context(RunFolder(path).new())
                except Taken:
                    if out is not None:
                        raise
                else:
                    return str(path).encode()
            raise AssertionError("there is always another name")

        yield RunFolder(Path(world.broadcast(take).decode()))


def train_run(run: Run, components: Components, folder: RunFolder, steps: int, resume: bool) -> dict[str, Any]:
    """Train, score, and write the report; returns the scores."""
    world, loader = components.world, components.train
    folder.events = Events(folder.path / "tensorboard") if run.tensorboard and world.is_main else None
    if run.fast_dev_run:
        log.warning(f"fast dev run: {steps} steps on at most {run.images} images of each split; {NO_SCORES}")
    if world.is_main:
        announce.begin(run, components, folder, steps, resume)
        if (line := decoding_line(run, components.task, loader, folder.rows())) is not None:
            log.warning(line)
    scores = fit_frozen(run, components, folder) if run.tune.frozen else fit(run, components, folder, steps, resume)
    scores |= {"fast_dev_run": True} if run.fast_dev_run else {}
    folder.end(scores)
    if world.is_main:
        write_atomic(folder.path / "examples.json", json.dumps(examples(components, scores)))
        write_report(folder.path)
    return scores


def score(
    task: Task,
    source: str,
    data: str,
    split: str | None,
    probe: bool = False,
    shuffle: bool = False,
    images: int | None = None,
    max_bad: float | None = None,
) -> tuple[str, dict[str, Any]]:
    """The name of the evaluated split and the model's scores on it; with `probe` also the scores of its features.

    `source` is the model's source. For an encoder without a head, only its features are scored. `shuffle` gives each
    image the target of another one, as a control. At most `images` of each split are read. `max_bad` is the largest
    fraction of unreadable images; None for that of the run, if it learned from this data.
    """
    if max_bad is not None and not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad must be a fraction from 0 to 1, got {max_bad}")
    data = hub_sets.pinned(data)
    own = run_of(source)
    learned = own.run if own is not None and own.is_at(data) else None
    group = learned.group if learned else None
    if probe or task.headless:
        if shuffle:
            raise UserError(
                "--shuffle-images is a control for predictions, but --probe scores features: use only one of them"
            )
        limit = allowed_bad(max_bad, learned)
        return score_features(task, open_classes(task, data, group), split, images, group, limit)
    splits = open_for(task, data, task.data_options(), group=group)
    if learned is None and own is not None and own.has_copy(splits):
        learned = own.run
        if split is None and splits.val is None and splits.test is None:
            log.warning(
                f"{data} has the names and labels of what {own.folder.path} was trained on, and is scored as that; "
                "--split train scores all"
            )
    splits = with_held_back(splits, split, learned)
    limit = allowed_bad(max_bad, learned)
    name, chosen = choose_split(splits, split)
    scored = chosen.spread(images).shuffled() if shuffle else chosen.spread(images)
    device = next(task.parameters()).device
    all_splits = {"train": splits.train, "val": splits.val, "test": splits.test, name: scored}

    def loader(images: ImageSet) -> Loader:
        return evaluation_loader(task, images, device, max_bad=limit, tally=Tally.of(images, limit))

    loaders = Loaders({key: partial(loader, each) for key, each in all_splits.items() if each})
    train = None if name == "train" else splits.train
    scores = evaluate(task, loaders, name, metric=lambda: task.metric(chosen, train), final=True)
    if (what := not_numbers(task, scores, name)) is not None:
        raise UserError(f"{what}: {source} is damaged, or was trained at too high a learning rate: give another model")
    return name, {**scores, "shuffled": True} if shuffle else scores


def allowed_bad(max_bad: float | None, learned: Run | None) -> float:
    """The largest fraction of unreadable images: as given, else that of the run that learned from the data."""
    return max_bad if max_bad is not None else learned.max_bad if learned else 0.01


def open_classes(task: Task, data: str, group: str | None) -> Splits:
    """The splits of data with classes, which the probes of features need."""
    try:
        return open_data(data, grouped=group is not None)
    except UserError as error:
        try:
            open_for(task, data, task.data_options())
        except UserError:
            raise error from None
    raise UserError(
        f"--probe scores features by how well they tell classes apart, and {data} holds {task.target.noun} without "
        "classes: remove --probe, or give --data one folder per class"
    )


def with_held_back(splits: Splits, split: str | None, learned: Run | None) -> Splits:
    """The splits, with the validation split that training cut off, if the data has none of its own.

    This happens if `val` is requested, or if a model trained on this data (the run `learned`) would otherwise be scored
    on its training images.
    """
    if splits.val is not None or not (split == "val" or (split is None and splits.test is None and learned)):
        return splits
    train, val = split_val(splits.train, VAL_FRACTION, learned.group if learned else None)
    return replace(splits, train=train, val=val)


class RunOf(NamedTuple):
    """The run in whose folder a model is."""

    folder: RunFolder
    run: Run

    def is_at(self, data: str) -> bool:
        """Whether it was trained on the data there. A relative path means something else in another working folder."""
        return Path(self.folder.place(self.run.data)).resolve() == Path(data).resolve()

    def has_copy(self, splits: Splits) -> bool:
        """Whether it was trained on images of these names and labels."""
        try:
            return self.folder.learned_from(splits.fingerprint(self.run.group))
        except UserError:  # the images have no such groups
            return False


def run_of(source: str) -> RunOf | None:
    """The run in whose folder `source` is; None if there is none, or one of another version."""
    for folder in map(RunFolder, (Path(source), Path(source).parent)):  # best/ and last/ are in the run's folder
        with suppress(UserError):
            return RunOf(folder, folder.run())
    return None


def score_people(task: Task, data: str, split: str | None, images: int | None = None) -> tuple[str, dict[str, Any]]:
    """The split's name and the scores of its references: each reference against the image's others."""
    name, chosen = choose_split(with_held_back(open_for(task, data, task.data_options()), split, learned=None), split)
    return name, task.human(chosen.spread(images))


def score_features(
    task: Task,
    splits: Splits,
    split: str | None,
    images: int | None = None,
    group: str | None = None,
    max_bad: float = 0.01,
) -> tuple[str, dict[str, Any]]:
    """The split's name and its scores: the task's own if it knows the classes, and those of `train/probe.py`.

    The probes learn from the training split. The penalty is chosen on another split than the one that is scored. If a
    split for either is missing, it is cut off the training split.
    """
    if not len(splits.train):
        raise UserError(
            "the data has no training split, which k-NN and the linear probe learn from: add a folder train"
        )
    if split == "train":
        raise UserError("k-NN and the linear probe learn from the training split: choose --split val or test")
    train, val = splits.train, splits.val
    name, scored = ("train", train) if split == "val" and val is None else choose_split(splits, split)
    if name == "train":
        name, (train, scored) = "val", split_val(train, group=group)
    if val is None or name == "val":
        train, val = split_val(train, group=group)
    train, val, scored = (chosen.spread(images) for chosen in (train, val, scored))
    device = next(task.parameters()).device
    reader = partial(Loader, preprocess=task.preprocess, prepare=task.preparation(train=False), batch_size=256, seed=0)
    loaders = [reader(chosen, train=False, device=device, max_bad=max_bad) for chosen in (train, val, scored)]
    scores = {}
    if task.score is not None and isinstance(scored.target, task.target):
        try:
            scored_by = {name: evaluation_loader(task, scored, device, max_bad=max_bad)}
            scores = evaluate(task, scored_by, name, metric=lambda: task.metric(scored), final=True)
        except UserError as error:
            log.warning(f"only the model's features are scored: {error}")
    return name, {**scores, **probe_scores(task, *loaders)}


def choose_split(splits: Splits, name: str | None) -> tuple[str, ImageSet]:
    """A split by name; by default test, else val, else train."""
    there = {"test": splits.test, "val": splits.val, "train": splits.train}
    if name is not None:
        if there[name] is None:
            raise UserError(f"the data has no {name} split: it has {', '.join(k for k, v in there.items() if v)}")
        return name, there[name]  # type: ignore[return-value]
    return next((k, v) for k, v in there.items() if v is not None and len(v))
