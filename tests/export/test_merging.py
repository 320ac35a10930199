"""Exports of models that merge tokens: at fixed sizes the engines choose the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export.exports import FORMATS, filled

import vitrail
from vitrail.cli import main
from vitrail.export import export
from vitrail.variants import VariantConfig
from vitrail.vit import ViTConfig

MODEL = VariantConfig(
    width=16, depth=2, heads=2, patch=4, image_size=(16, 20), registers=1, pool="token_average", qk_norm=True
)


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_an_export_merges_as_the_model_does(to: str, tmp_path: Path) -> None:
    filled(vitrail.create(MODEL, classes=5)).save(tmp_path / "m")
    result = export(tmp_path / "m", tmp_path / "out", to, merge=(6, 4))
    assert result.sizes == [(16, 20)] and result.proof.share < 1e-3
    task, again = vitrail.load(tmp_path / "m", merge=(6, 4)), vitrail.load(tmp_path / "out")
    assert again.encoder.config.merge == (6, 4)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 20)
        with torch.inference_mode():
            torch.testing.assert_close(again(images), task(images), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_command_tells_sizes_and_the_cost_of_merging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ViTConfig(width=16, depth=1, heads=2, patch=2, image_size=(8, 8), channels=1)
    filled(vitrail.create(config, classes=10)).save(tmp_path / "m")
    words = ["export", str(tmp_path / "m"), str(tmp_path / "out"), "--to", "pt2", "--merge", "3"]
    assert main([*words, "--data", "digits", "--images", "20", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["sizes"] == [[8, 8]]
    first, cost = row["notes"]
    assert first.startswith("the number of tokens that merge is traced for each size apart: exported for images of 8x8")
    assert cost.startswith("top1 without merging 0.") and "merging changes it by " in cost
    assert vitrail.load(tmp_path / "out").encoder.config.merge == (3,)
    assert main(["predict", "image.png", "--model", str(tmp_path / "out"), "--merge", "2"]) == 2
