"""Loading ViT-B/16 from safetensors: seconds after `import torch`, and memory beside the weights themselves.

    python bench/load.py

Each layout is loaded in fresh processes, whose file is in the system's cache. The clock runs from `import torch` to the
model: importing vitrail and what it needs is inside, as a first `vitrail.load` in a program is. Then every weight is
read once, as a first picture would. Memory is the largest that the process held (anonymous pages and those of mapped
files) less what it held before: what is above the size of the weights is the second copy, or less.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record

REPEATS = 5
LAYOUTS = ("vitrail", "timm", "hf")

CHILD = """
import json, sys, time
import torch

def held(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

torch.zeros(1).add_(1)
start = time.perf_counter()
import vitrail
vitrail.load
imported = time.perf_counter()
if sys.argv[2] == "memory":
    vitrail.load(sys.argv[1])  # what loading imports, and leaves behind, is no copy of the weights
    import gc
    gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before, again = held("VmRSS"), time.perf_counter()
model = vitrail.load(sys.argv[1])
loaded = time.perf_counter()
after = held("VmRSS") - before
weights = list(model.state_dict().values())
for value in weights:
    value.sum()
size = sum(value.numel() * value.element_size() for value in weights)
peak = held("VmHWM") - before
print(json.dumps({"seconds": imported - start + loaded - again, "load": loaded - again, "held": after,
                  "extra": peak - size, "size": size}))
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        rows = {layout: measure(Path(folder) / layout) for layout in LAYOUTS}
    record("load", rows)
    for layout, row in rows.items():
        print(f"{layout}: {row}")
    return 0


def make(folder: Path) -> None:
    """The same weights in every layout, in a process of its own."""
    import torch

    import vitrail
    from vitrail.zoo import convert

    torch.manual_seed(0)
    model = vitrail.create("B/16", classes=1000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # no page of zeros
    model.save(folder / "vitrail")
    for layout in LAYOUTS[1:]:
        convert(folder / "vitrail", folder / layout, layout)


def measure(path: Path) -> dict[str, Any]:
    """Median and slowest of the times, and the largest of the memory."""
    times, memory = ([run(path, kind) for _ in range(REPEATS)] for kind in ("time", "memory"))
    seconds = [row["seconds"] for row in times]
    million = 1e6
    return {
        "seconds after import torch, median": round(statistics.median(seconds), 3),
        "slowest": round(max(seconds), 3),
        "of these in vitrail.load, median": round(statistics.median(row["load"] for row in times), 3),
        "weights, MB": round(times[0]["size"] / million, 1),
        "held after loading, MB": round(max(row["held"] for row in memory) / million, 1),
        "largest beside the weights, once all are read, MB": round(max(row["extra"] for row in memory) / million, 1),
        "seconds": [round(value, 3) for value in seconds],
    }


def run(path: Path, kind: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), kind], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
