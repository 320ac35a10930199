"""What OpenVINO cannot express or read, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitrail.export.openvino import SCOPES, unsupported
from vitrail.zoo.exports.engines import reason_of

UNKNOWN = """Check 'false' failed at src/frontends/common/report.cpp:151:
FrontEnd API failed with OpConversionFailure:
Model wasn't fully converted.
Summary:
-- No conversion rule found for operations: Det-20
"""


def test_an_operator_that_it_does_not_know_is_named_with_its_module(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs pip install 'vitrail[export]'")
    node = onnx.helper.make_node("Det", ["x"], ["y"])
    node.metadata_props.add(key=SCOPES, value=repr(["", "task", "task.encoder.norm", "det"]))
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    assert unsupported(RuntimeError(UNKNOWN), tmp_path / "m.onnx") == "Det of encoder.norm"
    assert unsupported(RuntimeError(UNKNOWN.replace("Det", "Other")), tmp_path / "m.onnx") == "Other of the model"
    assert unsupported(RuntimeError("Check 'x' failed at a.cpp:1:\nno memory"), tmp_path) == "this model (no memory)"


def test_the_reason_is_no_place_in_the_sources_of_an_engine() -> None:
    text = "Exception from src/core.cpp:84:\nException from src/reader.cpp:148:\nUnable to read the model\n\n"
    assert reason_of(RuntimeError(text)) == "Unable to read the model"
    assert reason_of(RuntimeError("plain\nmore")) == "plain" and reason_of(ValueError()) == "ValueError"
