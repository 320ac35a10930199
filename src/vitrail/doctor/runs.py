"""What is wrong with a run, from its folder: the rules of `vitrail.train.hints`, and what its weights and data tell."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from vitrail import zoo
from vitrail.data.decode import BadImage
from vitrail.doctor.finding import Diagnosis, Finding, by_certainty
from vitrail.errors import RunError, UserError
from vitrail.report.run import RunRecord, read_run
from vitrail.tasks import task_of
from vitrail.tasks.encoder import encoder_of
from vitrail.tasks.task import Task
from vitrail.train.build import open_for
from vitrail.train.folder import RunFolder
from vitrail.train.hints import Signs, hints, signs_of, untrained
from vitrail.train.run import Run
from vitrail.units import number

LOOKED_AT = 64
"""images from which the statistics of normalised images are computed"""
WEAK = 0.5
"""training loss, as a fraction of that of a guess, above which frozen weights do not fit the data"""
MOSTLY = 0.5
"""fraction of the weights that are frozen on purpose in most methods of fine-tuning"""
FIXED = ("frozen", "last-blocks", "linear", "knn", "lora")
"""methods that keep most weights"""


def is_run(path: str) -> bool:
    """Whether a path is the folder of a run."""
    return any((Path(path) / name).is_file() for name in ("recipe.json", "metrics.jsonl"))


def examine_run(path: str) -> Diagnosis:
    """All checks of a run, finished or not."""
    record = read_run(path)
    folder = RunFolder(Path(path))
    run = folder.run()
    kind = task_of(run.task)
    steps = max([int(number(row.get("step")) or 0) for row in (*record.train, *record.val)], default=0)
    signs = signs_of(run, kind, len(record.classes), record.train, record.val, done=1.0)
    notes = [f"{steps:,} steps of the recipe {run.recipe} on {run.data}"]
    if not steps:
        notes.append("the run has no row of a step in metrics.jsonl yet")
    try:
        folder.rows()
    except UserError as error:
        notes.append(f"{error}; the others were read")
    last = None
    if (there := next((path for path in (folder.last, folder.best) if path.exists()), None)) is not None:
        last = _load(str(there), notes)
    else:
        notes.append("weights are not checked: the run has no checkpoint yet, which its first evaluation writes")
    first = _load(run.init, notes) if run.init is not None else None
    signs.answers = kind.collapsed(record.final) if record.final else None
    if last is not None:
        signs.image = _normalised(run, folder, last, notes)
    if signs.rate == 0:
        signs.unmoved = (1.0, "all of them, at a learning rate of 0")
    findings = []
    if first is not None:
        signs.untrained = str(run.init) if untrained(first.encoder) else ""
        findings += [
            found for found in (_frozen(run, signs, first, last), _other_mean(run, first)) if found is not None
        ]
    findings += [Finding(hint.check, hint.what, hint.remedy, "likely", [(path,)]) for hint in hints(signs)]
    findings += [found for found in (_fast_dev_run(run, record),) if found is not None]
    facts = {"steps": steps, "recipe": run.recipe, "data": run.data}
    return Diagnosis(path, by_certainty(_once(findings)), facts, notes)


def _once(findings: list[Finding]) -> list[Finding]:
    """The first finding of each name."""
    found: dict[str, Finding] = {}
    for finding in findings:
        found.setdefault(finding.check, finding)
    return [*found.values()]


def _load(source: str, notes: list[str]) -> Task | None:
    try:
        return zoo.load(source)
    except UserError as error:
        notes.append(f"weights are not checked: {error}")
        return None


def _frozen(run: Run, signs: Signs, first: Task, last: Task | None) -> Finding | None:
    """Weights of the encoder that are still those that the run started from, although the loss is high."""
    if last is None or not signs.losses:
        return None
    before, after = (encoder_of(task).state_dict() for task in (first, last))
    shared = [name for name in before if name in after and after[name].shape == before[name].shape]
    total = sum(before[name].numel() for name in shared)
    same = sum(before[name].numel() for name in shared if torch.equal(before[name].float(), after[name].float()))
    if not total or same < MOSTLY * total or (signs.losses[-1] < WEAK * signs.guess and run.tune.method in FIXED):
        return None
    why = f"--method {run.tune.method}" if run.tune.method in FIXED else "--lr and --layer-decay"
    return Finding(
        "frozen",
        f"{same / total:.0%} of the encoder's weights are those of {run.init}, and the training loss is still "
        f"{signs.losses[-1]:.3g}",
        f"if this is a mistake, look at {why}, and train all weights with --method full",
        "likely",
        [(run.init or "",)],
    )


def _other_mean(run: Run, first: Task) -> Finding | None:
    """Preprocessing other than that of the weights which the run started from."""
    own = first.preprocess
    other = [
        f"{name} {given} (the weights: {used})"
        for name, given, used in (("mean", run.mean, own.mean), ("std", run.std, own.std))
        if given is not None and max(abs(a - b) for a, b in zip(given, used, strict=False)) > 0.02
    ]
    if not other:
        return None
    return Finding(
        "wrong-mean-std",
        f"images are normalised in another way than the weights of {run.init} learned: {', '.join(other)}",
        "leave out --mean and --std: the checkpoint has its own",
        "likely",
        [(run.init or "",)],
    )


def _normalised(run: Run, folder: RunFolder, task: Task, notes: list[str]) -> tuple[float, float] | None:
    """The mean and standard deviation of some good images as the model takes them; None if the data is gone."""
    seen = []
    try:
        images = open_for(task, folder.data(run.data), run.task.data_options(), group=run.group).train
        chosen = images.spread(LOOKED_AT)
        for i in range(len(chosen)):
            with suppress(BadImage):
                seen.append(task.preprocess(chosen.open(i)))
    except (UserError, RunError) as error:  # the second if the Hub does not answer
        notes.append(f"normalised images are not checked: {error}")
        return None
    if not seen:
        return None
    std, mean = torch.std_mean(torch.stack(seen))
    return mean.item(), std.item()


def _fast_dev_run(run: Run, record: RunRecord) -> Finding | None:
    if not run.fast_dev_run:
        return None
    return Finding(
        "fast-dev-run",
        "this is a fast dev run of a few steps on a few images: its scores mean nothing",
        "train without --fast-dev-run",
        "certain",
        [(str(record.folder),)],
    )
