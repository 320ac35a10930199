"""Write a model for an engine: pt2, ONNX or OpenVINO, proven against the model that it was made from.

`vitrail.zoo.exports` reads what is written here, so an export is a SOURCE like any other.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitrail import __version__
from vitrail.errors import RunError, UserError
from vitrail.export.example import example
from vitrail.export.proof import Proof, compare, normalised_noise
from vitrail.export.scores import Scores, cost_of_merging, score_both
from vitrail.export.tracing import NotTraceable, trace
from vitrail.files import refuse_existing, whole_folder
from vitrail.tasks.checkpoint import FORMAT as CHECKPOINT
from vitrail.tasks.exported import Program
from vitrail.tasks.task import Task
from vitrail.zoo import find, load
from vitrail.zoo.exports import Meta, is_export, read

log = logging.getLogger("vitrail")

WRITERS = {"pt2": "pt2", "onnx": "onnx", "openvino": "openvino"}
"""formats, and the modules that write them"""
PRECISIONS = {"pt2": ("fp32", "bf16"), "onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}
"""the precisions that each format's engine runs on a CPU"""
Programs = dict[str, tuple[Program, torch.export.ExportedProgram]]
"""by name, each with what was traced of it"""
TOLERANCE = 1e-3
"""largest difference of an fp32 export from the model, or that share of outputs larger than 1"""


class Result(NamedTuple):
    """What `export` has written."""

    files: list[Path]
    sizes: list[tuple[int, int]]
    """empty for any size"""
    proof: Proof
    scores: Scores | None
    """with data: the scores of both"""
    notes: list[str]

    def lines(self) -> list[str]:
        """For people."""
        listed = ", ".join(f"{height}x{width}" for height, width in self.sizes) or "any size"
        size = sum(file.stat().st_size for file in self.files) / 1e6
        names = ", ".join(file.name for file in self.files)
        found = [*self.notes, f"{self.files[0].parent}: {names} ({size:.1f} MB), images of {listed}", self.proof.text()]
        return [*found, self.scores.text()] if self.scores is not None else found

    def as_row(self) -> dict[str, Any]:
        """Plain data for a line of JSON."""
        return {
            "files": [str(file) for file in self.files],
            "sizes": self.sizes,
            "difference": self.proof.absolute,
            "relative_difference": self.proof.relative,
            "compared": self.proof.compared,
            "scores": None if self.scores is None else self.scores._asdict(),
            "notes": self.notes,
        }


def export(
    source: str | Path,
    out: str | Path,
    to: str,
    precision: str = "fp32",
    data: str | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    split: str | None = None,
    images: int | None = None,
    revision: str | None = None,
    merge: int | Sequence[int] | None = None,
) -> Result:
    """Write the model of `source` to the new folder `out`, run it, and compare it with the model.

    Args:
        to: pt2, onnx or openvino.
        precision: fp32, bf16 or int8; the last is calibrated on images of `data`.
        data: a data set, on a split of which both are scored (at most `images` of it).
        sizes: heights and widths in pixels; none for any size, or the model's own where its network depends on it.
        merge: patch tokens that merge in each block, as for `load`; then the model is also scored without merging.

    Raises:
        UserError: no such format or precision, or a model that cannot be exported; names the operator and its module.
        RunError: an fp32 export differs by more than 1e-3; nothing is kept.
    """
    out = Path(out)
    _check(to, precision, data, sizes)
    refuse_existing(out)
    if is_export(found := find(source, revision)):
        raise UserError(f"{source} is an export itself: give the checkpoint that it was made from")
    task = load(source, revision=revision, merge=merge)
    with torch.inference_mode(), _without_notes():
        result = _export(task, found, out, to, precision, data, list(dict.fromkeys(sizes)), split, images)
        if merge is not None and data is not None and result.scores is not None:
            plain = load(source, revision=revision, merge=0)
            result.notes.append(cost_of_merging(result.scores, plain, str(found), data, split, images))
    return result


@contextmanager
def _without_notes() -> Iterator[None]:
    """Without the warnings of running at other sizes, which is done here on purpose."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _check(to: str, precision: str, data: str | None, sizes: Sequence[tuple[int, int]]) -> None:
    if to not in WRITERS:
        raise UserError(f"no format {to!r} that an engine here runs: choose from {', '.join(WRITERS)}")
    if precision not in ("fp32", "bf16", "int8"):
        raise UserError(f"no precision {precision!r}: choose fp32, bf16 or int8")
    if precision not in PRECISIONS[to]:
        others = [name for name, each in PRECISIONS.items() if precision in each]
        raise UserError(f"the engine of {to} has no {precision} on a CPU: choose --to {' or '.join(others)}")
    if precision == "int8" and data is None:
        raise UserError("int8 is calibrated on images: name a data set with --data")
    if precision == "int8" and sizes:
        raise UserError("int8 is calibrated at the model's own size: leave out --sizes")
    writer(to).check()


def writer(to: str) -> Any:
    """The module that writes a format."""
    from importlib import import_module

    return import_module(f"vitrail.export.{WRITERS[to]}")


def _export(
    task: Task,
    found: Path,
    out: Path,
    to: str,
    precision: str,
    data: str | None,
    sizes: list[tuple[int, int]],
    split: str | None,
    images: int | None,
) -> Result:
    notes: list[str] = []
    multiple = multiple_of(task)
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise UserError(f"size {height}x{width} does not divide into {multiple} pixels: choose multiples of it")
    if sizes and task.preprocess.size not in sizes:  # at which predict and eval run it
        sizes = [task.preprocess.size, *sizes]
    dtype = torch.bfloat16 if (to, precision) == ("pt2", "bf16") else torch.float32
    traced: dict[tuple[int, int] | None, Programs] = {}
    if not sizes:
        reason = fixed(task)
        try:
            if reason is None:
                traced[None] = trace_all(task, None, multiple, dtype)
        except NotTraceable as error:
            reason = str(error)
        if reason is not None:
            sizes = [task.preprocess.size]
            notes.append(f"{reason}: exported for images of {sizes[0][0]}x{sizes[0][1]} alone; --sizes lists others")
    try:
        traced |= {size: trace_all(task, size, multiple, dtype) for size in sizes}
    except NotTraceable as error:
        raise UserError(str(error)) from error
    first = next(iter(traced.values()))
    meta = Meta(
        config={
            "vitrail": CHECKPOINT,
            "task": task.name,
            "classes": list(task.classes),
            "preprocess": task.preprocess.as_dict(),
            **task.config(),
        },
        files=task.files(),
        version=__version__,
        format=to,
        precision=precision,
        sizes=sizes,
        multiple=multiple,
        crops=getattr(task.encoder.config, "floor_grid", False),
        programs={
            name: {"inputs": list(program.inputs), "outputs": list(program.outputs)}
            for name, (program, _) in first.items()
        },
    )
    calibration = calibrate(task, data) if precision == "int8" and data is not None else None
    with whole_folder(out) as folder:
        for size, programs in traced.items():
            for name, (program, exported) in programs.items():
                if programs is first or "images" in program.inputs:
                    writer(to).write(folder / meta.name_of(name, size), program, exported, meta, calibration)
        for name, table in task.tables().items():
            tensors = {key: tensor.contiguous() for key, tensor in table.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
        (folder / "example.py").write_text(example(meta))
        engine = read(folder, "cpu")
        proof = compare(task, engine, tried(task, sizes, multiple))
        if proof.share > (TOLERANCE if precision == "fp32" else sys.float_info.max):
            raise RunError(
                f"the export differs from the model by {proof.absolute:.2g} at {proof.where}: nothing is kept; try "
                "another format, or list sizes with --sizes"
            )
        scores = None if data is None else score_both(task, engine, str(found), data, split, images)
        files = sorted(folder.iterdir())
    return Result([out / file.name for file in files], sizes, proof, scores, notes)


def multiple_of(task: Task) -> int:
    """The side of a patch; 1 for a network without."""
    return getattr(task.encoder.config, "patch", 1)


def fixed(task: Task) -> str | None:
    """The reason why a network takes images of one size only; None for one that takes any."""
    config = task.encoder.config
    if getattr(config, "merge", ()):
        return "the number of tokens that merge is traced for each size apart"
    if getattr(config, "relative", "none") not in ("none", "decomposed"):
        return "tables of relative positions are interpolated for each size apart"
    if not hasattr(config, "patch"):
        return f"a {type(config).__name__.removesuffix('Config')} is traced for one size"
    return None


def tried(task: Task, sizes: Sequence[tuple[int, int]], multiple: int) -> list[tuple[int, int]]:
    """Three sizes to compare at: the listed ones, or the model's own, a larger one and a smaller one."""
    if sizes:
        return [sizes[i % len(sizes)] for i in range(max(3, len(sizes)))]
    height, width = (max(2 * multiple, side // multiple * multiple) for side in task.preprocess.size)
    smaller = (max(2, height // multiple // 2) * multiple, max(2, width // multiple * 2 // 3) * multiple)
    return [(height, width), (height + 2 * multiple, width + multiple), smaller]


def trace_all(task: Task, size: tuple[int, int] | None, multiple: int, dtype: torch.dtype) -> Programs:
    """The programs of a task for one size, or for any. Raises NotTraceable."""
    # For any size the example has another one than the model, so that its positions are interpolated in the program.
    own = task.preprocess.size
    height, width = size or ((own[0] // multiple + 3) * multiple, (own[1] // multiple + 4) * multiple)
    images = normalised_noise(task, 2, (height, width))
    return {
        name: (program, trace(program, multiple, size is None, dtype))
        for name, program in task.programs({"image": images}).items()
    }


def calibrate(task: Task, data: str) -> Callable[[], list[Tensor]]:
    """Images of the training split, which int8 chooses its ranges by."""
    from vitrail.export.scores import calibration_images

    return lambda: calibration_images(task, data)
