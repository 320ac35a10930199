"""Whatever is done to a checkpoint, a model comes out or one plain line, and never a huge allocation."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitrail
from vitrail.errors import UserError
from vitrail.zoo import convert, load_certified
from vitrail.zoo.files import open_files

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
    shutil.copytree(folder / "hf", folder / "sharded")
    cut_in_two(folder / "sharded")
    return folder


def cut_in_two(folder: Path) -> None:
    """One file of weights to two and an index, as large models come."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for place in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


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
TEXTS = [*CONFIGS, "sharded/model.safetensors.index.json"]


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


def many(examples: int) -> settings:
    """The same examples in every run: what is refused does not depend on random numbers."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@pytest.mark.parametrize("name", FILES)
@many(30)
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
@many(20)
@given(share=st.floats(0, 1), extra=st.binary(max_size=40))
def test_cut_off_and_added_to(folder: Path, name: str, share: float, extra: bytes) -> None:
    attempt(copy_of(folder, name, lambda content: content[: int(share * len(content))] + extra))


@many(60)
@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=80).map(lambda rest: b"\x80\x02" + rest + b".")))
def test_anything_at_all(folder: Path, content: bytes) -> None:
    (folder / "anything.pth").write_bytes(content)
    with pytest.raises(UserError):
        vitrail.load(folder / "anything.pth")


LAYOUTS = ["vitrail", "timm", "hf", "google.npz"]


@pytest.mark.parametrize("name", LAYOUTS)
@many(15)
@given(data=st.data())
def test_weights_renamed_swapped_reshaped_or_gone(folder: Path, name: str, data: st.DataObject) -> None:
    """Two of another shape that changed places, or any that is missing or odd, are an error in one line."""
    weights = {key: value.clone() for key, value in open_files(folder / name).weights.items()}
    names = sorted(weights)
    first, second = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True))
    how = data.draw(st.sampled_from(["swap", "rename", "drop", "add", "flatten", "row", "empty", "whole numbers"]))
    before = weights[first]
    match how:
        case "swap":
            weights[first], weights[second] = weights[second], weights[first]
        case "rename":
            weights[f"{first}x"] = weights.pop(first)
        case "drop":
            del weights[first]
        case "add":
            weights["surprise"] = before.clone()
        case "flatten":
            weights[first] = before.flatten()[:, None]
        case "row":
            weights[first] = torch.cat([before, before])
        case "empty":
            weights[first] = before[:0]
        case _:
            weights[first] = torch.zeros(before.shape, dtype=torch.int32)
    path = written(folder, name, weights)
    if how == "swap" and before.shape == weights[first].shape:
        attempt(path)
        return
    with pytest.raises(UserError) as caught:
        vitrail.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def written(folder: Path, name: str, weights: dict[str, Tensor]) -> Path:
    """A copy of the checkpoint with other weights."""
    place = folder / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    if name.endswith(".npz"):
        place.mkdir()
        np.savez(place / name, **{key: value.numpy() for key, value in weights.items()})  # type: ignore[arg-type]
        return place / name
    shutil.copytree(folder / name, place)
    save_file(weights, place / "model.safetensors")
    return place


VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 10**9, 1 << 70, 0.5, 1e308, float("nan")),
    *("", "swin", "../x", [], [0, 0], [1e9], {}, {"a": 1}),
]


def places_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON text."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [at, *(place for key, inner in inside for place in places_in(inner, (*at, key)))]


def replaced(text: Any, place: tuple[Any, ...], value: Any) -> bytes:
    """The text with another value at a place."""
    changed = json.loads(json.dumps(text))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(changed).encode()


@pytest.mark.parametrize("name", TEXTS)
@many(60)
@given(data=st.data())
def test_values_of_a_config_replaced(folder: Path, name: str, data: st.DataObject) -> None:
    text = json.loads((folder / name).read_text())
    place, value = data.draw(st.sampled_from(places_in(text)[1:])), data.draw(st.sampled_from(VALUES))
    attempt(copy_of(folder, name, lambda _: replaced(text, place, value)))


@pytest.mark.parametrize("count", [10**9, 1 << 70])
@pytest.mark.parametrize(
    "name, place",
    [
        ("hf/config.json", ("num_channels",)),
        ("hf/config.json", ("num_hidden_layers",)),
        ("timm/config.json", ("model_args", "in_chans")),
        ("timm/config.json", ("model_args", "depth")),
        ("vitrail/config.json", ("encoder", "depth")),
        ("vitrail/config.json", ("encoder", "width")),
        ("vitrail/config.json", ("preprocess", "channels")),
    ],
)
def test_counts_that_would_take_for_ever_are_refused_at_once(
    folder: Path, name: str, place: tuple[str, ...], count: int
) -> None:
    text = json.loads((folder / name).read_text())
    path = copy_of(folder, name, lambda _: replaced(text, place, count))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        vitrail.load(path)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["vitrail/config.json", "hf/config.json"])
@many(30)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(32, 126)), min_size=1, max_size=3))
def test_changed_letters_of_a_config(folder: Path, name: str, changes: list[tuple[int, int]]) -> None:
    def change(content: bytes) -> bytes:
        damaged = bytearray(content)
        for place, value in changes:
            damaged[place % len(damaged)] = value
        return bytes(damaged)

    attempt(copy_of(folder, name, change))


class Runs:
    """Unpickles by a call, as a hostile file does."""

    def __init__(self, call: Callable[..., Any], *values: Any) -> None:
        self.call, self.values = call, values

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.values


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_run_nothing(tmp_path: Path, zipped: bool, protocol: int) -> None:
    marker = tmp_path / "ran"
    calls = [
        Runs(os.system, f"touch {marker}"),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(open, str(marker), "w"),
        Runs(subprocess.Popen, ["touch", str(marker)]),
        Runs(shutil.copy, __file__, str(marker)),
    ]
    for call in calls:
        for content in (call, {"model": {"a": call}}, {"state_dict": {"a": torch.zeros(1)}, "hook": [call]}):
            path, program = tmp_path / "a.pth", pickle.dumps(content, protocol=protocol)
            if zipped:
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("archive/data.pkl", program)
                    archive.writestr("archive/version", b"3")
            else:
                path.write_bytes(program)
            with pytest.raises(UserError) as caught:
                vitrail.load(path)
            assert "\n" not in str(caught.value) and not marker.exists()
