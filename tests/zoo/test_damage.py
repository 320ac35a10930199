"""Whatever is done to a checkpoint, a model comes out or one plain line, and never a huge allocation."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vitrail
from vitrail.errors import UserError
from vitrail.zoo import convert, load_certified

LIMIT = 4 << 30
"""bytes of address space beyond what the tests already have"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small model in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    torch.manual_seed(0)
    model = vitrail.create(
        "nano/2", classes=3, width=16, depth=2, heads=2, activation="gelu_tanh", image_size=(4, 4)
    ).eval()
    model.save(folder / "vitrail")
    convert(folder / "vitrail", folder / "google.npz", "google")
    convert(folder / "vitrail", folder / "timm", "timm")
    convert(folder / "vitrail", folder / "hf", "hf")
    with np.load(folder / "google.npz") as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        np.savez_compressed(folder / "packed.npz", **arrays)
    torch.save({"model": weights, "epoch": 3}, folder / "new.pth")
    torch.save({"model": weights, "epoch": 3}, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A huge allocation fails here in place of filling the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


FILES = ["vitrail/model.safetensors", "google.npz", "packed.npz", "new.pth", "old.pth"]
CONFIGS = ["vitrail/config.json", "timm/config.json", "hf/config.json", "hf/preprocessor_config.json"]


def attempt(path: Path) -> None:
    """Load a damaged checkpoint: a model whose weights can be read, or one line."""
    try:
        task, certificate = load_certified(path)
        assert all(value.isfinite().numel() >= 0 for value in task.state_dict().values())
        assert certificate.as_text() and json.dumps(certificate.as_row())
    except UserError as refused:
        line = str(refused)
        if "\n" in line or len(line) > 1000:
            pytest.fail(f"not one line: {line}")


def copy_of(folder: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A checkpoint with one of its files changed; the path to load."""
    place = folder / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if "/" in name:
        shutil.copytree(folder / name.split("/")[0], place / "m")
        target, result = place / "m" / name.split("/")[1], place / "m"
    else:
        shutil.copy(folder / name, place / name)
        target = result = place / name
    target.write_bytes(change(target.read_bytes()))
    return result


many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", FILES)
@many
@given(data=st.data())
def test_changed_bytes(folder: Path, name: str, data: st.DataObject) -> None:
    size = (folder / name).stat().st_size
    # Heads and tails hold what can go wrong; in between are numbers.
    near = st.one_of(
        st.integers(0, min(size, 3000) - 1), st.integers(max(0, size - 3000), size - 1), st.integers(0, size - 1)
    )
    changes = data.draw(st.lists(st.tuples(near, st.integers(0, 255)), min_size=1, max_size=8))

    def change(content: bytes) -> bytes:
        damaged = bytearray(content)
        for place, value in changes:
            damaged[place] = value
        return bytes(damaged)

    attempt(copy_of(folder, name, change))


@pytest.mark.parametrize("name", FILES)
@many
@given(share=st.floats(0, 1), extra=st.binary(max_size=40))
def test_cut_off_and_added_to(folder: Path, name: str, share: float, extra: bytes) -> None:
    attempt(copy_of(folder, name, lambda content: content[: int(share * len(content))] + extra))


@many
@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=80).map(lambda rest: b"\x80\x02" + rest + b".")))
def test_anything_at_all(folder: Path, content: bytes) -> None:
    (folder / "anything.pth").write_bytes(content)
    with pytest.raises(UserError):
        vitrail.load(folder / "anything.pth")


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**9,
    1 << 70,
    0.5,
    1e308,
    float("nan"),
    "",
    "swin",
    [],
    [0, 0],
    [1e9],
    {},
    {"a": 1},
]


def places_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON text."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [at, *(place for key, inner in inside for place in places_in(inner, (*at, key)))]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_of_a_config_replaced(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not written")
    text = json.loads((folder / name).read_text())
    for place in places_in(text)[1:]:
        for value in VALUES:
            changed = json.loads(json.dumps(text))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            attempt(copy_of(folder, name, lambda _, changed=changed: json.dumps(changed).encode()))


@pytest.mark.parametrize("name", ["vitrail/config.json", "hf/config.json"])
@many
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(32, 126)), min_size=1, max_size=3))
def test_changed_letters_of_a_config(folder: Path, name: str, changes: list[tuple[int, int]]) -> None:
    def change(content: bytes) -> bytes:
        damaged = bytearray(content)
        for place, value in changes:
            damaged[place % len(damaged)] = value
        return bytes(damaged)

    attempt(copy_of(folder, name, change))
