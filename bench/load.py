"""Loading ViT-B/16 from safetensors: seconds after `import torch`, and memory in addition to the weights.

    python bench/load.py

Each layout is loaded in new processes, with its file in the system's cache. The time is from `import torch` to the
model, and includes importing vitrail and its dependencies, as the first `vitrail.load` in a program does. CPU time does
not depend on other load on the machine.

Memory is measured at a second load, which imports nothing. `copied` is the process's private memory (RssAnon): weights
that are not memory-mapped from the file. `while loading` is the peak (VmHWM) above the memory at the end: a temporary
second copy. `beside the weights` is the memory above their size once each weight was read, as by a first image; it
includes pages of the file whose weights were copied, which the system frees when it needs memory. Memory is read from
/proc, so this needs Linux. `--tiny` loads a model of one block, once.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Parser, Row, record

LAYOUTS = ("vitrail", "timm", "hf")

CHILD = """
import gc, json, sys, time
import torch

def held():
    lines = [line.split() for line in open("/proc/self/status")]
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:", "RssAnon:")}

torch.zeros(1).add_(1)
start, busy = time.perf_counter(), time.process_time()
import vitrail
vitrail.load
imported = time.perf_counter()
model = vitrail.load(sys.argv[1])
loaded, busy = time.perf_counter(), time.process_time() - busy
del model
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = held()
model = vitrail.load(sys.argv[1])
after = held()
weights = list(model.state_dict().values())
for value in weights:
    value.sum()
size = sum(value.numel() * value.element_size() for value in weights)
print(json.dumps({
    "seconds": loaded - start,
    "load": loaded - imported,
    "busy": busy,
    "size": size,
    "copied": after["RssAnon"] - before["RssAnon"],
    "passing": after["VmHWM"] - after["VmRSS"],
    "beside": held()["VmRSS"] - before["VmRSS"] - size,
}))
"""


def parser() -> Parser:
    parser = Parser(__doc__, repeats=1, changes={"width": 64, "heads": 2, "depth": 1})
    parser.set_defaults(repeats=5, changes={})
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.changes)
        rows = {layout: measure(Path(folder) / layout, args.repeats) for layout in LAYOUTS}
    assert len({row["weights, MB"] for row in rows.values()}) == 1, "the layouts hold different weights"
    record("load", rows, args.results)
    for layout, row in rows.items():
        print(f"{layout}: {row}")


def make(folder: Path, changes: Row) -> None:
    """Write the same weights in every layout."""
    import torch

    import vitrail
    from vitrail.zoo import convert

    torch.manual_seed(0)
    model = vitrail.create("B/16", classes=1000, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # so that no page is all zeros
    model.save(folder / "vitrail")
    for layout in LAYOUTS[1:]:
        convert(folder / "vitrail", folder / layout, layout)


def measure(path: Path, repeats: int) -> Row:
    """Median and slowest of the times, and the largest of the memory."""
    found = [run(path) for _ in range(repeats)]
    seconds = sorted(row["seconds"] for row in found)
    return {
        "seconds after import torch, median": round(statistics.median(seconds), 3),
        "slowest": round(seconds[-1], 3),
        "of the processor, median": round(statistics.median(row["busy"] for row in found), 3),
        "of these in vitrail.load, median": round(statistics.median(row["load"] for row in found), 3),
        "weights, MB": _megabytes(found[0]["size"]),
        "copied, MB": _megabytes(max(row["copied"] for row in found)),
        "while loading, MB": _megabytes(max(row["passing"] for row in found)),
        "beside the weights, MB": _megabytes(max(row["beside"] for row in found)),
    }


def _megabytes(count: int) -> float:
    return round(max(count, 0) / 1e6, 1)


def run(path: Path) -> Row:
    """The measurements of one new process."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
