"""The learning curves of a run."""

from __future__ import annotations

from vitrail.charts import BLUE, GREY, RED, Line, Panel, chart, points
from vitrail.report.run import RunRecord


def learning_curves(run: RunRecord) -> str:
    """Loss, score and learning rate against steps, as HTML; without curves that were not logged."""
    score, best = run.score, run.best
    label = score.label or score.name
    losses = points(run.val, "loss") or points(run.val, run.kind.val_loss if run.kind is not None else "loss")
    # Training logs the score under its name or its display name.
    trained = points(run.train, score.name) or points(run.train, label)
    mark = (float(best["step"]), float(best[score.name])) if best else None
    panels = [
        Panel("loss", [Line("training", points(run.train, "loss"), BLUE), Line("validation", losses, RED)]),
        Panel(
            label,
            [Line("training", trained, BLUE), Line("validation", points(run.val, score.name), RED)],
            mark,
            score.text,
        ),
        Panel("learning rate", [Line("", points(run.train, "lr"), GREY)]),
    ]
    return chart(panels, "loss, score and learning rate against steps")
