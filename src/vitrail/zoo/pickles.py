"""Files of `torch.save` to names and tensors, by PyTorch's reader that builds only tensors and plain types.

Tensors in nested dictionaries get names joined with dots; `entries.py` chooses among them.
"""

from __future__ import annotations

import argparse
import mmap
import pickletools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import UserError, first_line
from vitrail.zoo.source import Files

MAX_DEPTH = 32
"""maximum depth of nested dictionaries; training frameworks have five"""
NO_WEIGHT = "no weight"
UNNAMED = "a list of tensors, which has no names"


class _Ignored:
    """Placeholder for objects that are not needed, such as a NumPy scalar or the path of the data."""

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


ARRAYS = ("scalar", "_reconstruct")
PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
SAFE: list[Any] = [
    argparse.Namespace,
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.ndarray"),
    *((_Ignored, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ARRAYS),
    *((_Ignored, f"{home}.{name}") for home in ("pathlib", "pathlib._local") for name in PATHS),
]
"""types besides tensors and plain containers that trainers save in settings and scores"""


def open_torch(path: Path, program: bytes | None) -> Files:
    """The tensors of a file.

    `program` is the pickle inside a zip file; None for the older format, where the file itself starts with it.
    """
    types = _pickled_types(path, program)
    if "builtins.bytearray" in types or "__builtin__.bytearray" in types:
        # PyTorch's reader would let a pickle allocate one of any size.
        raise UserError(f"{path} holds a bytearray, which is not a weight: choose another file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=program is not None)
    except (MemoryError, RecursionError) as error:
        raise UserError(f"{path} requests more memory than is available: it is damaged or hostile") from error
    except Exception as error:  # a damaged pickle can raise almost any error
        raise UserError(_refusal(path, str(error), types)) from error
    if isinstance(content, Tensor):
        raise UserError(f"{path} holds a single tensor, not a model: choose another file")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} without names of weights: choose another file")
    files = Files(path, {}, {}, {})
    weights: dict[str, Tensor] = {}
    entries: list[str] = []
    for name, value in _flat(content, files.left, entries, set()):
        weights.setdefault(name, value)
    _check_tensors(path, weights)
    files.weights, files.entries = weights, tuple(entries)
    files.shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return files


def _flat(
    content: dict[Any, Any], left: dict[str, str], entries: list[str], seen: set[int], place: str = "", depth: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Tensors by joined names; other values go to `left`, dictionaries with tensors to `entries`.

    A dictionary that occurs twice is read only once: a malicious file could nest it endlessly.
    """
    seen.add(id(content))
    if any(isinstance(value, Tensor) for value in content.values()):
        entries.append(place)
    for key, value in content.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict) and value and depth < MAX_DEPTH and id(value) not in seen:
            yield from _flat(value, left, entries, seen, name, depth + 1)
        elif isinstance(value, list | tuple) and any(isinstance(inner, Tensor) for inner in value):
            left[name] = UNNAMED
        else:
            left[name] = NO_WEIGHT


def _check_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are larger than their storage: sparse ones, and views with repeated elements."""
    seen: Counter[int] = Counter()
    for name, value in weights.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"{path} holds a quantised, sparse or empty tensor at {name}: give one with plain weights")
        storage = value.untyped_storage()
        if value.numel() * value.element_size() > storage.nbytes():
            raise UserError(f"{path} declares more numbers than it has at {name}: it is damaged or hostile")
        if storage.nbytes():
            seen[storage.data_ptr()] = storage.nbytes()
    if seen.total() > path.stat().st_size:
        raise UserError(f"{path} declares more numbers than it has: it is damaged or hostile")


def _refusal(path: Path, message: str, types: list[str]) -> str:
    found = re.search(r"GLOBAL (\S+)|function (\S+)|class (\S+)", message)
    name = next(filter(None, found.groups()), None) if found else None
    if name is None and "Unsupported operand" in message and types:
        name = types[0]
    if name is None:
        return f"{path} cannot be read ({first_line(message)[:120]}): it is truncated, damaged or not a checkpoint"
    return (
        f"{path} holds a {name}, which could run code and is refused: "
        "save model.state_dict() with the library it comes from"
    )


def _pickled_types(path: Path, program: bytes | None) -> list[str]:
    """Names of the classes and functions that a pickle loads, in order, as far as it can be parsed."""
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
        # The older format is a sequence of pickles; the model is the fourth.
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
        pass  # PyTorch's reader reports damage
    return list(dict.fromkeys(types))
