"""Hints: what usually is wrong when a run looks like this, in plain words. Each is logged once while a run trains.

`vitrail doctor RUN` applies the same rules to the log of a run.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.tasks.task import Task
from vitrail.train.optim import Optim
from vitrail.train.run import Run
from vitrail.units import number

log = logging.getLogger("vitrail")

Row = Mapping[str, Any]

WAITING = 0.5
"""fraction of the time that a run with workers waits for data"""
AT_REST = 0.015
"""distance of a loss from ln(classes) or ln(batch size), as a fraction of it, at which nothing is learned"""
ROWS = 3
"""rows of the log that a rule needs"""
ROSE = 1.5
"""how many times its first value a loss is when the learning rate is too high"""
SLOW = 0.1
"""fraction by which the loss falls, over all steps, when the learning rate is too low"""
STEADY = 0.8
"""fraction of neighbouring rows between which it falls then"""
LOGITS, GREW = 100.0, 1.5
"""attention logits above which softmax picks one token, and the growth that shows no bound"""
MEMORISED, WORSE = 0.5, 1.2
"""training loss as a fraction of the validation loss, and the validation loss over its best, of a run that overfits"""
LEARNED, GAP, COUNTED = 0.9, 0.25, 20
"""score on training images, its lead over the validation score, and images of that split, of a run that overfits"""
USUAL = {"sgd": 0.1, "muon": 4e-3}
"""usual learning rates of optimizers, of Muon that for matrices; 1e-3 for AdamW and others"""
NEW = 1e-5
"""standard deviation within a norm or bias of a new model; some are drawn with 1e-6"""
HIGH, LOW = 10.0, 0.01
"""learning rates, as multiples of the usual one, that explain a loss that does not move"""
UNMOVED = 0.1
"""fraction of the trained weights that may stay unchanged"""
FAR, NARROW, WIDE = 4.0, 0.02, 5.0
"""mean of normalised images, and their standard deviation, beyond which mean or std cannot be right"""


class Hint(NamedTuple):
    """What a run looks like, and what to do."""

    check: str
    what: str
    remedy: str


@dataclass
class Signs:
    """What the rules look at. Entries that are unknown are empty."""

    train: Sequence[Row] = ()
    """rows of the log: means over some steps"""
    val: Sequence[Row] = ()
    classes: int = 0
    """number of classes of a task whose loss begins at ln(classes)"""
    batch_size: int = 0
    streamed: bool = False
    """whether workers read images while the run trains"""
    val_loss: str = ""
    """the entry of a row of `val` that is comparable with the loss"""
    train_score: str = ""
    """the entry of a row of `train` that is comparable with the score"""
    score: str = ""
    from_scratch: bool = True
    qk_norm: bool = False
    """whether the model normalises queries and keys"""
    qk_clip: float = 0.0
    """the optimizer's bound on attention logits; 0 for none"""
    rate: float = 1.0
    """peak learning rate, as a multiple of the usual one of its optimizer"""
    done: float = 1.0
    """fraction of the steps that are done"""
    answers: str | None = None
    """what is wrong with all answers of the last evaluations (see `Task.collapsed`)"""
    image: tuple[float, float] | None = None
    """mean and standard deviation of normalised images"""
    unmoved: tuple[float, str] | None = None
    """fraction of the trained weights that have not changed since the start, and the name of the first"""
    untrained: str = ""
    """the source of pretrained weights whose values are those of a new model"""

    @property
    def losses(self) -> list[float]:
        return numbers(self.train, "loss")

    @property
    def guess(self) -> float:
        """The loss of a model that guesses: ln(classes), or the first one."""
        return math.log(self.classes) if self.classes > 1 else self.losses[0]


def numbers(rows: Sequence[Row], name: str) -> list[float]:
    """The values of an entry, of the rows that have it."""
    return [value for row in rows if (value := number(row.get(name))) is not None]


def hints(signs: Signs) -> Iterator[Hint]:
    """The rules that hold."""
    for rule in (_preprocessing, _loaded_nothing, _unmoved, _rate, _collapsed, _starved, _overfit, _logits):
        if (found := rule(signs)) is not None:
            yield found


def _rate(signs: Signs) -> Hint | None:
    """The learning rate, or else a loss that does not move at a usual one."""
    return _too_high(signs) or _too_low(signs) or _at_rest(signs)


def _preprocessing(signs: Signs) -> Hint | None:
    if signs.image is None:
        return None
    mean, std = signs.image
    if abs(mean) <= FAR and NARROW <= std <= WIDE:
        return None
    return Hint(
        "wrong-mean-std",
        f"normalised images have mean {mean:.3g} and standard deviation {std:.3g}, not about 0 and 1",
        "give --mean and --std for pixels of 0 to 1 (0.485, not 124), or leave them out",
    )


def _unmoved(signs: Signs) -> Hint | None:
    if signs.unmoved is None or signs.unmoved[0] <= UNMOVED:
        return None
    share, name = signs.unmoved
    return Hint(
        "frozen",
        f"{share:.0%} of the weights that should be trained have not moved since the start, such as {name}",
        "check that the learning rate is not 0 (--lr, --layer-decay) and that the loss depends on these weights",
    )


def _loaded_nothing(signs: Signs) -> Hint | None:
    if not signs.untrained:
        return None
    return Hint(
        "loaded-nothing",
        f"the weights of {signs.untrained} are those of a new model: loading them changed nothing",
        "give --init a checkpoint that was trained, such as the folder best/ of a finished run",
    )


def _too_high(signs: Signs) -> Hint | None:
    losses = signs.losses
    remedy = "divide --lr (and --muon-lr) by 3 to 10, or train with --clip 1 and a longer --warmup"
    if (skipped := int(sum(numbers(signs.train, "skipped")))) >= ROWS:
        how = f"{skipped} steps gave no finite loss"
        return Hint("rate-too-high", f"{how}: the learning rate is probably too high", remedy)
    if len(losses) < 2 or min(losses) <= 0:
        return None
    # The first row may already be after the jump.
    start = losses[0] if losses[0] <= 2 * signs.guess + 1 else signs.guess
    low, peak = min(losses), max(losses)
    later = losses[losses.index(low) + 1 :]
    last = sum(later[-ROWS:]) / len(later[-ROWS:]) if len(later) >= ROWS else low  # single rows of any run jump
    rose = last > ROSE * low and last > 0.5 * start
    stuck = signs.rate >= HIGH and losses[-1] > (1 - AT_REST) * signs.guess
    if not (peak > ROSE * start + 0.5 or rose or stuck):
        return None
    how = f"the loss rose from {low if rose else start:.3g} to {last if rose else peak:.3g}"
    if stuck and peak <= ROSE * start:
        how = f"the loss stays at {losses[-1]:.3g} at {signs.rate:.0f} times the usual learning rate"
    return Hint("rate-too-high", f"{how}: the learning rate is probably too high", remedy)


def _at_rest(signs: Signs) -> Hint | None:
    """A loss that does not move from the value of a guess."""
    losses = signs.losses
    if signs.done < 0.5 or len(losses) < ROWS or not LOW < signs.rate < HIGH:
        return None
    for name, value in (("classes", signs.classes), ("batch size", signs.batch_size)):
        guess = math.log(max(value, 1))
        half = losses[-max(ROWS, len(losses) // 2) :]
        if value > 1 and all(abs(loss - guess) < AT_REST * guess for loss in half) and not _falls(losses):
            return Hint(
                "loss-at-rest",
                f"the loss stays at {half[-1]:.3g}, which is ln({name} = {value:,}): the model guesses",
                "check that labels belong to their images (vitrail doctor DATA); then try another --lr, first a third "
                "of it, and --mean and --std",
            )
    return None


def _falls(losses: Sequence[float]) -> bool:
    """Whether a loss falls in nearly every row."""
    falls = sum(b < a for a, b in itertools.pairwise(losses))
    return len(losses) > ROWS and falls >= STEADY * (len(losses) - 1)


def _too_low(signs: Signs) -> Hint | None:
    losses = signs.losses
    if len(losses) < 2 or signs.done < 0.5 or min(losses) <= 0 or losses[-1] < 0.75 * signs.guess:
        return None
    little = losses[-1] > (1 - SLOW) * losses[0] and max(losses) < ROSE * signs.guess
    tiny = 0 < signs.rate <= LOW
    if not (little and (tiny or (_falls(losses) and signs.from_scratch))):
        return None
    return Hint(
        "rate-too-low",
        f"the loss only falls from {losses[0]:.3g} to {losses[-1]:.3g}: the learning rate is probably too low, or the "
        "run too short",
        "multiply --lr (and --muon-lr) by 10, or train for more --epochs",
    )


def _collapsed(signs: Signs) -> Hint | None:
    if signs.answers is None or signs.done < 0.5 or min(numbers(signs.val[-1:], "count"), default=0) < COUNTED:
        return None
    if len(signs.losses) < ROWS:  # after a few steps any model may answer so
        return None
    return Hint(
        "collapsed",
        signs.answers,
        "lower --lr; check the labels (vitrail doctor DATA); with rare classes train with --balanced",
    )


def _starved(signs: Signs) -> Hint | None:
    waits = sorted(numbers(signs.train[1:], "wait"))
    if len(waits) < 2 or (wait := waits[len(waits) // 2]) <= (WAITING if signs.streamed else 0.9):
        return None
    return Hint(
        "starved",
        f"training waits for data {wait:.0%} of the time: decoding and reading are slower than the network",
        "raise --workers up to the number of cores, make the images smaller (vitrail data shard --resize 256), or keep "
        "them in memory (--memory)",
    )


def _overfit(signs: Signs) -> Hint | None:
    losses, values = signs.losses, numbers(signs.val, signs.val_loss)
    remedy = "stop earlier (fewer --epochs), augment more, start from pretrained weights (--init), or collect images"
    if len(values) > 1 and losses and losses[-1] > 0:
        last, best = values[-1], min(values)
        if losses[-1] < MEMORISED * last and last > WORSE * best and last > 0.3:
            what = f"the training loss is {losses[-1]:.3g} and the validation loss {last:.3g}, after {best:.3g} at best"
            return Hint("overfit", f"{what}: the model memorises the training images", remedy)
    train, val = numbers(signs.train, signs.train_score), numbers(signs.val, signs.score)
    enough = min(numbers(signs.val[-1:], "count"), default=0) >= COUNTED
    if train and val and enough and train[-1] >= LEARNED and train[-1] - val[-1] >= GAP:
        what = f"the score is {train[-1]:.3g} on training images and {val[-1]:.3g} on validation images"
        return Hint("overfit", f"{what}: the model memorises the training images", remedy)
    return None


def _logits(signs: Signs) -> Hint | None:
    each = [found for row in signs.val if (found := row.get("attention_logits"))]
    peaks = [max(found) for found in each if all(map(math.isfinite, found))]
    if len(peaks) < 2 or peaks[-1] <= LOGITS or peaks[-1] < GREW * peaks[0] or peaks[-1] < max(peaks[:-1]):
        return None
    bounds = ["--qk-norm"] * (signs.from_scratch and not signs.qk_norm)  # pretrained weights fix the model
    bounds += [f"--qk-clip {LOGITS:g}"] * (not signs.qk_norm and not 0 < signs.qk_clip <= LOGITS)
    return Hint(
        "attention-logits",
        f"the largest attention logit grew from {peaks[0]:.0f} to {peaks[-1]:.0f}: softmax picks one token, and half "
        "precision will fail",
        f"train with {' or '.join(bounds)}, " * bool(bounds) + "lower --muon-lr or --lr, or raise --weight-decay",
    )


class Hints:
    """Logs each hint once while a run trains."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.quiet = task, run.fast_dev_run
        self.signs = signs_of(run, type(task), len(task.classes))
        self.signs.untrained = run.init if run.init is not None and untrained(task.encoder) else ""
        self.train: list[Row] = []
        self.val: list[Row] = []
        self.given: set[str] = set()
        self.collapsed: str | None = None
        self.first = checksums(task)

    def resumed(self, rows: Sequence[Row], done: float) -> None:
        """Take in the log of a run that resumes after the fraction `done` of its steps: its hints were given then."""
        self.train += [row for row in rows if row["kind"] == "train"]
        self.val += [row for row in rows if row["kind"] == "val"]
        self.signs.train, self.signs.val, self.signs.done = self.train, self.val, done
        self.given |= {hint.check for hint in hints(self.signs)}

    def logged(self, row: Row) -> None:
        """Take in a row of the log of training."""
        self.train.append(row)
        self._tell()

    def evaluated(self, scores: Row, images: Tensor, done: float) -> None:
        """Take in an evaluation after the fraction `done` of the steps, with normalised images of a batch."""
        self.val.append(scores)
        std, mean = torch.std_mean(images.float())
        self.signs.image = (mean.item(), std.item())
        before, self.collapsed = self.collapsed, self.task.collapsed(scores)
        # Small networks may begin with one class. After the last evaluation, often the only one, none will follow.
        self.signs.answers = self.collapsed if before or done >= 1 else None
        self.signs.unmoved = unmoved(self.task, self.first)
        self.signs.done = done
        self._tell()

    def _tell(self) -> None:
        if self.quiet:
            return
        self.signs.train, self.signs.val = self.train, self.val
        for hint in hints(self.signs):
            if hint.check not in self.given:
                self.given.add(hint.check)
                log.warning(f"hint: {hint.what}; {hint.remedy}")


def signs_of(
    run: Run, kind: type[Task], classes: int, train: Sequence[Row] = (), val: Sequence[Row] = (), done: float = 0.0
) -> Signs:
    """What is known of a run from its recipe and its log."""
    assert kind.score is not None
    return Signs(
        train=train,
        val=val,
        classes=classes,
        batch_size=run.batch_size,
        streamed=run.memory is False,
        val_loss=kind.val_loss,
        train_score=kind.train_score,
        score=kind.score.name,
        from_scratch=run.init is None,
        qk_norm=getattr(run.model, "qk_norm", False),
        qk_clip=run.optim.qk_clip,
        rate=_rate_of(run.optim),
        done=done,
    )


def _rate_of(optim: Optim) -> float:
    """The peak learning rate as a multiple of the usual one; with Muon, the larger of the two multiples."""
    if optim.optimizer == "muon":
        return max(optim.lr / 1e-3, optim.muon_lr / USUAL["muon"])
    return optim.lr / USUAL.get(optim.optimizer, 1e-3)


_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksums(module: nn.Module) -> dict[str, Tensor]:
    """A whole number per trained weight tensor, from its bits: another one when any value changes."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # of a sharded tensor
            found[name] = own.detach().contiguous().view(_WHOLE[own.element_size()]).sum()
    return found


def unmoved(module: nn.Module, first: Mapping[str, Tensor]) -> tuple[float, str]:
    """The fraction of the trained weights that have not changed, and the name of the first tensor of them."""
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    now = checksums(module)
    names = [name for name in first if name in now]
    if not names:
        return 0.0, ""
    same = (torch.stack([now[name] for name in names]) == torch.stack([first[name] for name in names])).tolist()
    still = [name for name, unchanged in zip(names, same, strict=True) if unchanged]
    return sum(sizes[name] for name in still) / sum(sizes[name] for name in names), (still or [""])[0]


@torch.no_grad()
def untrained(module: nn.Module) -> bool:
    """Whether norms and biases have the values of a new model: training changes them in any network."""
    vectors = [p.float() for p in module.parameters() if p.ndim == 1 and len(p) > 1]
    return bool(vectors) and bool(torch.stack([v.std() for v in vectors]).max() < NEW)
