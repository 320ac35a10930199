"""Score the weights that the package carries.

    python bench/carried.py --data DIR             the classifier
    python bench/carried.py caption --data DIR     the captioner, with its control and with people's captions

DIR holds CIFAR-10, or Flickr8k. The captioner chooses among captions by its match with the picture and by what people
said of like pictures, and is scored without either too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from record import record

KEPT = {
    "classify": ("top1", "top5", "cross_entropy", "calibration_error", "count"),
    "caption": (
        *("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor", "ptb_cider", "ptb_bleu4", "ptb_rouge_l"),
        *("length", "vocabulary", "identical", "new", "count"),
    ),
}

CHOOSING = {
    "the likeliest": ("--match", "0", "--consensus", "0"),
    "with its match": ("--consensus", "0"),
    "with the consensus": ("--match", "0"),
}


def scores(name: str, *options: str) -> dict[str, Any]:
    """What `vitrail eval` prints."""
    command = [sys.executable, "-m", "vitrail", "eval", *options, "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"part": found["split"], **{measure: found[measure] for measure in KEPT[name] if measure in found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(KEPT), default="classify")
    parser.add_argument("--data", required=True)
    asked = parser.parse_args()
    data = ["--data", asked.data]
    if asked.name == "caption":
        data += ["--split", "val"]  # whose test part is kept for the end
    rows = scores(asked.name, asked.name, *data)
    if asked.name == "caption":
        rows["captions of other pictures"] = scores("caption", "caption", *data, "--shuffle-images")
        rows["chosen"] = {how: scores("caption", "caption", *data, *options) for how, options in CHOOSING.items()}
        rows["people"] = scores("caption", "--human", *data)
    print(rows)
    record(asked.name, rows)


if __name__ == "__main__":
    main()
