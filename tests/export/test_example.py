"""The script in an export: the pixels that it prepares, and its answers without vitrail and torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from export.exports import FORMATS, an_image, filled
from PIL import Image
from task_examples import EXAMPLES

import vitrail
from vitrail.data.preprocess import Preprocess
from vitrail.export import export
from vitrail.export.example import ENGINES, example
from vitrail.tasks.exported import CLASS
from vitrail.tasks.segment import Segment
from vitrail.tasks.task import Task
from vitrail.zoo.exports import Meta

PIXEL = 1 / 255


def meta(to: str, preprocess: Preprocess, precision: str = "fp32") -> Meta:
    config = {"preprocess": preprocess.as_dict(), "classes": ["a", "b"]}
    programs = {"model": {"inputs": ["images"], "outputs": ["output"]}}
    return Meta(config, {}, "0", to, precision, [], 4, False, programs, "")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the example for ONNX Runtime on images, with an engine that keeps its inputs."""

    def on(preprocess: Preprocess, *paths: Path, task: Task | None = None) -> list[np.ndarray]:
        own, seen, program = meta("onnx", preprocess), [], None
        if task is not None:
            own.config.update({**task.config(), "classes": list(task.classes)})
            program = task.programs({"image": torch.zeros(1, 3, *preprocess.size)})["model"]

        class Session:
            def __init__(self, path: Path) -> None:
                assert path == tmp_path / "model.onnx"

            def get_modelmeta(self) -> Any:
                return SimpleNamespace(custom_metadata_map={"vitrail": own.as_json()})

            def run(self, names: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
                seen.append(given["images"])
                if program is None:
                    return [np.array([[0.0, 1.0]])]
                with torch.inference_mode():
                    return [found.numpy() for found in program.module(torch.from_numpy(given["images"]))]

        engine = ModuleType("onnxruntime")
        engine.InferenceSession = Session  # type: ignore[attr-defined]
        engine.__spec__ = ModuleSpec("onnxruntime", None)  # which PyTorch looks at
        monkeypatch.setitem(sys.modules, "onnxruntime", engine)
        monkeypatch.setattr(sys, "argv", ["example.py", *map(str, paths)])
        text = example(own, CLASS if program is None else program.answer)
        exec(compile(text, str(tmp_path / "example.py"), "exec"), {"__file__": str(tmp_path / "example.py")})
        return seen

    return on


def colours(height: int = 20, width: int = 30) -> Image.Image:
    return an_image(1, (height, width))


def stored(kind: str, folder: Path) -> Path:
    """An image file of a kind that readers treat in different ways."""
    image, path = colours(), folder / f"{kind}.png"
    ramp = np.linspace(0, 255, 30).astype(np.uint8)[None].repeat(20, 0)
    if kind == "turned":
        exif = Image.Exif()
        exif[274] = 6
        image.save(path := path.with_suffix(".jpg"), exif=exif, quality=95)
    elif kind == "transparent":
        image.putalpha(Image.fromarray(ramp))
        image.save(path)
    elif kind == "grey and transparent":
        Image.merge("LA", [image.convert("L"), Image.fromarray(ramp)]).save(path)
    elif kind == "palette":
        image.quantize(16).save(path)
    elif kind == "transparent palette":
        image.quantize(16).save(path, transparency=3)
    elif kind == "16 bits":
        Image.fromarray(ramp.astype(np.uint16) * 257 + 3).save(path)
    elif kind == "black and white":
        image.convert("1").save(path)
    elif kind == "grey":
        image.convert("L").save(path)
    else:
        image.convert("CMYK").save(path := path.with_suffix(".jpg"), quality=95)
    return path


KINDS = (
    "turned",
    "transparent",
    "grey and transparent",
    "palette",
    "transparent palette",
    "16 bits",
    "black and white",
    "grey",
    "CMYK",
)
PREPROCESS = Preprocess(size=(16, 12), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_vitrail(kind: str, channels: int, run: Any, tmp_path: Path) -> None:
    preprocess = PREPROCESS if channels == 3 else replace(PREPROCESS, channels=1, mean=(0.5,), std=(0.2,))
    path = stored(kind, tmp_path)
    (found,) = run(preprocess, path)
    expected = preprocess(path).numpy()[None]
    assert found.dtype == np.float32 and found.shape == expected.shape
    # Both round: grey from colours, what a JPEG stores, and what is resized.
    assert np.abs(found - expected).max() <= 4.01 * PIXEL / min(preprocess.std)


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (9, 40)])
@pytest.mark.parametrize(
    "how",
    [{"resize": "crop", "crop_fraction": 0.875}, {"resize": "squash", "crop_fraction": 0.9}, {"resize": "letterbox"}],
)
def test_every_way_to_fit_an_image(how: dict[str, Any], size: tuple[int, int], run: Any, tmp_path: Path) -> None:
    preprocess = replace(PREPROCESS, **how)
    colours(*size).save(path := tmp_path / "a.png")
    (found,) = run(preprocess, path)
    assert np.abs(found[0] - preprocess(path).numpy()).max() <= 1.01 * PIXEL / min(preprocess.std)


def test_what_pillow_alone_would_read_in_another_way_is_refused(run: Any, tmp_path: Path) -> None:
    floats = Image.fromarray(np.ones((8, 8), np.float32))
    colours().save(tmp_path / "a.tif")
    floats.save(tmp_path / "b.pfm")
    for path, preprocess in (
        (tmp_path / "a.tif", PREPROCESS),
        (tmp_path / "b.pfm", PREPROCESS),
        (stored("transparent", tmp_path), replace(PREPROCESS, channels=4, mean=(0.5,) * 4, std=(0.5,) * 4)),
    ):
        with pytest.raises(SystemExit, match=r"this example reads images of 8 bits, or PNG of 16"):
            run(preprocess, path)


@pytest.mark.parametrize("to", ENGINES)
def test_a_script_of_thirty_lines(to: str) -> None:
    for resize in ("crop", "squash", "letterbox"):
        text = example(meta(to, replace(PREPROCESS, resize=resize), "bf16"), CLASS)
        compile(text, "example.py", "exec")
        assert len(text.splitlines()) <= 30 and max(map(len, text.splitlines())) <= 120


WITHOUT_PROGRAMS_OF_THEIR_OWN = [(kind, name) for kind, each in EXAMPLES.items() if kind != "caption" for name in each]


@pytest.mark.parametrize("kind, name", WITHOUT_PROGRAMS_OF_THEIR_OWN)
def test_it_prints_what_the_task_answers(
    kind: str, name: str, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = filled(EXAMPLES[kind][name]())
    an_image(1, (8, 8)).save(path := tmp_path / "a.png")
    (x,) = run(task.preprocess, path, task=task)
    printed = capsys.readouterr().out.rstrip("\n").split("\t")[1]
    row = task.predict([path])[0].row()
    if "values" in row:
        expected = ", ".join(f"{each['name']} {each['value']:.4g}" for each in row["values"])
    elif "embedding" in row:
        assert [float(number) for number in printed.split()] == pytest.approx(row["embedding"], abs=1e-4)
        return
    elif isinstance(task, Segment):
        classes = task.logits(torch.from_numpy(x))[0].argmax(0)
        expected = task.classes[int(classes.flatten().bincount().argmax())]
    else:
        names = [each["label"] for each in row["labels"]]
        expected = ", ".join(sorted(names)) or "no label" if kind == "tag" else names[0]
    assert printed == expected


def site(folder: Path, to: str) -> Path:
    """A folder with the packages that the script needs, and no other."""
    folder.mkdir()
    for name in ("numpy", "PIL", "onnxruntime" if to == "onnx" else "openvino"):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        for beside in (package, *package.parent.glob(f"{name.lower().replace('pil', 'pillow')}.libs")):
            (folder / beside.name).symlink_to(beside)
    return folder


def answers_without_vitrail(out: Path, to: str, tmp_path: Path, paths: list[Path]) -> list[str]:
    check = "import importlib.util as u; assert not (u.find_spec('torch') or u.find_spec('vitrail'))"
    environment = {"PYTHONPATH": str(site(tmp_path / "site", to)), "PATH": ""}
    subprocess.run([sys.executable, "-S", "-c", check], env=environment, check=True)
    command = [sys.executable, "-S", str(out / "example.py"), *map(str, paths)]
    lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split("\t")[1] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS[1:])
def test_the_example_needs_no_vitrail_and_no_torch(to: str, tmp_path: Path) -> None:
    """Of 100 images it names the classes that vitrail names.

    Where two scores of vitrail are within 0.001, as of one image here, the last bit of a pixel decides: either will do.
    """
    out = tmp_path / "out"
    export("classify", out, to)
    paths = [stored(kind, tmp_path) for kind in KINDS]
    for i in range(100 - len(paths)):
        an_image(i, (40 + i % 9, 32 + i % 31)).save(path := tmp_path / f"{i}.png")
        paths.append(path)
    answers = vitrail.load("classify").predict([Image.open(path) for path in paths])
    likely = [
        [label["label"] for label in labels if labels[0]["score"] - label["score"] < 1e-3]
        for labels in (each.row()["labels"] for each in answers)
    ]
    assert sum(len(names) > 1 for names in likely) <= 3
    named = answers_without_vitrail(out, to, tmp_path, paths)
    assert all(name in names for name, names in zip(named, likely, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS[1:])
def test_the_example_of_a_captioner_writes_captions(to: str, tmp_path: Path) -> None:
    """Those of vitrail's greedy search, without reranking."""
    out = tmp_path / "out"
    export("caption", out, to)
    paths = [stored(kind, tmp_path) for kind in KINDS]
    task = vitrail.load("caption")
    task.choose({"beam": 1, "match": 0.0, "consensus": 0.0})
    answers = task.predict([Image.open(path) for path in paths])
    found = answers_without_vitrail(out, to, tmp_path, paths)
    assert found == [each.row()["caption"] for each in answers] and len(set(found)) > 1
