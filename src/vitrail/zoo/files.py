"""Files of any layout to names and tensors, before anybody knows whose they are. Nothing here runs code from a file.

safetensors, PyTorch's zip files and NumPy's where they are not packed are memory-mapped, privately: writing to such a
tensor copies the page and leaves the file as it is. PyTorch's files from before 1.6 are read.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import pickletools
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitrail.errors import UserError
from vitrail.zoo.source import Files

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""the names that libraries give to the weights in a folder, the safe format first; each also with `.index.json`"""
ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".tar")
MAX_JSON = 1 << 26
"""bytes; configs have some thousand, an index of a large model some hundred thousand"""
MAX_ENTRIES = 100_000
"""tensors; the deepest published ViTs have some thousand"""

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "ema_model", "teacher", "target_encoder"),  # averages are what is evaluated
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "params", "student"),
    *("encoder", "backbone", "vit"),
)
"""entries of a training checkpoint that hold the weights, the preferred ones first"""
PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.", "_orig_mod.")
"""what torch.compile, data parallelism and training frameworks put before each name, the outermost first"""

KINDS = {
    b"\x89HDF": "an HDF5 file (Keras): export it to safetensors",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself: run git lfs pull",
    b"<": "a web page: the download went wrong, so fetch the file itself",
    b"\x1f\x8b": "packed with gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstandard: unpack it",
    b"\x93NUMPY": "a single NumPy array: a checkpoint is an .npz file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"%PDF": "a PDF",
}


def open_files(path: Path) -> Files:
    """What lies at `path`: a checkpoint file, or a folder with one (weights in one file or in shards, and JSON)."""
    try:
        if path.is_dir():
            return _open_folder(path)
        beside = path.parent if path.name in WEIGHTS or path.name.endswith(".index.json") else None
        if path.suffix == ".json":
            if beside is None:
                raise UserError(f"{path} is a text without weights: choose the folder that it lies in")
            return _files(path, _read_json_files(beside), _open_shards(path))
        return _files(path, _read_json_files(beside) if beside else {}, _open_weights(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_folder(path: Path) -> Files:
    texts = _read_json_files(path)
    for name in WEIGHTS:
        if (path / name).is_file():
            return _files(path, texts, _open_weights(path / name))
        if (path / f"{name}.index.json").is_file():
            return _files(path, texts, _open_shards(path / f"{name}.index.json"))
    others = sorted(p for p in path.iterdir() if p.suffix in ENDINGS and p.is_file())
    if len(others) == 1:
        return _files(path, texts, _open_weights(others[0]))
    if others:
        names = ", ".join(p.name for p in others[:4])
        raise UserError(f"{path} holds {len(others)} checkpoints ({names}): choose one of the files")
    for other in ("flax_model.msgpack", "tf_model.h5"):
        if (path / other).is_file():
            raise UserError(f"{path} holds only {other}: save the model as safetensors with the library it comes from")
    raise UserError(
        f"{path} holds no checkpoint: choose a run folder, or a folder with config.json and model.safetensors"
    )


@dataclass
class Opened:
    """Weights of a file or of an index's files; the fields are those of `Files`."""

    weights: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def _open_weights(path: Path) -> Opened:
    """The content decides which format a file has; its name says nothing."""
    with path.open("rb") as file:
        start = file.read(64)
        size = file.seek(0, 2)
    if not start:
        raise UserError(f"{path} is empty: fetch it again")
    if start[:2] == b"PK":
        return _open_zip(path, size)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and length <= size):
        return _open_safetensors(path)
    if start[:1] == b"\x80" or start[:2] in (b"cs", b"(d", b"}q"):
        return _open_torch(path, None)
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path} is no checkpoint but {kind}")
    raise UserError(f"{path} is no checkpoint that vitrail knows, or a damaged one: give safetensors, .npz or .pth")


class Lazy(Mapping[str, Tensor]):
    """Tensors that are mapped or read when they are asked for, and not for a look at the names."""

    def __init__(
        self, names: Iterable[str], get: Callable[[str], Tensor], passing: Callable[[str], Tensor] | None = None
    ) -> None:
        self.names, self.get_tensor = dict.fromkeys(names), get
        self.passing = passing or get
        """a tensor to copy from: it is mapped by itself, so that its memory goes when it does"""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _open_safetensors(path: Path) -> Opened:
    def passing(name: str) -> Tensor:
        # A file's tensors share one mapping, whose pages stay in memory once they are read.
        again: Any = safe_open(path, framework="pt")
        return again.get_tensor(name)

    try:
        file: Any = safe_open(path, framework="pt")
        names = file.keys()  # before safetensors 0.5 the file itself cannot be iterated over
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OverflowError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): it is cut off or damaged") from error
    return Opened(Lazy(shapes, file.get_tensor, passing), shapes)


def _open_shards(index: Path) -> Opened:
    """The files that an index lists. A name that leads out of the folder is refused."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{index} is no index of weights: it needs weight_map, from names to files")
    parts: dict[str, Mapping[str, Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for place in sorted(set(places.values())):
        # Backslashes and drives lead out of a folder on Windows alone.
        if not place or Path(place).is_absolute() or ".." in re.split(r"[/\\]", place) or ":" in place:
            raise UserError(f"{index} names {place!r}, which lies outside of its folder: do not use this checkpoint")
        if not (index.parent / place).is_file():
            raise UserError(f"{index} names {place}, which is missing: fetch it again")
        opened = _open_weights(index.parent / place)
        for name in (name for name, where in places.items() if where == place):
            if name not in opened.weights:
                raise UserError(f"{index} looks for {name} in {place}, which does not hold it: fetch both again")
            shapes[name] = opened.shapes[name]
        parts[place] = opened.weights
    passing = {place: part.passing if isinstance(part, Lazy) else part.__getitem__ for place, part in parts.items()}
    weights = Lazy(places, lambda name: parts[places[name]][name], lambda name: passing[places[name]](name))
    return Opened(weights, shapes)


def _open_zip(path: Path, size: int) -> Opened:
    """NumPy's .npz and PyTorch's files are both zip archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise UserError(f"{path} holds {len(entries)} files, which no ViT does: choose another checkpoint")
            if all(entry.filename.endswith(".npy") for entry in entries) and entries:
                return _open_numpy(path, archive)
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if not pickles or any(entry.filename.endswith("/constants.pkl") for entry in entries):
                kind = "a TorchScript program: save its state_dict()" if pickles else "some other archive: unpack it"
                raise UserError(f"{path} is no checkpoint but {kind}")
            # PyTorch stores and never packs; what is stored is mapped as it stands.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path} is packed: unpack it and zip it without compression, or save it again")
            if sum(entry.file_size for entry in entries) > size:
                raise UserError(f"{path} declares more bytes than it has: it is damaged or hostile")
            program = archive.read(pickles[0])
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise anything, from zlib's errors to struct's
        raise UserError(f"{path} cannot be read ({first_line(error)}): it is cut off or damaged") from error
    return _open_torch(path, program)


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int | None
    """of its first number in the file; None where it is packed"""


def _open_numpy(path: Path, archive: zipfile.ZipFile) -> Opened:
    arrays: dict[str, _Array] = {}
    with path.open("rb") as whole:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as file:
                shape, fortran, dtype = _read_array_header(file)
                header = file.tell()
            if dtype.hasobject:
                raise UserError(f"{path} holds Python objects at {name}, which are code: give a file of plain arrays")
            # Deflate packs a thousandfold at best; weights hardly pack at all.
            bomb = entry.file_size > 1 << 20 and entry.file_size > 100 * entry.compress_size
            if bomb or math.prod(shape) * dtype.itemsize != entry.file_size - header:
                raise UserError(f"{path} declares more bytes than it has at {name}, or fewer: it is damaged or hostile")
            offset = None
            if entry.compress_type == zipfile.ZIP_STORED:
                # The local header's own lengths of name and extra field say where the entry's bytes begin.
                whole.seek(entry.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", whole.read(4))
                offset = entry.header_offset + 30 + name_length + extra_length + header
            if dtype.kind in "fiub" or dtype == "V2":  # others, such as text, are no weights
                arrays[name] = _Array(shape, dtype, fortran, offset)
    weights = Lazy(arrays, lambda name: _read_array(path, name, arrays[name]))
    return Opened(weights, {name: array.shape for name, array in arrays.items()})


def _read_array(path: Path, name: str, array: _Array) -> Tensor:
    """Mapped, or read where it is packed."""
    try:
        if array.offset is None:
            with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
        elif 0 in array.shape:
            values = np.zeros(array.shape, array.dtype)
        else:
            values = np.memmap(path, array.dtype, "c", array.offset, array.shape, "F" if array.fortran else "C")
    except Exception as error:
        raise UserError(f"{path} cannot be read at {name} ({first_line(error)}): it is damaged") from error
    if array.dtype == "V2":  # NumPy has no bfloat16: JAX's arrays come as two bytes of anything
        return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)
    # PyTorch takes the machine's byte order alone.
    return torch.from_numpy(np.ascontiguousarray(values, array.dtype.newbyteorder("=")).reshape(array.shape))


def _read_array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of NumPy's format")
    return read(file)


class _Ignored:
    """Stands for a NumPy number, such as a best accuracy: it has to be read over and is never used."""

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


SAFE: list[Any] = [
    argparse.Namespace,
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
]
"""beside tensors and plain containers, what MAE's and DINO's files hold"""


def _open_torch(path: Path, program: bytes | None) -> Opened:
    """A file of `torch.save`, by PyTorch's reader that builds tensors and plain containers alone.

    `program` is the pickle inside a zip file; None for the older format, where the file itself starts with it.
    """
    types = _pickled_types(path, program)
    if "builtins.bytearray" in types or "__builtin__.bytearray" in types:
        # PyTorch's reader lets a pickle make one of any size.
        raise UserError(f"{path} holds a bytearray, which is no weight: it is refused")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=program is not None)
    except (MemoryError, RecursionError) as error:
        raise UserError(f"{path} asks for more memory than there is: it is damaged or hostile") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(_refusal(path, str(error), types)) from error
    if isinstance(content, Tensor):
        raise UserError(f"{path} holds a single tensor and no model: choose another file")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and no names of weights: choose another file")
    return _unwrapped(path, content)


def _refusal(path: Path, message: str, types: list[str]) -> str:
    found = re.search(r"GLOBAL (\S+)|function (\S+)|class (\S+)", message)
    name = next(filter(None, found.groups()), None) if found else None
    if name is None and "Unsupported operand" in message and types:
        name = types[0]
    if name is None:
        return f"{path} cannot be read ({first_line(message)[:120]}): it is cut off, damaged or no checkpoint"
    return (
        f"{path} holds a {name}, which could run code and is refused: "
        "save model.state_dict() with the library it comes from"
    )


def _pickled_types(path: Path, program: bytes | None) -> list[str]:
    """Names of the classes and functions that a pickle calls for, in order, as far as it can be followed."""
    if program is None:
        with path.open("rb") as file:
            program = file.read(1 << 22)
            if len(program) == 1 << 22:
                file.seek(0)
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                    if any(whole.find(b"c%s\nbytearray\n" % home) >= 0 for home in (b"builtins", b"__builtin__")):
                        return ["builtins.bytearray"]
    types: list[str] = []
    strings: list[str] = []
    position = 0
    try:
        # The older format is a row of pickles, the model's the fourth.
        for _ in range(4):
            for code, value, place in islice(pickletools.genops(program[position:]), 2_000_000):
                if code.name == "GLOBAL":
                    types.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    types.append(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
                if code.name == "STOP":
                    position += (place or 0) + 1
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError):
        pass  # what is damaged, PyTorch's reader says
    return list(dict.fromkeys(types))


def _unwrapped(path: Path, content: dict[Any, Any]) -> Opened:
    """The weights of a training checkpoint, out of its wrappers."""
    notes: list[str] = []
    left: dict[str, str] = {}
    for _ in range(3):
        inside = next((name for name in WRAPPERS if _is_state(content.get(name))), None)
        if inside is None:
            break
        notes.append(f"weights from the entry {inside!r}")
        used = f"the entry {inside!r} is used"
        left.update({str(n): used if _is_state(v) else "no weight" for n, v in content.items() if n != inside})
        content = content[inside]
    left.update({str(n): "no weight" for n, v in content.items() if not isinstance(v, Tensor)})
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    _check_tensors(path, weights)
    return Opened(weights, {name: tuple(value.shape) for name, value in weights.items()}, notes, left)


def _files(path: Path, texts: dict[str, Any], opened: Opened) -> Files:
    """Everything together, with the frameworks' prefixes dropped."""
    if not opened.weights:
        raise UserError(f"{path} holds no weights: choose another file")
    weights, shapes = opened.weights, opened.shapes
    renamed = _without_prefixes(list(weights), "model_type" in texts.get("config.json", {}), opened.notes)
    if renamed:
        passing = weights.passing if isinstance(weights, Lazy) else weights.__getitem__
        weights = Lazy(renamed, lambda name: opened.weights[renamed[name]], lambda name: passing(renamed[name]))
        shapes = {new: shapes[old] for new, old in renamed.items()}
    return Files(path, texts, weights, shapes, opened.notes, opened.left)


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, Tensor | dict) for inner in value.values())


def _check_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are larger than their bytes: sparse ones, and views that repeat theirs."""
    seen: Counter[int] = Counter()
    for name, value in weights.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"{path} holds a quantised, sparse or empty tensor at {name}: give one with plain weights")
        storage = value.untyped_storage()
        if value.numel() * value.element_size() > storage.nbytes():
            raise UserError(f"{path} declares more numbers than it has at {name}: it is damaged or hostile")
        if storage.nbytes():
            seen[storage.data_ptr()] = storage.nbytes()
    if seen.total() > path_size(path):
        raise UserError(f"{path} declares more numbers than it has: it is damaged or hostile")


def path_size(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size


def _without_prefixes(names: list[str], transformers: bool, notes: list[str]) -> dict[str, str]:
    """New names to old ones, where most names start with the same word of a training framework."""
    new = {name: name for name in names}
    for prefix in PREFIXES:
        if transformers and prefix in ("model.", "backbone."):
            continue  # its own names start so
        holders = [name for name in new if name.startswith(prefix)]
        shorter = {name.removeprefix(prefix) for name in holders}
        if len(holders) * 2 > len(new) and len(shorter | (new.keys() - set(holders))) == len(new):
            new = {name.removeprefix(prefix): old for name, old in new.items()}
            notes.append(f"prefix {prefix!r} dropped from {len(holders)} names")
    return new if any(name != old for name, old in new.items()) else {}


def _read_json_files(folder: Path) -> dict[str, Any]:
    """The small texts beside the weights; large ones, such as a tokenizer's, are left alone."""
    return {
        path.name: read_json(path)
        for path in sorted(folder.glob("*.json"))
        if path.name.endswith(("config.json", "labels.json")) and not path.name.endswith(".index.json")
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError("it is larger than any config")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} and no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): choose another checkpoint") from error
    return content


def first_line(error: Exception | str) -> str:
    """The first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
