"""Resume a run: where it stopped, with data that has moved, or beyond its end, by hand or by its job."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitrail import recipes
from vitrail.data import hub_sets
from vitrail.errors import UserError
from vitrail.options import parse_fields
from vitrail.start import Trained, at_commit, begin, default_folder, folders, train_run, where_is
from vitrail.tasks import task_of
from vitrail.train.build import build, open_for
from vitrail.train.device import choose_device
from vitrail.train.folder import LEASE, Follower, RunFolder
from vitrail.train.job import marks_of_all
from vitrail.train.optim import factor
from vitrail.train.parallel import ALONE, World
from vitrail.train.run import FREE, LENGTH, Run, changed_fields
from vitrail.train.stop import preemptible

log = logging.getLogger("vitrail")


@preemptible()
def begin_or_resume(
    recipe: recipes.Recipe,
    data: str | None,
    init: str | None,
    changes: Mapping[str, Any],
    out: Path | None,
    device: str | None,
    group: str | None = None,
    world: World = ALONE,
) -> Trained:
    """As `begin`; but if this is a job that is started again, resume the run that it began (see `train/job.py`).

    A command with other settings is another job, but for fields that are in `FREE`. Data may have moved, and a Hub set
    without a commit is that of the run's commit. Raises UserError for other data.
    """
    if out is not None and data is not None and out.resolve() == Path(data).expanduser().resolve():
        raise UserError(f"--out {out} is the folder of the data, whose files a run could replace: choose another --out")
    settled = {name: value for name, value in changes.items() if name not in FREE}
    command = json.dumps([recipe(1).recipe, init, group, settled], sort_keys=True)
    job = marks_of_all(world, hashlib.sha256(command.encode()).hexdigest()[:16])
    named = (recipes.TUNED.get(recipe, recipe) if init is not None else recipe)(1)
    first = default_folder(replace(named, seed=changes.get("seed", named.seed)))

    def find() -> bytes:
        there = itertools.takewhile(Path.exists, folders(first, out)) if job else ()
        return str(next((path for path in there if RunFolder(path).begun_by(job)), "")).encode()

    if not (found := world.broadcast(find).decode()):
        return begin(recipe, data, init, changes, out, device, group, world, job)
    log.warning(f"the job of the run in {found} is started again, so that run is resumed")
    free = {name: value for name, value in changes.items() if name in FREE}
    on_hub = data is not None and hub_sets.is_address(data)

    def chosen(run: Run) -> Mapping[str, Any]:
        if on_hub and not hub_sets.is_same(str(data), run.data):
            raise UserError(f"the run in {found} has another data set than this command: choose another --out")
        return free

    return _resume(_folder(Path(found), world), device, None if on_hub else data, chosen, world, job)


@preemptible()
def resume_run(
    path: Path, device: str | None, data: str | None = None, options: Sequence[str] = (), world: World = ALONE
) -> Trained:
    """Resume the run in the folder `path` from its last saved state; on the processor (CPU) to the same bits.

    `data` is where its data is now. `options` are flags of fields that are in `FREE`. With other processes than before,
    or on another number of them, the results are the same within rounding. A finished run returns its scores again,
    unless the options extend it.
    """

    def chosen(run: Run) -> Mapping[str, Any]:
        if options and not options[0].startswith("-"):
            raise UserError(f"--resume continues a run with its own recipe: leave out {options[0]}")
        return parse_fields(run, options)

    return _resume(_folder(path, world), device, data, chosen, world)


def _folder(path: Path, world: World) -> RunFolder:
    return RunFolder(path) if world.is_main else Follower(path)


def _resume(
    folder: RunFolder,
    device: str | None,
    data: str | None,
    chosen: Callable[[Run], Mapping[str, Any]],
    world: World,
    job: Sequence[str] = (),
) -> Trained:
    """`resume_run`; `chosen` gives the new values of fields, and `job` is what marks the job that resumes it."""
    with world.main_first():
        run = folder.run()
        folder.check_recipe(run)
        changes = chosen(run)
        kind = task_of(run.task)
        extends = _extends(run, changes)
        patient = _more_patient(run, changes)
        changed = replace(run, **changes)
    scores: dict[str, Any] | None = json.loads(world.broadcast(lambda: json.dumps(folder.scores).encode()))
    if scores is not None and not extends and not (patient and "stopped_early" in scores):
        given = [*changed_fields(run, changed), *["data"] * (data not in (None, run.data))]
        vain = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        log.warning(f"the run in {folder.path} is finished" + f", so {vain} changed nothing" * bool(vain))
        return Trained(kind, scores, folder)
    data = at_commit(data, world)
    with ExitStack() as stack:
        with world.main_first():
            stack.enter_context(folder.alone(patience=LEASE if job else 0.0))
            folder.record(job)
            place = folder.data(run.data) if data is None else data
            if data is None and place != run.data and not Path(place).exists():
                raise UserError(f"no data at {place}, where the run's data was: if it has moved, add --data")
            splits = open_for(kind, place, run.task.data_options(), recipes.find(run.recipe)(1).data, run.group)
            fingerprint = splits.fingerprint(run.group)
            folder.check_data(fingerprint, place)
        new = replace(changed, data=run.data if data is None else data)
        components, steps = build(
            new, splits, choose_device(device if world.device is None else world.device), world=world
        )
        with world.main_first():
            folder.check_held_back(components.cut, place)
        if extends:
            _check_longer(run, new, components.train.steps_per_epoch, folder)
        if new != run:
            folder.change(new, fingerprint | components.cut | where_is(place))
        return Trained(kind, train_run(new, components, folder, steps, resume=True), folder)


def _extends(run: Run, changes: Mapping[str, Any]) -> bool:
    """Whether the changes set the length of a run. Raises UserError for changes that are not possible."""
    if other := next((name for name in changes if name not in FREE), None):
        *most, last = (f"--{name.replace('_', '-')}" for name in FREE)
        raise UserError(
            f"--{other.replace('_', '-')}: a resumed run keeps its settings: only --data, {', '.join(most)} and {last} "
            "may change; start a new run"
        )
    longer = [name for name in LENGTH if changes.get(name, getattr(run, name)) != getattr(run, name)]
    if longer and run.tune.frozen:
        raise UserError(
            f"method {run.tune.method} trains in one pass, so --{longer[0].replace('_', '-')} has no effect"
        )
    if longer == ["epochs"] and run.max_steps is not None:
        raise UserError(f"the run ends after --max-steps {run.max_steps}: raise that instead of --epochs")
    return bool(longer)


def _more_patient(run: Run, changes: Mapping[str, Any]) -> bool:
    """Whether a run that stopped early trains on."""
    patience = changes.get("patience", run.patience)
    return run.patience is not None and (patience is None or patience > run.patience)


def _check_longer(run: Run, new: Run, per_epoch: int, folder: RunFolder) -> None:
    """Log how the learning rate of an extended run changes. Raises UserError if the run is not longer than before."""
    before, after = run.steps(per_epoch), new.steps(per_epoch)
    if after <= before:
        raise UserError(
            f"the run has {before} steps ({before / per_epoch:g} epochs), and would have {after}: a run can only be "
            "extended"
        )
    step = next(reversed(folder.states.steps()), 0)
    was, now = (factor(each.optim, max(0, step - 1), total, per_epoch) for each, total in ((run, before), (new, after)))
    log.warning(
        f"the run is extended from {before} to {after} steps, over which its schedule ({new.optim.schedule}) now "
        f"stretches: after step {step} the learning rate continues at {now:.1%} of the peak, where it was {was:.1%}"
    )
    if new.early_shape is not None and step < (until := round(new.early * after)):
        log.warning(f"images are of {new.early_size} pixels until step {until}, instead of {round(run.early * before)}")
