"""What a pt2 file may hold and call is looked at before PyTorch reads it."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vitrail.errors import UserError
from vitrail.zoo.exports.programs import check_program

GOOD = {"nodes": [{"target": "torch.ops.aten.add.Tensor"}, {"target": "_operator.mul"}], "range_constraints": ["s0"]}
BAD = {"nodes": [{"target": "torch.hub.load"}]}


def archive(path: Path, entries: list[tuple[str, Any]]) -> Path:
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal names
        for name, content in entries:
            file.writestr(f"model/{name}", content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_program_of_tensor_operators_passes(tmp_path: Path) -> None:
    entries = [("models/model.json", GOOD), ("data/weights/w_0", "x"), ("extra/config.json", "{}"), ("version", "6")]
    check_program(archive(tmp_path / "a.pt2", entries))


def target(name: str) -> list[tuple[str, Any]]:
    return [("models/model.json", {"nodes": [{"target": name}]})]


def expression(text: str) -> list[tuple[str, Any]]:
    return [("models/model.json", {"expr_str": text})]


@pytest.mark.parametrize(
    "entries",
    [
        target("torch.hub.load"),
        [("models/model.JSON", BAD)],
        [("models/extra.json", BAD)],
        [("m/models/model.json", BAD)],
        [("models/sub/model.json", BAD)],
        [("models/model.json", GOOD), ("models/model.json", BAD)],
        [("models/model.json", GOOD), ("Models/model.json", BAD)],
        [("data/aotinductor/model.so", "x")],
        [("data/constants/custom_obj_0", "x")],
        target("torch.ops.aten.from_file.default"),
        target("torch.ops.higher_order.run_and_save_rng_state"),
        target("torch.ops.aten.\uff41dd"),
        expression("__import__('os').system('true')"),
        expression("\uff45\uff56\uff41\uff4c(s0)"),
    ],
)
def test_anything_else_is_refused(entries: list[tuple[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is no|has the expression"):
        check_program(archive(tmp_path / "a.pt2", entries))
