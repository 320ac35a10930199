"""The speed of an export beside others: what is told, and engines that cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vitrail
from vitrail.errors import UserError
from vitrail.export import speed
from vitrail.export.scores import Scores
from vitrail.export.speed import Speed, Timed, card, measure


def told(*rows: Timed, left_out: list[str] | None = None) -> Speed:
    return Speed(list(rows), left_out or [], 2)


def test_each_line_compares_with_the_model_itself() -> None:
    found = told(
        Timed("model", 1, "PyTorch", 12.0, 83.333),
        Timed("model", 1, "onnx int8", 4.0, 250.0),
        Timed("step", 8, "PyTorch", 1.5, 5333.3),
        left_out=["openvino is left out of the comparison: this needs the package openvino"],
    )
    assert found.text().splitlines() == [
        "batch 1: PyTorch 12 ms, 83.3 images/s; onnx int8 4 ms, 250 images/s (3 times as fast)",
        "step, batch 8: PyTorch 1.5 ms, 5.33e+03 images/s",
        "openvino is left out of the comparison: this needs the package openvino",
    ]


def test_every_program_runs_at_each_batch_and_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    task = vitrail.create("nano/2", classes=3).eval()
    seen: list[int] = []

    def engine(images: torch.Tensor) -> None:
        seen.append(len(images))

    def broken(images: torch.Tensor) -> None:
        raise ValueError("no kernel\nfor this")

    def missing(device: torch.device) -> None:
        raise UserError("install g++")

    monkeypatch.setattr(speed, "ready_to_compile", missing)
    found = measure(task, {"a": {"model": engine}, "b": {"model": broken}}, (8, 8), compiled=True)
    assert [(row.program, row.batch, row.engine) for row in found.rows] == [
        ("model", batch, name) for batch in speed.BATCHES for name in ("PyTorch", "a")
    ]
    calls = speed.WARM_UP + 1 + speed.MIN_CALLS
    assert seen == [batch for batch in speed.BATCHES for _ in range(calls)]
    assert found.left_out == [
        "PyTorch compiled is left out of the comparison: install g++",
        "b is left out of the comparison: no kernel",
    ]


def test_the_card_has_the_facts_the_notes_and_the_speed() -> None:
    text = card("Export of x", {"format": "onnx, int8"}, told(Timed("model", 1, "PyTorch", 12.0, 83.3)), ["a note"])
    assert text.startswith("# Export of x\n") and "| format | onnx, int8 |" in text and "\na note\n" in text
    assert "with 2 threads" in text and text.endswith("| model | 1 | PyTorch | 12 | 83.3 |\n")


@pytest.mark.parametrize(
    "model, export, lost, warns",
    [(0.86, 0.846, 0.014, True), (0.86, 0.8551, 0.0049, False), (0.86, 0.9, -0.04, False), (9.0, 9.04, 0.04, False)],
)
def test_a_loss_of_half_a_point_is_told(model: float, export: float, lost: float, warns: bool) -> None:
    text = Scores("top1", "test", 2_000, model, export, lost).text()
    assert ("which is more than 0.005: try another format, or --precision fp32" in text) == warns
    assert text.startswith(f"top1 on 2000 images of test: model {model:.4f}, export {export:.4f} (")


def test_an_export_has_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.export import export

    monkeypatch.setattr(speed, "SECONDS", 0.0)
    vitrail.create("nano/2", classes=3).save(tmp_path / "source")
    result = export(tmp_path / "source", tmp_path / "out", "pt2", sizes=[(12, 8)])
    text = (tmp_path / "out" / "CARD.md").read_text()
    assert text.startswith("# Export of source\n") and "| images | 8x8, 12x8 |" in text and str(tmp_path) not in text
    assert result.proof.compared == 6 and result.proof.text() in text
    row: dict[str, Any] = result.as_row()
    assert [each["engine"] for each in row["speed"]] == ["PyTorch", "pt2 fp32"] * len(speed.BATCHES)
