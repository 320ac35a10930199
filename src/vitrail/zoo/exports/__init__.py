"""Exports as a source: what `vitrail export` wrote becomes the same task again, run by an engine.

An export is a folder with one file per program and size (`model.onnx`, or `encoder.onnx`, `step.onnx` and `match.onnx`
of a captioner). Each file carries the config of the task, its preprocessing, class names and tokenizer, and the list
of all files: nothing of an export is lost when its files are renamed together or moved.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vitrail.errors import UserError, first_line
from vitrail.tasks.exported import Engine, run_by
from vitrail.tasks.task import Task
from vitrail.zoo import native
from vitrail.zoo.exports.engines import FORMATS, Format
from vitrail.zoo.files import ENDINGS
from vitrail.zoo.meta import without_memory

FORMAT = 1
"""of an export's metadata"""
KEY = "vitrail"
"""name of the metadata in a file of any format"""
FILE = r"\w[\w.\-]{0,99}"
"""names of programs, and of texts: no paths"""
CHECKPOINT = ("config.json", "index.json", "recipe.json")
"""endings of the JSON files of a checkpoint or a run; others may lie beside an export, such as its scores"""
SIDE = 1 << 20
"""limit of sides in pixels"""


@dataclass(frozen=True)
class Meta:
    """What every file of an export carries."""

    config: dict[str, Any]
    """as `config.json` of the checkpoint"""
    files: dict[str, str]
    """texts that stand beside `config.json` in a checkpoint, by name: a tokenizer"""
    version: str
    """of vitrail that wrote it"""
    format: str
    """pt2, onnx or openvino"""
    precision: str
    sizes: list[tuple[int, int]]
    """the listed sizes (height, width); empty for any size"""
    multiple: int
    """sides are multiples of this number of pixels"""
    crops: bool
    """pixels on the right and at the bottom that do not fill a multiple are left out, as the model does"""
    programs: dict[str, dict[str, list[str]]]
    """names of `inputs` and `outputs` of each program"""
    weights: str
    """SHA-256 of the model's weights: files of two models with one config are not taken for one export"""

    def name_of(self, program: str, size: tuple[int, int] | None = None) -> str:
        """The file of a program, without its ending. Only what sees images has one per listed size."""
        sized = size is not None and "images" in self.programs[program]["inputs"]
        return f"{program}-{size[0]}x{size[1]}" if sized and size is not None else program

    def names(self) -> list[str]:
        """The files of all programs and sizes, without their ending."""
        sizes: list[tuple[int, int] | None] = [*self.sizes] or [None]
        return list(dict.fromkeys(self.name_of(name, size) for name in self.programs for size in sizes))

    def as_json(self) -> str:
        return json.dumps({"export": FORMAT, **vars(self)})


def is_export(path: Path) -> bool:
    """Whether a path is a file of an export, or a folder of such files and no checkpoint."""
    if not path.is_dir():
        return path.suffix in FORMATS and path.is_file()
    found = [file for file in path.iterdir() if file.suffix in ENDINGS or file.name.endswith(CHECKPOINT)]
    return all(map(_beside, found)) and bool(_files_in(path))


def _beside(file: Path) -> bool:
    """Whether a file belongs to an export: the weights of an OpenVINO graph, or a table."""
    if file.suffix == ".bin":
        return file.with_suffix(".xml").is_file()
    return file.suffix == ".safetensors" and file.name != "model.safetensors"


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in FORMATS)


def read(path: Path, device: str | torch.device | None = None) -> Task:
    """The task of an export, in eval mode, run by the engine of its format.

    Raises:
        UserError: the engine is not installed, a file is missing, truncated or of another export, or vitrail is older
            than the export.
    """
    file = _files_in(path)[0] if path.is_dir() else path
    kind = FORMATS[file.suffix]
    meta = read_meta(file, kind)
    files = _files_of(meta, file, path)
    task = _task(meta, file)
    for name, table in task.tables().items():
        _fill(table, file.parent / f"{name}.safetensors", meta)
    engines = {name: _engine(name, meta, files, kind, device) for name in meta.programs}
    outputs = {name: program["outputs"] for name, program in meta.programs.items()}
    try:
        return run_by(task, engines, outputs, path).to(device)
    except LookupError as error:
        raise UserError(f"{file} lacks a program of this task ({first_line(error)}): export the model again") from None


def _files_of(meta: Meta, file: Path, path: Path) -> dict[str, Path]:
    """The files of the export that `file` belongs to, by `Meta.names`. A file that is alone may have any name.

    Raises:
        UserError: one is missing, or the folder `path` holds files of another export too.
    """
    names = meta.names()
    files = {names[0]: file} if len(names) == 1 else {name: file.with_name(name + file.suffix) for name in names}
    for each in files.values():
        if not each.is_file():
            raise UserError(f"{each} is missing, which belongs to the export: copy the whole folder and keep its names")
    others = [other for other in _files_in(path) if other not in files.values()] if path.is_dir() else []
    if others:
        raise UserError(f"{path} holds {file.name} and {others[0].name}, of two exports: give one of these files")
    return files


def read_meta(file: Path, kind: Format) -> Meta:
    """The metadata of a file. UserError for a file of anything else, and of a newer release."""
    text = kind.metadata(file)
    try:
        values = None if text is None else json.loads(text)
        written = None if values is None else values.pop("export")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        values = None
    if values is None:
        raise UserError(f"{file} is not an export of vitrail: give a folder that `vitrail export` wrote")
    if written != FORMAT:
        raise UserError(
            f"{file} was written by vitrail {values.get('version')}, a newer release than this one: upgrade vitrail"
        )
    if (wrong := damage(values)) is not None:
        raise UserError(f"{file} has damaged metadata ({wrong}): export the model again")
    return Meta(**{**values, "sizes": [(height, width) for height, width in values["sizes"]]})


def damage(values: Any) -> str | None:
    """Why metadata from outside is not that of an export; None for what `Meta` holds, every value of its type."""
    names = [field.name for field in fields(Meta)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        return f"its fields are not {', '.join(names)}"
    texts = dict.fromkeys(("version", "format", "precision", "weights"), str)
    simple = {"config": dict, "files": dict, **texts, "crops": bool}
    if wrong := [name for name, kind in simple.items() if not isinstance(values[name], kind)]:
        return f"{wrong[0]} has the type {type(values[wrong[0]]).__name__}"
    if not all(isinstance(text, str) and re.fullmatch(FILE, name) for name, text in values["files"].items()):
        return "files are not texts by plain names"
    if type(values["multiple"]) is not int or not 0 < values["multiple"] <= SIDE:
        return f"multiple is not a number from 1 to {SIDE}"
    if not isinstance(values["sizes"], list) or not all(map(_is_size, values["sizes"])):
        return "sizes are not heights and widths"
    if not isinstance(values["programs"], dict) or not values["programs"]:
        return "it has no programs"
    whole = all(re.fullmatch(FILE, name) and _is_program(each) for name, each in values["programs"].items())
    return None if whole else "programs are not inputs and outputs by plain names"


def _is_size(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(type(side) is int and 0 < side <= SIDE for side in value)


def _is_program(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"inputs", "outputs"}:
        return False
    return all(isinstance(each, list) and each and all(isinstance(x, str) for x in each) for each in value.values())


class _Config:
    """The files of a checkpoint that a task is rebuilt from."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.shapes = path, shapes


def _task(meta: Meta, file: Path) -> Task:
    """The task of an export, with its weights on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in meta.files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            with without_memory():
                return native.build(meta.config, _Config(Path(folder), {}))
        except Exception as error:  # a config from outside: whatever a constructor raises, it describes no model
            raise UserError(f"{file} does not describe a model ({first_line(error)}): export the model again") from None


def _fill(table: nn.Module, file: Path, meta: Meta) -> None:
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
        table.load_state_dict(load_file(file), assign=True)
    except Exception as error:  # safetensors' own errors, those of files, and tensors that do not fit
        raise UserError(f"{file} cannot be read ({first_line(error)}): export the model again") from None
    if about.get(KEY) != meta.weights:
        raise _other_export(file)


def _other_export(file: Path) -> UserError:
    return UserError(f"{file} belongs to another export than the files beside it: copy the whole folder again")


def _engine(
    name: str, meta: Meta, files: Mapping[str, Path], kind: Format, device: str | torch.device | None
) -> Engine:
    """The engine of a program, for any size or one of those listed."""
    reads = "images" in meta.programs[name]["inputs"]
    by_size: dict[tuple[int, int] | None, Engine] = {}
    for size in meta.sizes if reads and meta.sizes else [None]:
        file = files[meta.name_of(name, size)]
        if read_meta(file, kind) != meta:
            raise _other_export(file)
        by_size[size] = kind.engine(file, meta.programs[name], meta.precision, device)
    if not reads:
        return by_size[None]

    def run(images: Tensor) -> tuple[Tensor, ...]:
        if meta.crops:
            height, width = (side - side % meta.multiple for side in images.shape[2:])
            images = images[:, :, :height, :width]
        return by_size[_listed(images, meta, file.parent)](images)

    return run


def _listed(images: Tensor, meta: Meta, folder: Path) -> tuple[int, int] | None:
    """The listed size of images; None for an export of any size. UserError for images that it does not take."""
    height, width = size = (int(images.shape[2]), int(images.shape[3]))
    channels = meta.config["preprocess"]["channels"]
    if images.shape[1] != channels:
        raise UserError(f"expected images [B, {channels}, H, W], got {list(images.shape)}: check the channels")
    if meta.sizes:
        if size not in meta.sizes:
            listed = ", ".join(f"{h}x{w}" for h, w in meta.sizes)
            raise UserError(f"{folder} is an export for images of {listed}, got {height}x{width}: export that size too")
        return size
    if height % meta.multiple or width % meta.multiple or min(size) < 2 * meta.multiple:
        raise UserError(
            f"{folder} takes images whose sides are multiples of {meta.multiple} from {2 * meta.multiple} pixels on, "
            f"got {height}x{width}: resize or pad them"
        )
    return None
