"""What each idea added to a captioner: the runs that led to it one after the other, from what they logged.

    python bench/ideas.py runs/match runs/coca runs/coca-on runs/critic runs/recall
    python bench/ideas.py runs/short/match runs/short/coca --name caption-short

Scores are those of a run's best evaluation on validation, which its checkpoint is.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from record import record


def logged(run: Path) -> dict[str, Any]:
    """One run: its command, how long it took, and its best scores; one that matches alone has none."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max((row for row in rows if row["kind"] == "val"), key=lambda row: row[rows[0]["score"]])
    done = next(row for row in rows if row["kind"] == "done")
    # A folder of this machine says nothing elsewhere.
    words = [Path(word).name if Path(word).is_absolute() else word for word in shlex.split(rows[0]["command"])]
    return {
        "command": shlex.join(words),
        "minutes": round(done["seconds"] / 60, 1),
        "parameters": done["parameters"],
        **{name: best[name] for name in ("cider", "bleu4") if name in best},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--name", default="caption-ideas", help="of the file under results/")
    asked = parser.parse_args()
    record(asked.name, {"runs": [logged(run) for run in asked.runs]})
