"""The certificate of a conversion: the use of each weight, and differences from the source library's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import UserError
from vitrail.tasks.task import Task
from vitrail.zoo.source import Files, Found, Source

SAMPLES = Path(__file__).parent / "samples"
TOLERANCE = 1e-4
"""tolerance: largest difference / largest value, in float32"""


@dataclass
class Difference:
    """The difference of one output, over all sample images."""

    largest: float
    """largest absolute difference"""
    scale: float
    """largest absolute value of the source's output"""

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-12)


@dataclass
class Certificate:
    """The recognised source, and how its weights were used."""

    path: str
    source: str
    task: str
    classes: int
    parameters: int
    preprocess: dict[str, Any]
    weights: list[dict[str, Any]]
    """for each of the model's tensors: `name`, `from` (names in the source), `change` in words if there is one"""
    left: dict[str, str]
    notes: list[str]
    differences: dict[str, Difference] = field(default_factory=dict)
    compared: str = "not compared (--verify does)"
    """what the outputs were compared with, or why not"""
    written: Certificate | None = None
    """certificate of the converted output, if it was read back"""

    def as_row(self) -> dict[str, Any]:
        """Plain data, for a line of JSON."""
        differences = {
            name: {"largest": d.largest, "scale": d.scale, "relative": d.relative}
            for name, d in self.differences.items()
        }
        written = self.written.as_row() if self.written else None
        return {**vars(self), "differences": differences, "written": written}

    def as_text(self) -> str:
        """For people: counts, with the names of what was changed or left out."""
        renamed = sum(not w.get("change") and w["from"] != [w["name"]] for w in self.weights)
        changes = [w["change"] for w in self.weights if w.get("change")]
        kinds = ", ".join(f"{changes.count(kind)} {kind}" for kind in dict.fromkeys(changes))
        used = sum(len(w["from"]) for w in self.weights)
        size, p = self.preprocess["size"], self.preprocess
        lines = [
            f"{self.path}: {self.source}",
            f"  model       {self.task}, {self.parameters:,} parameters"
            + (f", {self.classes} classes" if self.classes else ""),
            f"  weights     {used} used for {len(self.weights)}: {renamed} renamed{', ' + kinds if kinds else ''}",
            f"  images      {size[0]}x{size[1]}, {p['resize']}, crop {p['crop_fraction']:g}, {p['interpolation']}, "
            f"mean {_numbers(p['mean'])}, std {_numbers(p['std'])}",
        ]
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  left out    {shown}: {reason}")
        lines += [f"  note        {note}" for note in self.notes]
        lines += self._outputs()
        if self.written is not None:
            lines.append(f"  read again  {self.written.path}: {self.written.source}, every weight with the same bits")
            lines += self.written._outputs()
        return "\n".join(lines)

    def _outputs(self) -> list[str]:
        """The differences of the outputs, one line each."""
        lines = []
        for name, d in self.differences.items():
            share = f"{d.relative:.1e} of the largest value"
            lines.append(f"  {name:<11} differ by at most {d.largest:.1e}, {share}, from {self.compared}")
        return lines or [f"  outputs     {self.compared}"]


def certify(files: Files, found: Found, task: Task) -> Certificate:
    """How each weight was used, from the source's reading."""
    weights = []
    for name, weight in found.weights.items():
        row: dict[str, Any] = {"name": name, "from": list(weight.names)}
        if change := weight.change or ("changed" if weight.make else ""):
            row["change"] = change
        weights.append(row)
    return Certificate(
        path=str(files.path),
        source=found.source,
        task=task.name,
        classes=len(task.classes),
        parameters=sum(p.numel() for p in task.parameters()),
        preprocess=task.preprocess.as_dict(),
        weights=weights,
        left={**files.left, **found.left},
        notes=[*files.notes, *found.notes],
    )


def verify(certificate: Certificate, files: Files, source: Source, task: Task) -> None:
    """Add the differences from the source library's own model on the bundled sample images."""
    make: Callable[[Files], Callable[[Tensor], dict[str, Tensor]] | None] | None
    make = getattr(source, "reference", None)
    if make is None:
        certificate.compared = f"not compared: {source.NAME} has no library to compare with"
        return
    theirs = make(files)
    if theirs is None:
        certificate.compared = f"not compared: {source.NAME}'s library is not installed or does not load this file"
        return
    images = torch.stack([task.preprocess(path) for path in sorted(SAMPLES.glob("*.png"))])
    images = images.to(next(task.parameters()).dtype)
    certificate.compared = f"{source.NAME}'s own model on {len(images)} images"
    with torch.inference_mode():
        expected = theirs(images)
        for name, value in expected.items():
            if name == "logits" and not task.outputs:
                continue
            own = task(images) if name == "logits" else torch.cat(task.features(images)[:2], dim=1)
            if own.shape != value.shape:
                raise UserError(
                    f"{files.path}: {name} are {list(own.shape)} here and {list(value.shape)} in {source.NAME}: "
                    "please report this checkpoint"
                )
            difference = (own.double() - value.double()).abs().max().item()
            certificate.differences[name] = Difference(difference, value.double().abs().max().item())
    bad = [name for name, d in certificate.differences.items() if not d.relative <= TOLERANCE]
    if bad and next(task.parameters()).dtype == torch.float32:
        d = certificate.differences[bad[0]]
        raise UserError(
            f"{files.path}: {bad[0]} differ by {d.relative:.1e} of the largest value from {source.NAME}'s own model, "
            f"above {TOLERANCE:g}: do not use this conversion, and please report the checkpoint"
        )


def _numbers(values: list[float]) -> str:
    """`0.5` for equal ones."""
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{v:.4g}" for v in values)
