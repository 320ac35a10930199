"""The learning curves of a run, each with what it tells."""

from __future__ import annotations

from vitrail.charts import BLUE, GREY, RED, Line, Panel, Points, chart, plain, points
from vitrail.html import note
from vitrail.report.run import RunRecord
from vitrail.units import number

LATE, RISEN = 0.7, 1.03
"""a loss whose lowest point lies before this share of the steps, and has risen by this factor since, is overfitting"""


def learning_curves(run: RunRecord) -> str:
    """Loss, score and learning rate against steps, as HTML; without curves that were not logged."""
    score, best = run.score, run.best
    label = score.label or score.name
    losses = points(run.val, "loss") or points(run.val, run.kind.val_loss if run.kind is not None else "loss")
    trained_loss = points(run.train, "loss")
    # Training logs the score under its name or its display name.
    trained = points(run.train, score.name) or points(run.train, label)
    mark = (float(best["step"]), float(best[score.name])) if best else None
    better = f"{'Higher' if score.best == 'max' else 'Lower'} is better."
    if mark is not None:
        better += (
            f" The circle is the best validation score, at step {plain(mark[0])}: the folder best has its weights."
        )
    panels = [
        Panel(
            "loss",
            [Line("training", trained_loss, BLUE), Line("validation", losses, RED)],
            says=_loss(trained_loss, losses),
        ),
        Panel(
            label,
            [Line("training", trained, BLUE), Line("validation", points(run.val, score.name), RED)],
            mark,
            score.text,
            better,
        ),
        Panel(
            "learning rate",
            [Line("", points(run.train, "lr"), GREY)],
            says="How far a step moves the weights: it rises during the warmup, and then follows the schedule.",
        ),
    ]
    drawn = chart(panels)
    return _epochs(run) + drawn if drawn else ""


def _loss(trained: Points, validated: Points) -> str:
    """What the loss curves tell: which is which, and whether the model overfits."""
    told = "What training minimises: lower is better."
    if not trained or not validated:
        return told
    step, lowest = min(validated, key=lambda point: point[1])
    end, last = validated[-1]
    if step < LATE * end and last > RISEN * lowest > 0:
        return (
            f"{told} The validation loss was lowest at step {plain(step)} and has risen since, which is overfitting: "
            "more images, more augmentation or fewer epochs help."
        )
    if trained[-1][1] > last:
        return f"{told} The training loss is the higher one, since only training images are augmented and regularised."
    return f"{told} A validation loss that rises while the training loss falls would be overfitting."


def _epochs(run: RunRecord) -> str:
    """How many steps are an epoch."""
    for row in reversed(run.train):
        step, epoch = number(row.get("step")), number(row.get("epoch"))
        if step and epoch:
            steps = step / epoch
            return note(f"One epoch, a pass over all training images, takes {steps:,.4g} step{'s' * (steps != 1)}.")
    return ""
