"""Write a model for an engine: pt2, ONNX or OpenVINO, proven against the model that it was made from.

`vitrail.zoo.exports` reads what is written here, so an export is a SOURCE like any other.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitrail import __version__
from vitrail.errors import RunError, UserError, first_line
from vitrail.export.example import example
from vitrail.export.proof import Proof, compare, normalised_noise
from vitrail.export.scores import Scores, calibration_images, check_data, cost_of_merging, score_both
from vitrail.export.speed import Speed, card, measure
from vitrail.export.tracing import NotTraceable, trace
from vitrail.files import atomic_folder, refuse_existing
from vitrail.tasks.checkpoint import FORMAT as CHECKPOINT
from vitrail.tasks.checkpoint import digest
from vitrail.tasks.exported import Engine, Program
from vitrail.tasks.task import Task
from vitrail.zoo import find, load
from vitrail.zoo.exports import KEY, Meta, is_export, read

log = logging.getLogger("vitrail")

PRECISIONS = {"pt2": ("fp32", "bf16"), "onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}
"""the formats, and the precisions that the engine of each runs on a CPU"""
Programs = dict[str, tuple[Program, torch.export.ExportedProgram]]
"""by name, each with what was traced of it"""
TOLERANCE = 1e-3
"""largest difference of an fp32 output from the model's; of an output above 1, as a share of its largest value"""


class Request(NamedTuple):
    """What to write and to compare: the arguments of `export`."""

    to: str
    precision: str
    data: str | None
    sizes: list[tuple[int, int]]
    split: str | None
    images: int | None
    engines: bool
    unmerged: Callable[[], Task] | None
    """loads the model without merging, whose score is told too; None if `merge` is not given"""


class Result(NamedTuple):
    """What `export` has written."""

    files: list[Path]
    sizes: list[tuple[int, int]]
    """empty for any size"""
    proof: Proof
    scores: Scores | None
    """with data: the scores of both"""
    speed: Speed
    notes: list[str]

    def lines(self) -> list[str]:
        """For people."""
        size = sum(file.stat().st_size for file in self.files) / 1e6
        names = ", ".join(file.name for file in self.files)
        found = [*self.notes, f"{self.files[0].parent}: {names} ({size:.1f} MB), images of {listed(self.sizes)}"]
        scores = [] if self.scores is None else [self.scores.text()]
        return [*found, self.proof.text(), *scores, *self.speed.text().splitlines()]

    def as_row(self) -> dict[str, Any]:
        """Plain data for a line of JSON."""
        return {
            "files": [str(file) for file in self.files],
            "sizes": self.sizes,
            "difference": self.proof.absolute,
            "relative_difference": self.proof.relative,
            "compared": self.proof.compared,
            "scores": None if self.scores is None else self.scores._asdict(),
            "speed": self.speed.as_rows(),
            "notes": [*self.notes, *self.speed.left_out],
        }


def listed(sizes: Sequence[tuple[int, int]]) -> str:
    """The sizes in words."""
    return ", ".join(f"{height}x{width}" for height, width in sizes) or "any size"


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
    engines: bool = False,
    merge: int | Sequence[int] | None = None,
) -> Result:
    """Write the model of `source` to the new folder `out`, run it, and compare it with the model.

    Args:
        to: pt2, onnx or openvino.
        precision: fp32, bf16 or int8; the last is calibrated on images of `data`.
        data: a data set, on a split of which both are scored (at most `images` of it).
        sizes: heights and widths in pixels; none for any size, or the model's own where its network depends on it.
            For int8 the model's own, or none.
        engines: time PyTorch compiled, ONNX Runtime and OpenVINO in float32 beside the model and the export too.
        merge: patch tokens that merge in each block, as for `load`; then the model is also scored without merging.

    Raises:
        UserError: no such format or precision, or a model that cannot be exported; names the operator and its module.
        RunError: an fp32 export differs by more than 1e-3, or one in int8 by more than a quarter on images; nothing
            is kept.
    """
    out = Path(out)
    _check(to, precision, data)
    _check_scoring(data, split, images)
    refuse_existing(out)
    if is_export(found := find(source, revision)):
        raise UserError(f"{source} is an export itself: give the checkpoint that it was made from")
    task = load(source, revision=revision, merge=merge)
    unmerged = None if merge is None else partial(load, source, revision=revision, merge=0)
    with torch.inference_mode():
        request = Request(to, precision, data, list(dict.fromkeys(sizes)), split, images, engines, unmerged)
        return _export(task, found, Path(source).name, out, request)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without warnings: of other sizes, at which models run on purpose, and those that the scores give again."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _check(to: str, precision: str, data: str | None) -> None:
    if to not in PRECISIONS:
        raise UserError(f"no format {to!r} that an engine here runs: choose from {', '.join(PRECISIONS)}")
    if precision not in ("fp32", "bf16", "int8"):
        raise UserError(f"no precision {precision!r}: choose fp32, bf16 or int8")
    if precision not in PRECISIONS[to]:
        others = [name for name, each in PRECISIONS.items() if precision in each]
        raise UserError(f"the engine of {to} has no {precision} on a CPU: choose --to {' or '.join(others)}")
    if precision == "int8" and data is None:
        raise UserError("int8 is calibrated on images: name a data set with --data")
    writer(to).check()


def _check_scoring(data: str | None, split: str | None, images: int | None) -> None:
    if data is None and (split is not None or images is not None):
        raise UserError("--split and --images choose what is scored: name the data set with --data")
    if images is not None and images < 1:
        raise UserError(f"--images must be at least 1, got {images}")


def writer(to: str) -> Any:
    """The module that writes a format: it has `check`, which raises UserError if a package is missing, and `write`."""
    return import_module(f"vitrail.export.{to}")


def _export(task: Task, found: Path, name: str, out: Path, request: Request) -> Result:
    notes: list[str] = []
    own = task.preprocess.size
    if request.precision == "int8" and request.sizes not in ([], [own]):
        raise UserError(f"int8 is calibrated at the model's own size: list {listed([own])} alone, or leave out --sizes")
    with _without_warnings():
        if request.data is not None:
            check_data(task, request.data)
        sizes, traced = trace_sizes(task, request, notes)
    meta = meta_of(task, request.to, request.precision, sizes, traced)
    data = request.data
    calibration = partial(calibration_images, task, data) if request.precision == "int8" and data is not None else None
    with atomic_folder(out) as folder:
        write_programs(folder, meta, traced, calibration)
        write_tables(folder, task, meta)
        first = next(iter(traced.values()))[next(iter(meta.programs))][0]
        (folder / "example.py").write_text(example(meta, first.answer), encoding="utf-8")
        engine: Any = read(folder, "cpu")
        with _without_warnings():
            proof = compare(task, engine, sizes_to_compare(task, sizes, meta.multiple))
        # In a lower precision only a wrong shape or a value that is not finite is refused: its share is infinite.
        if proof.share > (TOLERANCE if request.precision == "fp32" else sys.float_info.max):
            raise RunError(
                f"the export differs from the model by {proof.absolute:.2g} at {proof.where}: nothing is kept; try "
                "another format, or list sizes with --sizes"
            )
        scores = None if data is None else score_both(task, engine, str(found), data, request.split, request.images)
        if scores is not None and data is not None and request.unmerged is not None:
            cost = cost_of_merging(scores, request.unmerged(), str(found), data, request.split, request.images)
            notes.append(cost)
        programs = {f"{request.to} {request.precision}": engine.engines}
        with _without_warnings(), other_engines(task, meta, request.engines) as (more, missing):
            speed = measure(task, {**programs, **more}, task.preprocess.size, compiled=request.engines)
        speed.left_out.extend(missing)
        facts = {
            "format": f"{request.to}, {request.precision}",
            "task": task.name,
            "images": listed(sizes),
            "written by": f"vitrail {__version__}",
            "proof": proof.text(),
            **({} if scores is None else {"score": scores.text()}),
        }
        (folder / "CARD.md").write_text(card(f"Export of {name}", facts, speed, notes), encoding="utf-8")
        files = sorted(folder.iterdir())
    return Result([out / file.name for file in files], sizes, proof, scores, speed, notes)


Traced = dict[tuple[int, int] | None, Programs]
"""by size; None for any"""


def trace_sizes(task: Task, request: Request, notes: list[str]) -> tuple[list[tuple[int, int]], Traced]:
    """The listed sizes, and the programs for each; for any size where none is listed and the network takes any."""
    sizes, multiple = request.sizes, multiple_of(task)
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise UserError(f"size {height}x{width} does not divide into {multiple} pixels: choose multiples of it")
    if sizes and task.preprocess.size not in sizes:  # at which predict and eval run it
        sizes = [task.preprocess.size, *sizes]
    dtype = computed_in(request.to, request.precision)
    if not sizes:
        reason = why_one_size(task)
        try:
            if reason is None:
                return [], {None: trace_all(task, None, multiple, dtype)}
        except NotTraceable as error:
            reason = str(error)
        sizes = [task.preprocess.size]
        notes.append(f"{reason}: exported for images of {listed(sizes)} alone; --sizes lists others")
    try:
        return sizes, {size: trace_all(task, size, multiple, dtype) for size in sizes}
    except NotTraceable as error:
        raise UserError(str(error)) from error


def meta_of(task: Task, to: str, precision: str, sizes: list[tuple[int, int]], traced: Traced) -> Meta:
    """What every file of the export carries."""
    return Meta(
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
        multiple=multiple_of(task),
        crops=getattr(task.encoder.config, "floor_grid", False),
        programs={
            name: {"inputs": list(program.inputs), "outputs": list(program.outputs)}
            for name, (program, _) in next(iter(traced.values())).items()
        },
        weights=digest(task),
    )


def write_programs(
    folder: Path, meta: Meta, traced: Traced, calibration: Callable[[], list[Tensor]] | None = None
) -> None:
    """One file per program, and per size of those that read images."""
    for place, (size, programs) in enumerate(traced.items()):
        for name, (program, exported) in programs.items():
            if not place or "images" in program.inputs:
                writer(meta.format).write(folder / meta.name_of(name, size), program, exported, meta, calibration)


def write_tables(folder: Path, task: Task, meta: Meta) -> None:
    """Tensors beside the programs, such as an index of captions."""
    for name, table in task.tables().items():
        tensors = {key: tensor.contiguous() for key, tensor in table.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors", {KEY: meta.weights})


@contextmanager
def other_engines(task: Task, meta: Meta, wanted: bool) -> Iterator[tuple[dict[str, dict[str, Engine]], list[str]]]:
    """ONNX Runtime and OpenVINO in float32 for the same task, in a folder that is removed, and why one is missing."""
    found: dict[str, dict[str, Engine]] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        for to in ("onnx", "openvino") if wanted else ():
            if (to, "fp32") == (meta.format, meta.precision):
                continue
            try:
                running: Any = engine_for(
                    task, Path(place) / to, to, "fp32", task.preprocess.size if meta.sizes else None
                )
                found[f"{to} fp32"] = running.engines
            except (UserError, NotTraceable) as error:
                missing.append(f"{to} is left out of the comparison: {first_line(error)}")
        yield found, missing


def engine_for(
    task: Task,
    folder: Path,
    to: str,
    precision: str,
    size: tuple[int, int] | None,
    calibration: Callable[[], list[Tensor]] | None = None,
) -> Task:
    """A task run by the engine of its export to a new `folder`, which is neither compared with the task nor timed.

    `size` is None for images of any size. Raises UserError and NotTraceable.
    """
    writer(to).check()
    folder.mkdir()
    traced: Traced = {size: trace_all(task, size, multiple_of(task), computed_in(to, precision))}
    meta = meta_of(task, to, precision, [size] if size else [], traced)
    write_programs(folder, meta, traced, calibration)
    write_tables(folder, task, meta)
    return read(folder, "cpu")


def computed_in(to: str, precision: str) -> torch.dtype:
    """The number format of the traced program; OpenVINO makes bf16 and both engines make int8 of one in float32."""
    return torch.bfloat16 if (to, precision) == ("pt2", "bf16") else torch.float32


def multiple_of(task: Task) -> int:
    """The side of a patch; 1 for a network without."""
    return getattr(task.encoder.config, "patch", 1)


def why_one_size(task: Task) -> str | None:
    """The reason why a network takes images of one size only; None for one that takes any."""
    config = task.encoder.config
    if getattr(config, "merge", ()):
        return "the number of tokens that merge is traced for each size apart"
    if getattr(config, "relative", "none") not in ("none", "decomposed"):
        return "tables of relative positions are interpolated for each size apart"
    if not hasattr(config, "patch"):
        return f"a {type(config).__name__.removesuffix('Config')} is traced for one size"
    return None


def sizes_to_compare(task: Task, sizes: Sequence[tuple[int, int]], multiple: int) -> list[tuple[int, int]]:
    """The sizes to compare at: the listed ones, or three: the model's own, a larger one and a smaller one."""
    if sizes:
        return list(sizes)
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
