"""Trainings of captioners side by side, from what they logged: what each idea added, and what else was tried.

    python bench/ideas.py runs/long runs/match runs/coca runs/critic runs/recall
    python bench/ideas.py runs/small/vit runs/small/slower --name caption-tried

Scores are those of a run's best evaluation on validation, which its checkpoint is.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from record import portable, record

from vitrail.train.state import RunFolder


def logged(run: Path) -> dict[str, Any]:
    """One run: its command, how long it took, and its best scores."""
    rows = RunFolder(run).rows()
    best = max((row for row in rows if row["kind"] == "val"), key=lambda row: row["cider"])
    done = next(row for row in rows if row["kind"] == "done")
    return {
        "command": shlex.join(portable(shlex.split(rows[0]["command"]))),
        "minutes": round(done["seconds"] / 60, 1),
        "parameters": done["parameters"],
        **{name: best[name] for name in ("cider", "bleu4")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--name", default="caption-ideas", help="of the file under results/")
    asked = parser.parse_args()
    record(asked.name, {"runs": [logged(run) for run in asked.runs]})
