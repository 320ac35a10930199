"""pt2: a program of `torch.export`, which PyTorch runs on any device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vitrail.tasks.exported import Program
from vitrail.zoo.exports import Meta


def check() -> None:
    """Nothing is needed beside PyTorch."""


def write(path: Path, program: Program, exported: torch.export.ExportedProgram, meta: Meta, calibration: Any) -> None:
    """`path` with the ending .pt2, the metadata among its extra files."""
    # Decomposing also turns reshapes into views, which hold only for the strides of the example's size.
    if any("higher_order" in str(node.target) for node in exported.graph.nodes):  # such as a region without autocast
        exported = exported.run_decompositions({})
    exported.example_inputs = None  # they would be most of a small file
    torch.export.save(exported, path.with_name(f"{path.name}.pt2"), extra_files={"vitrail.json": meta.as_json()})
