"""Files of any layout to names and tensors, before their source is known. Nothing here runs code from a file.

safetensors, PyTorch's zip files and uncompressed NumPy files are memory-mapped, privately: writing to such a tensor
copies the page and leaves the file unchanged. PyTorch's files from before 1.6 are supported.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitrail.errors import UserError, first_line
from vitrail.zoo.pickles import UNNAMED, open_torch
from vitrail.zoo.source import Files, Lazy

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""file names of weights in a folder, the safe format first; each also with `.index.json`"""
ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".tar")
MAX_JSON = 1 << 26
"""maximum bytes of a JSON file; configs have thousands, an index of a large model some hundred thousand"""
MAX_ENTRIES = 100_000
"""maximum number of tensors; the deepest published ViTs have a few thousand"""

KINDS = {
    b"\x89HDF": "an HDF5 file (Keras): export it to safetensors",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself: run git lfs pull",
    b"<": "a web page: the download failed, so download the file itself",
    b"\x1f\x8b": "compressed with gzip: decompress it",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard: decompress it",
    b"\x93NUMPY": "a single NumPy array: a checkpoint is an .npz file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF",
    b"GGUF": "a GGUF file of quantised weights: give the model's safetensors",
    **{
        bytes([128 + entries]): "flax's msgpack: write the parameters to an .npz, their names joined with /"
        for entries in range(1, 16)
    },
}


def open_files(path: Path) -> Files:
    """The files at `path`: a checkpoint file, or a folder with one (weights in one file or in shards, and JSON)."""
    try:
        if path.is_dir():
            return _open_folder(path)
        beside = path.parent if path.name in WEIGHTS or path.name.endswith(".index.json") else None
        if path.suffix == ".json":
            if beside is None:
                raise UserError(f"{path} is a text file without weights: choose its folder")
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
    if (path / ".metadata").is_file():
        raise UserError(
            f"{path} holds a checkpoint in shards of torch.distributed: make it one file with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    for other in ("flax_model.msgpack", "tf_model.h5"):
        if (path / other).is_file():
            raise UserError(f"{path} holds only {other}: save the model as safetensors with the library it comes from")
    if (path / "recipe.json").is_file():
        raise UserError(
            f"{path} is a run that holds no checkpoint yet, which its first evaluation writes: continue it with "
            f"`vitrail train --resume {path}`"
        )
    raise UserError(
        f"{path} holds no checkpoint: choose a run folder, or a folder with config.json and model.safetensors"
    )


def _open_weights(path: Path) -> Files:
    """The content of a file determines its format, not its name."""
    with path.open("rb") as file:
        start = file.read(64)
        size = file.seek(0, 2)
    if not start:
        raise UserError(f"{path} is empty: download it again")
    if start[:2] == b"PK":
        return _open_zip(path, size)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and length <= size):
        return _open_safetensors(path)
    if start[:1] == b"\x80" or start[:2] in (b"cs", b"(d", b"}q"):
        return open_torch(path, None)
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path} is not a checkpoint but {kind}")
    raise UserError(f"{path} is not a checkpoint that vitrail can read, or is damaged: give safetensors, .npz or .pth")


def _open_safetensors(path: Path) -> Files:
    def passing(name: str) -> Tensor:
        # The tensors of a file share one mapping, whose pages stay in memory once read.
        again: Any = safe_open(path, framework="pt")
        return again.get_tensor(name)

    try:
        file: Any = safe_open(path, framework="pt")
        names = file.keys()  # before safetensors 0.5 the file object is not iterable
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OverflowError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): it is truncated or damaged") from error
    return Files(path, {}, Lazy(shapes, file.get_tensor, passing), shapes)


def _open_shards(index: Path) -> Files:
    """The files that an index lists. Names outside the folder are refused."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{index} is not an index of weights: it needs weight_map, from names to files")
    opened_at: dict[str, Mapping[str, Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for place in sorted(set(places.values())):
        # Backslashes and drives lead out of a folder only on Windows.
        if not place or Path(place).is_absolute() or ".." in re.split(r"[/\\]", place) or ":" in place:
            raise UserError(f"{index} names {place!r}, which lies outside of its folder: do not use this checkpoint")
        if not (index.parent / place).is_file():
            raise UserError(f"{index} names {place}, which is missing: download it again")
        opened = _open_weights(index.parent / place)
        for name in (name for name, where in places.items() if where == place):
            if name not in opened.weights:
                raise UserError(f"{index} lists {name} in {place}, which does not hold it: download both again")
            shapes[name] = opened.shapes[name]
        opened_at[place] = opened.weights
    passing = {place: each.passing if isinstance(each, Lazy) else each.__getitem__ for place, each in opened_at.items()}
    weights = Lazy(places, lambda name: opened_at[places[name]][name], lambda name: passing[places[name]](name))
    return Files(index, {}, weights, shapes)


def _open_zip(path: Path, size: int) -> Files:
    """NumPy's .npz and PyTorch's files are both zip archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise UserError(f"{path} holds {len(entries)} files, more than any ViT: choose another checkpoint")
            if all(entry.filename.endswith(".npy") for entry in entries) and entries:
                return _open_numpy(path, archive)
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if not pickles or any(entry.filename.endswith("/constants.pkl") for entry in entries):
                kind = (
                    "a TorchScript program: save its state_dict()" if pickles else "another kind of archive: unpack it"
                )
                raise UserError(f"{path} is not a checkpoint but {kind}")
            # PyTorch stores without compression; uncompressed entries are mapped directly.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path} is compressed: unpack it and zip it without compression, or save it again")
            if sum(entry.file_size for entry in entries) > size:
                raise UserError(f"{path} declares more bytes than it has: it is damaged or malicious")
            program = archive.read(pickles[0])
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise almost any error, from zlib's to struct's
        raise UserError(f"{path} cannot be read ({first_line(error)}): it is truncated or damaged") from error
    return open_torch(path, program)


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int | None
    """of its first number in the file; None if compressed"""


def _open_numpy(path: Path, archive: zipfile.ZipFile) -> Files:
    arrays: dict[str, _Array] = {}
    with path.open("rb") as whole:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as file:
                shape, fortran, dtype = _read_array_header(file)
                header = file.tell()
            if dtype.hasobject:
                raise UserError(
                    f"{path} holds Python objects at {name}, which can run code: give a file of plain arrays"
                )
            # Deflate compresses at most a thousandfold; weights hardly compress at all.
            bomb = entry.file_size > 1 << 20 and entry.file_size > 100 * entry.compress_size
            if bomb or math.prod(shape) * dtype.itemsize != entry.file_size - header:
                raise UserError(
                    f"{path} declares more bytes than it has at {name}, or fewer: it is damaged or malicious"
                )
            offset = None
            if entry.compress_type == zipfile.ZIP_STORED:
                # The local header's own lengths of name and extra field determine where the entry's bytes begin.
                whole.seek(entry.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", whole.read(4))
                offset = entry.header_offset + 30 + name_length + extra_length + header
            if dtype.kind in "fiub" or dtype == "V2":  # other types, such as text, are not weights
                arrays[name] = _Array(shape, dtype, fortran, offset)
    weights = Lazy(arrays, lambda name: _read_array(path, name, arrays[name]))
    return Files(path, {}, weights, {name: array.shape for name, array in arrays.items()})


def _read_array(path: Path, name: str, array: _Array) -> Tensor:
    """A memory-mapped array, or a copy if it is compressed."""
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
    if array.dtype == "V2":  # NumPy has no bfloat16: JAX saves it as two untyped bytes
        return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)
    # PyTorch supports only the machine's byte order.
    return torch.from_numpy(np.ascontiguousarray(values, array.dtype.newbyteorder("=")).reshape(array.shape))


def _read_array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of NumPy's format")
    return read(file)


def _files(path: Path, texts: dict[str, Any], opened: Files) -> Files:
    """The opened file under the name that the user gave, with the JSON files beside it."""
    if not opened.weights:
        reasons = [f"{name}: {why}" for name, why in opened.left.items() if why == UNNAMED]
        raise UserError(f"{path} holds no weights{f' ({reasons[0]})' if reasons else ''}: choose another file")
    return replace(opened, path=path, json=texts)


def _read_json_files(folder: Path) -> dict[str, Any]:
    """The small JSON files beside the weights; large ones, such as a tokenizer's, are not read."""
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
