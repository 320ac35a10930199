"""Files of the other engines: precisions, and what is refused of files that are damaged, foreign or incomplete."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from export.exports import FORMATS, exported, filled
from PIL import Image

import vitrail
from vitrail.errors import UserError
from vitrail.export import engine_for, export
from vitrail.tasks.task import Task

pytestmark = pytest.mark.slow


def classifier() -> Task:
    torch.manual_seed(0)  # one in ten has outputs so small that bf16 is more than a tenth of them
    return filled(vitrail.create("nano/2", classes=["a", "b", "c"]))


@pytest.fixture(scope="module", params=FORMATS[1:])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export of each format that needs the extra."""
    return exported(classifier(), tmp_path_factory.mktemp("written"), request.param)[0]


def copied(folder: Path, to: Path, file: str, content: bytes | None) -> Path:
    """A copy of an export in which one file has other content, or is missing."""
    to.mkdir()
    for each in folder.iterdir():
        if each.name != file or content is not None:
            (to / each.name).write_bytes(each.read_bytes() if each.name != file or content is None else content)
    return to


def test_damaged_files_take_one_line(written: Path, tmp_path: Path) -> None:
    for file in written.iterdir():
        if file.suffix in (".py", ".md"):
            continue
        whole = file.read_bytes()
        for i, content in enumerate((whole[: len(whole) // 2], whole[:10], b"", None)):
            bad = copied(written, tmp_path / f"{file.name}-{i}", file.name, content)
            with pytest.raises(UserError) as caught:
                vitrail.load(bad)
            assert "\n" not in str(caught.value) and str(bad) in str(caught.value), (file, i)


@pytest.mark.parametrize("to", FORMATS[2:])
def test_weights_of_another_export_or_damaged_ones_are_not_run(to: str, tmp_path: Path) -> None:
    tasks = [classifier(), classifier()]
    with torch.no_grad():
        next(iter(tasks[1].parameters())).add_(1.0)
    folders = []
    for i, task in enumerate(tasks):
        engine_for(task, tmp_path / str(i), to, "fp32", None)
        folders.append(tmp_path / str(i))
    whole, other = ((folder / "model.bin").read_bytes() for folder in folders)
    assert len(whole) == len(other)
    middle = len(whole) // 2
    for i, content in enumerate((other, whole[:middle] + bytes(64) + whole[middle + 64 :])):
        with pytest.raises(UserError, match=r"model.bin is damaged, or belongs to another export than model.xml"):
            vitrail.load(copied(folders[0], tmp_path / f"mixed-{i}", "model.bin", content))


@pytest.mark.parametrize("to", FORMATS[1:])
def test_batches_of_any_size_are_answered_alike(to: str, tmp_path: Path) -> None:
    """OpenVINO has graphs for the first sizes of batches, and one for the rest. It also split paths at commas."""
    task = classifier()
    images = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        for i, size in enumerate((None, task.preprocess.size)):
            engine = engine_for(task, tmp_path / f"one, two {i}", to, "fp32", size)
            for count in (4, 1, 2, 3, 4, 1):
                found = torch.cat([engine(batch) for batch in images.split(count)])
                torch.testing.assert_close(found, task(images), atol=1e-4, rtol=1e-4)


def test_a_newer_release(written: Path, tmp_path: Path) -> None:
    file = next(file for file in written.iterdir() if file.suffix in (".onnx", ".xml"))
    new = file.read_bytes()
    for quote in (b'"', b"&quot;"):  # the second in XML
        new = new.replace(b"%sexport%s: 1" % (quote, quote), b"%sexport%s: 2" % (quote, quote))
    with pytest.raises(UserError, match="a newer release than this one: upgrade vitrail"):
        vitrail.load(copied(written, tmp_path / "new", file.name, new))


def test_a_graph_that_vitrail_did_not_write(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs pip install 'vitrail[export]'")
    pytest.importorskip("onnxruntime", reason="needs pip install 'vitrail[export]'")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [])
    graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"m.onnx is not an export of vitrail"):
        vitrail.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("to", [pytest.param("pt2"), FORMATS[2]])
def test_bf16_is_near(to: str, tmp_path: Path) -> None:
    task = classifier()
    out, result = exported(task, tmp_path, to, precision="bf16")
    assert result.proof.relative < 0.1
    images = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        found = vitrail.load(out)(images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, task(images), atol=0.1 * float(task(images).abs().max()), rtol=0)


@pytest.mark.parametrize("restored, sizes", [(False, []), (True, []), (False, [(32, 32)])])
@pytest.mark.parametrize("to", FORMATS[1:])
def test_int8_is_calibrated_and_answers_alike(
    to: str, restored: bool, sizes: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained weights, since how near the outputs of random ones are says nothing. Some layers may go back."""
    pytest.importorskip("nncf", reason="needs pip install 'vitrail[export]'")
    if restored:
        monkeypatch.setattr("vitrail.export.quantise.ERROR", 1e-6)
        monkeypatch.setattr("vitrail.export.quantise.REVERTED", 2)
    samples = sorted(Path(str(files("vitrail"))).glob("zoo/samples/*.png"))
    for sample in samples:
        (tmp_path / "data" / "train" / sample.stem).mkdir(parents=True)
        shutil.copy(sample, tmp_path / "data" / "train" / sample.stem)
    result = export("classify", tmp_path / "out", to, precision="int8", data=str(tmp_path / "data"), sizes=sizes)
    assert result.sizes == sizes
    assert result.scores is not None and result.scores.images == len(samples) == 10
    task, again = vitrail.load("classify"), vitrail.load(tmp_path / "out")
    images = [Image.open(sample).copy() for sample in samples]
    pairs = zip(task.predict(images), again.predict(images), strict=True)
    assert sum(one.row()["labels"][0]["label"] == other.row()["labels"][0]["label"] for one, other in pairs) >= 9
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir() if file.suffix in (".onnx", ".bin"))
    assert size < 0.5 * sum(4 * parameter.numel() for parameter in task.parameters())


SIGNALLED = """
import os, signal, sys
import PIL.Image, vitrail
first, second = (vitrail.load(sys.argv[1]) for _ in range(2))
for model in (first, second):
    model.predict(PIL.Image.new("RGB", (32, 32)))
del model, first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no signal of the user's own")
def test_a_signal_after_two_models_is_handled(written: Path) -> None:
    """A training's worker that ends, or Ctrl-C, ended a process in which two models of OpenVINO had been."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(written)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "handled" in done.stdout, done.stderr
