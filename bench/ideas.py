"""Compare trainings of captioners by their logs: the gain of each idea, and of other ideas that were tried.

    python bench/ideas.py runs/long runs/match runs/coca runs/scst runs/rerank
    python bench/ideas.py runs/small/vit runs/small/slower --name caption-tried

Scores are those of a run's best evaluation on validation, from which its checkpoint is.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path

from harness import Parser, Row, portable, record

from vitrail.train.folder import RunFolder


def parser() -> Parser:
    parser = Parser(__doc__, needs=["runs"])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, in the order of the rows")
    parser.add_argument("--name", default="caption-ideas", help="of the JSON file")
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        runs = args.runs or [tiny_run(Path(place) / "run")]
        record(args.name, {"runs": [logged(run) for run in runs]}, args.results)


def logged(run: Path) -> Row:
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


def tiny_run(folder: Path) -> Path:
    """A folder with the log of an invented training, whose second evaluation is the best."""
    rows: list[Row] = [{"kind": "start", "command": f"vitrail train caption-vit --out {folder}"}]
    rows += [{"kind": "val", "cider": cider, "bleu4": cider / 4} for cider in (0.1, 0.4, 0.2)]
    rows += [{"kind": "done", "seconds": 90.0, "parameters": 5}]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


if __name__ == "__main__":
    main()
