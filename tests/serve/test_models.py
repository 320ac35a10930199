"""Names of models and what their cards say; engines."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from serve.serving import classifier

from vitrail.errors import UserError
from vitrail.serve import engines
from vitrail.serve.models import about, read_sources
from vitrail.serve.settings import Settings
from vitrail.zoo import find


def test_models_are_called_by_the_last_word_of_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pets/best", "pets/last", "a=b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pets" / "model.onnx").touch()
    words = ["classify", "pets", "other=pets/best", "pets/model.onnx", "google/vit-base-patch16-224", "a=b"]
    assert [(each.name, each.source) for each in read_sources(words)] == [
        ("classify", "classify"),
        ("pets", "pets"),
        ("other", "pets/best"),
        ("model", "pets/model.onnx"),
        ("vit-base-patch16-224", "google/vit-base-patch16-224"),
        ("a=b", "a=b"),
    ]
    assert read_sources(["pets/best"])[0].name == "pets"
    assert [each.name for each in read_sources([])] == ["classify"]


@pytest.mark.parametrize("words", [["classify", "classify"], ["a/x", "b/x"], ["x=classify", "x=caption"]])
def test_two_models_of_one_name_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="give one another name, such as"):
        read_sources(words)


def test_cards() -> None:
    assert about(find("classify"))["licence"] == (
        "MIT, as the package; CIFAR-10 itself is published without a licence, for research"
    )
    assert "Flickr8k" in str(about(find("caption"))["training_data"])


def test_cards_of_the_hub_and_of_runs(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\ndatasets:\n- imagenet-1k\n- laion\ntags: x\n---\nText"
    )
    assert about(tmp_path) == {"licence": "apache-2.0", "training_data": "imagenet-1k, laion"}
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps({"data": "/home/somebody/pets"}))
    assert about(run / "best") == {"licence": None, "training_data": "pets"}
    (run / "recipe.json").write_text("{")
    assert about(run / "best") == {"licence": None, "training_data": None}


def test_the_fastest_engine_that_agrees_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    task, rates = classifier(), {"eager": 10.0, "compile": 30.0, "onnx": 20.0, "openvino": 40.0}

    def make(name: str, *args: object) -> engines.Engine:
        if name == "openvino":
            raise UserError("it differs")
        return engines.Engine(name, task)

    def measured(engine: engines.Engine, settings: Settings) -> engines.Engine:
        engine.rate = rates[engine.name]
        return engine

    monkeypatch.setattr(engines, "make_engine", make)
    monkeypatch.setattr(engines, "measure_rate", measured)
    monkeypatch.setattr(engines, "candidates", lambda task, precision: ["openvino", "onnx", "compile"])
    with ExitStack() as places:
        chosen = engines.choose("x", task, Settings(), float("inf"), places)
        assert chosen.name == "compile"
        assert chosen.line() == (
            "compile, fp32, 30 images per second (eager 10; onnx 20; openvino left out: it differs)"
        )
        late = engines.choose("x", task, Settings(), 0.0, places)
        assert late.name == "eager" and "not tried, since the time was up: openvino, onnx, compile" in late.line()
        assert engines.choose("x", task, Settings(engine="onnx"), 0.0, places).name == "onnx"
        with pytest.raises(UserError, match="--engine openvino cannot run x: it differs"):
            engines.choose("x", task, Settings(engine="openvino"), 0.0, places)


def test_candidates_of_a_lower_precision_are_pytorchs_own() -> None:
    assert engines.candidates(classifier(), "bf16") == ["compile"]


def test_an_engine_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = classifier()
    monkeypatch.setattr(engines, "ready_to_compile", lambda device: None)

    class Off(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.config, self.pool = inner, inner.config, inner.pool

        def forward(self, images: torch.Tensor) -> object:
            found = self.inner(images)
            return type(found)(found.prefix + self.off, found.patches + self.off, found.grid)

    for off in (0.0, 0.5):
        monkeypatch.setattr(Off, "off", off, raising=False)
        monkeypatch.setattr(torch, "compile", lambda module, dynamic: Off(module))
        if off:
            with pytest.raises(UserError, match=r"more than 0\.001: largest difference .* over 2 pairs"):
                engines.compile_task(task)
        else:
            assert isinstance(engines.compile_task(task).encoder, Off) and not isinstance(task.encoder, Off)


def test_a_real_measurement() -> None:
    with ExitStack() as places:
        chosen = engines.choose("x", classifier(), Settings(engine="eager"), 0.0, places)
    assert chosen.rate > 0 and chosen.line().startswith("eager, fp32, ")
