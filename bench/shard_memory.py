"""What each process holds for each weight with `--shard`, and without: python bench/shard_memory.py [--tiny]

A Vision Transformer is trained for three steps on the CPU by one process, and by several that share its weights out
(FSDP2). Counted are the bytes of all tensors between two steps, in the process that holds most, divided by the number
of weights. Gradients and what the network computes live within a step, and are not counted.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import ROOT, Parser, Row, record
from torch import Tensor
from torch.distributed.tensor import DTensor

from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Labels
from vitrail.train import loop
from vitrail.train.build import build
from vitrail.train.folder import Follower, RunFolder
from vitrail.train.loop import fit
from vitrail.train.optim import Optim
from vitrail.train.parallel import World
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, train_step
from vitrail.vit import ViTConfig

sys.path.insert(0, str(ROOT / "tests"))
from processes import in_ranks

OPTIMIZERS = {
    "AdamW": Optim("adamw"),
    "AdamW, EMA": Optim("adamw", ema=0.99),
    "Muon, EMA": Optim("muon", ema=0.99),
}
SIZE = 16


def parser() -> Parser:
    parser = Parser(__doc__, width=32, processes=[1, 2])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    return parser


def main() -> None:
    args = parser().parse_args()
    rows: Row = {}
    for name, optim in OPTIMIZERS.items():
        rows[name] = {}
        model = ViTConfig(args.width, 4, 4, 8, (SIZE, SIZE))
        run = Run("shard", "shard", model=model, optim=optim, batch_size=8, workers=0, precision="fp32")
        for count in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                each = in_ranks(count, count > 1, held, run, Path(folder) / "run")
            rows[name][str(count)] = round(max(each), 2)
        print(name, rows[name], flush=True)
    record("shard-memory", rows, args.results)


def held(world: World, run: Run, path: Path) -> float:
    """The bytes per weight that this rank holds after its last step."""
    torch.manual_seed(0)
    found: list[float] = []

    def counted(*args: Any) -> AsyncScalars:
        scalars = train_step(*args)
        scalars.read()
        found.append(bytes_of_tensors() / weights)
        return scalars

    images = [torch.randint(0, 255, (3, SIZE, SIZE)).to(torch.uint8) for _ in range(16)]
    every = ImageSet("noise", [str(i) for i in range(16)], images, Labels(torch.arange(16) % 2, ["a", "b"]))
    components, _ = build(run, Splits(every, every.subset(range(8))), torch.device("cpu"), world=world)
    weights = sum(parameter.numel() for parameter in components.task.parameters())
    folder = RunFolder(path) if world.is_main else Follower(path)
    folder.begin(run, components.task.classes)
    with patch.object(loop, "train_step", counted):
        fit(run, components, folder, 3)
    return found[1]  # before the last one, after which a state is saved


def bytes_of_tensors() -> int:
    """The bytes of the memory of all tensors, each counted once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor):
            storage = (one.to_local() if isinstance(one, DTensor) else one).untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


if __name__ == "__main__":
    main()
