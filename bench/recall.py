"""How well runs of `caption-match` find each picture's captions, and the captions' pictures, on validation.

    python bench/recall.py runs/short/match runs/ladder/match runs/match --data flickr8k

Each is scored among all pictures and captions of the part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ideas import logged
from record import record

from vitrail.train.start import score

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    asked = parser.parse_args()
    rows = [{**logged(run), **score(str(run), asked.data, "val", "cpu")[1]} for run in asked.runs]
    record("caption-recall", {"runs": rows})
