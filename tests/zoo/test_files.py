"""Files of every layout to the same weights; and whatever is wrong with a file, one plain line."""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vitrail
from vitrail.errors import UserError
from vitrail.zoo.files import open_files

WEIGHTS = {"norm.weight": torch.arange(3.0), "blocks.0.fc.weight": torch.randn(2, 3), "count": torch.tensor(7)}


def read(path: Path) -> dict[str, Tensor]:
    files = open_files(path)
    weights = dict(files.weights)
    assert {name: tuple(value.shape) for name, value in weights.items()} == dict(files.shapes)
    return weights


def same(weights: dict[str, Tensor], wanted: dict[str, Tensor] = WEIGHTS) -> None:
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("zipped", [True, False])
def test_dictionaries_within_dictionaries(tmp_path: Path, zipped: bool) -> None:
    """Names are joined; what is no tensor has a reason; an array or a path beside the weights is read over."""
    more: dict[str, Any] = {"best": np.float64(0.5), "args": argparse.Namespace(lr=np.float32(1)), "empty": {}}
    more |= {"data": Path("/images"), "rng": np.arange(3), "shadow": [torch.ones(1)]}
    content = {"state": {"model": OrderedDict(WEIGHTS)}, **more}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    same(read(tmp_path / "a.pth"), {f"state.model.{name}": value for name, value in WEIGHTS.items()})
    files = open_files(tmp_path / "a.pth")
    assert files.entries == ("state.model",) and files.left.keys() == more.keys()


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": WEIGHTS}
    content["self"] = content["again"] = {"outer": content, "model": WEIGHTS}
    torch.save(content, tmp_path / "a.pth")
    same(read(tmp_path / "a.pth"), {f"model.{name}": value for name, value in WEIGHTS.items()})


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors", "without-an-ending"])
def test_safetensors_by_content(tmp_path: Path, name: str) -> None:
    save_file(WEIGHTS, tmp_path / name)
    same(read(tmp_path / name))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy(tmp_path: Path, save: Any) -> None:
    arrays = {k: v.numpy() for k, v in WEIGHTS.items()}
    save(tmp_path / "a.npz", **arrays, **{"params/empty": np.zeros((0, 3), np.float32)})
    same(read(tmp_path / "a.npz"), {**WEIGHTS, "params/empty": torch.zeros(0, 3)})
    strange = {"big-endian": np.arange(3, dtype=">f4"), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    save(tmp_path / "b.npz", **strange, text=np.array("hello"))
    wanted = {"big-endian": torch.arange(3.0), "fortran": torch.arange(6.0, dtype=torch.float64).view(2, 3)}
    same(read(tmp_path / "b.npz"), wanted)


@pytest.mark.parametrize("stem, ending", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards(tmp_path: Path, stem: str, ending: str) -> None:
    places = {}
    for i, (name, value) in enumerate(WEIGHTS.items()):
        place = places[name] = f"{stem}-{i}.{ending}"
        save_file({name: value}, tmp_path / place) if ending == "safetensors" else torch.save(
            {name: value}, tmp_path / place
        )
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    same(read(tmp_path))
    same(read(index))
    for place, words in [("../out.bin", "outside"), ("/etc/passwd", "outside"), ("gone.bin", "missing")]:
        index.write_text(json.dumps({"weight_map": {**places, "x": place}}))
        with pytest.raises(UserError, match=words):
            open_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {**places, "x": places["count"]}}))
    with pytest.raises(UserError, match="does not hold it"):
        open_files(tmp_path)


def test_mapped_weights_are_private(tmp_path: Path) -> None:
    """Training in place on mapped weights leaves the file unchanged."""
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    torch.save(WEIGHTS, tmp_path / "a.pth")
    np.savez(tmp_path / "a.npz", **{k: v.numpy() for k, v in WEIGHTS.items()})  # type: ignore[arg-type]
    for name in ("a.safetensors", "a.pth", "a.npz"):
        before = (tmp_path / name).read_bytes()
        open_files(tmp_path / name).weights["blocks.0.fc.weight"].add_(1)
        assert (tmp_path / name).read_bytes() == before


class Model(torch.nn.Module):
    pass


def torch_zip(path: Path, program: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in {"data.pkl": program, "version": b"3", "byteorder": b"little", **entries}.items():
            archive.writestr(f"archive/{name}", value)
    return path


def call(module: str, name: str, number: int) -> bytes:
    """A pickle of `{"a": module.name(number)}`."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00ac"
        + f"{module}\n{name}\n".encode()
        + b"\x8a\x08"
        + struct.pack("<q", number)
        + b"\x85Rs."
    )


def write_numpy(path: Path, header: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x00" * 16)


def make_bad(path: Path, how: str) -> str:
    """Write a bad file, and give the words that the line has to hold."""
    match how:
        case "empty":
            path.write_bytes(b"")
            return "is empty"
        case "text":
            path.write_text("once upon a time, at some length")
            return "is not a checkpoint"
        case "page":
            path.write_text("<!DOCTYPE html><html></html>")
            return "web page"
        case "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
            return "git lfs pull"
        case "keras":
            path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 64)
            return "HDF5"
        case "flax":
            path.write_bytes(b"\x83\xa10\x82\xa9embedding" + b"\0" * 64)
            return "msgpack.* .npz"
        case "gguf":
            path.write_bytes(b"GGUF" + b"\0" * 64)
            return "GGUF"
        case "gzip":
            path.write_bytes(gzip.compress(b"hello" * 100))
            return "gzip"
        case "whole model":
            torch.save(Model(), path)
            return f"holds a {Model.__module__}.Model"
        case "pickled model":
            path.write_bytes(pickle.dumps(Model(), protocol=2))
            return "which could run code"
        case "pickled model of protocol 4":
            path.write_bytes(pickle.dumps({"a": argparse.ArgumentParser}, protocol=4))
            return "argparse.ArgumentParser"
        case "call":
            torch_zip(path, call("posix", "system", 1))
            return "posix.system|nt.system|os.system"
        case "old call":
            path.write_bytes(call("posix", "system", 1))
            return "posix.system|nt.system|os.system|damaged"
        case "bytearray":
            torch_zip(path, call("builtins", "bytearray", 1 << 40))
            return "bytearray"
        case "old bytearray":
            path.write_bytes(call("__builtin__", "bytearray", 1 << 40))
            return "bytearray"
        case "many numbers":
            torch_zip(path, call("torch", "FloatTensor", 1 << 45))
            return "damaged|malicious|could run code|can run code"
        case "view":
            torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)
            return "declares more numbers"
        case "sparse":
            torch.save({"a": torch.eye(3).to_sparse()}, path)
            return "quantised, sparse"
        case "script":
            torch_zip(path, pickle.dumps({}, protocol=2), **{"constants.pkl": pickle.dumps(())})
            return "TorchScript"
        case "one tensor":
            torch.save(torch.zeros(3), path)
            return "single tensor"
        case "list":
            torch.save([1, 2], path)
            return "holds a list"
        case "nothing":
            torch.save({"epoch": 3}, path)
            return "no weights"
        case "packed":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", b"\x80\x02}." * 100)
            return "is compressed"
        case "another kind of archive":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("hello.txt", "hello")
            return "another kind of archive"
        case "objects":
            np.savez(path.with_suffix(".npz"), a=np.array([print], dtype=object))
            path.with_suffix(".npz").rename(path)
            return "Python objects"
        case "numpy lie":
            write_numpy(path, b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }\n")
            return "declares more bytes"
        case "numpy bomb":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
                np.lib.format.write_array(file, np.zeros(1 << 21, np.float32))
            return "declares more bytes"
        case "numpy header":
            write_numpy(path, b"{'descr': __import__('os'), }\n")
            return "damaged"
        case "safetensors lie":
            header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
            path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
            return "damaged"
        case "safetensors header":
            path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"a": 1}')
            return "damaged"
        case _:
            torch.save(WEIGHTS, path)
            path.write_bytes(path.read_bytes()[:-200])
            return "damaged"


BAD = [
    *(
        "empty",
        "text",
        "page",
        "pointer",
        "keras",
        "gzip",
        "whole model",
        "pickled model",
        "pickled model of protocol 4",
    ),
    *(
        "call",
        "old call",
        "bytearray",
        "old bytearray",
        "many numbers",
        "view",
        "sparse",
        "script",
        "one tensor",
        "list",
    ),
    *("flax", "gguf"),
    *(
        "nothing",
        "packed",
        "another kind of archive",
        "objects",
        "numpy lie",
        "numpy bomb",
        "numpy header",
        "safetensors lie",
    ),
    *("safetensors header", "cut off"),
]


@pytest.mark.parametrize("how", BAD)
def test_bad_files_get_one_line(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.pth"
    words = make_bad(path, how)
    with pytest.raises(UserError, match=words) as caught:
        vitrail.load(path)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and len(line) < 400 + len(str(path)), line


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "holds no checkpoint"),
        ({"flax_model.msgpack": b"x"}, "flax_model.msgpack"),
        ({"a.pth": b"x", "b.pth": b"y"}, "2 checkpoints"),
        ({".metadata": b"x", "__0_0.distcp": b"y"}, "dcp_to_torch"),
        ({"config.json": b"{" + b'"a":[' * 100_000, "model.safetensors": b"x"}, "config.json cannot be read"),
        ({"config.json": b"[]", "model.safetensors": b"x"}, "holds a list"),
        ({"model.safetensors.index.json": b'{"weight_map": 3}'}, "not an index"),
    ],
)
def test_folders_without_a_checkpoint(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        vitrail.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names, words",
    [
        (["layers.0.blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight"], "Swin"),
        (["stages.0.blocks.0.conv_dw.weight", "stem.0.weight"], "ConvNeXt"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "ResNet"),
        (["model.embed_tokens.weight", "lm_head.weight"], "language model"),
        (["spam", "eggs"], "weights such as"),
    ],
)
def test_other_models_are_named(tmp_path: Path, names: list[str], words: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words):
        vitrail.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_unless_requested(tmp_path: Path, dtype: torch.dtype) -> None:
    model = vitrail.create("nano/2", classes=3, stem=(4,)).to(dtype)
    model.save(tmp_path / "m")
    loaded = vitrail.load(tmp_path / "m")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert loaded.state_dict()["encoder.patches.stem.layers.1.num_batches_tracked"].dtype == torch.int64
    kept = vitrail.load(tmp_path / "m", dtype=dtype, classes=5, channels=1)
    assert {value.dtype for value in kept.parameters()} == {dtype}


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    vitrail.create("nano/2").save(tmp_path / "m")
    weights = dict(open_files(tmp_path / "m").weights)
    weights["encoder.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(weights, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="not quantised"):
        vitrail.load(tmp_path / "m")
