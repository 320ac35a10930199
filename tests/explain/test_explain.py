"""Positions, filters, and the images and numbers that `explain` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.data.decode import decode
from vitrail.errors import UserError
from vitrail.explain import attention_maps, explain, patch_filters, position_similarity, rollout
from vitrail.explain.attention import Pool, encoder_of
from vitrail.explain.figures import shown_layers

IMAGES = {"rollout.png", "heads.png", "positions.png", "filters.png", "distance.png"}


def image(path: Path, size: tuple[int, int] = (20, 30)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("positions", ["learned", "sine"])
def test_similarity_is_one_with_itself_and_symmetric(positions: str) -> None:
    encoder = encoder_of(vitrail.create("nano/2", classes=2, positions=positions, image_size=(6, 10)))
    similarity = position_similarity(encoder)
    assert similarity.shape == (15, 3, 5)
    flat = similarity.flatten(1)
    torch.testing.assert_close(flat.diagonal(), torch.ones(15))
    torch.testing.assert_close(flat, flat.T)
    vectors = encoder.positions_for((3, 5))[0, 1:]
    torch.testing.assert_close(flat[2, 7], torch.cosine_similarity(vectors[2], vectors[7], dim=0))


def test_no_positions_to_compare() -> None:
    with pytest.raises(UserError, match="no positions"):
        position_similarity(encoder_of(vitrail.create("nano/2", classes=2, positions="none")))


def test_filters_find_the_components_that_were_put_in() -> None:
    encoder = encoder_of(vitrail.create("nano/2", classes=2))
    strong, weak = torch.linalg.qr(torch.randn(12, 2)).Q.T
    mix = torch.randn(64, 2)
    mix = torch.linalg.qr(mix - mix.mean(0)).Q  # two patterns, mixed without correlation
    with torch.no_grad():
        encoder.patches.projection.weight.copy_((5 * mix[:, :1] * strong + mix[:, 1:] * weak).view(64, 3, 2, 2) + 1)
    filters = patch_filters(encoder, 2)
    assert filters.shape == (2, 3, 2, 2)
    for found, put in zip(filters.flatten(1), (strong, weak), strict=True):
        assert abs(float(found @ put)) == pytest.approx(1, abs=1e-4)
        assert found.max() == found.abs().max()


def test_filters_are_few_for_small_patches_and_of_the_stem_where_there_is_one() -> None:
    assert patch_filters(encoder_of(vitrail.create("nano/2", classes=2, channels=1))).shape == (4, 1, 2, 2)
    encoder = encoder_of(vitrail.create("nano/2", classes=2, stem=(5, 8)))
    first = encoder.get_parameter("patches.stem.layers.0.weight")
    filters = patch_filters(encoder)
    assert torch.equal(filters, first)
    assert not filters.requires_grad
    filters.zero_()
    assert first.any(), "the model's own weights must not be handed out"


@pytest.mark.parametrize(("backbone", "layers"), [("resnetv2", (1,)), ("resnet", (1,)), ("conv", (5, 8))])
def test_filters_of_a_hybrid_are_those_that_see_the_pixels(backbone: str, layers: tuple[int, ...]) -> None:
    changes: dict[str, Any] = {"backbone": backbone, "backbone_layers": layers}
    encoder = encoder_of(vitrail.create("nano/2", classes=2, patch=8, image_size=(16, 16), **changes))
    first = next(module for module in encoder.patches.modules() if isinstance(module, torch.nn.Conv2d))
    assert first.in_channels == 3
    assert torch.equal(patch_filters(encoder, 4), first.weight[:4])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": 1, "pool": "average", "class_token": False, "image_size": (6, 12)},
        {"channels": 5, "registers": 2, "stem": (4,), "depth": 8},
    ],
)
def test_explain_writes_images_and_numbers(tmp_path: Path, changes: dict[str, Any]) -> None:
    task = vitrail.create("nano/2", classes=["a $x^2 & <b>", "_b", "猫"], **changes)
    source = tmp_path / "image.npy" if changes.get("channels") == 5 else tmp_path / "image.png"
    if source.suffix == ".npy":
        np.save(source, np.random.default_rng(0).integers(0, 255, (5, 20, 30), dtype=np.uint8))
    else:
        image(source)
    out = tmp_path / "out"
    result = explain(task, source, out)
    assert {path.name for path in out.iterdir()} == IMAGES | {"numbers.json", "index.html"} == set(result["files"])
    for name in IMAGES:
        with Image.open(out / name) as drawn:
            assert min(drawn.size) > 100
            assert len(set(drawn.convert("L").tobytes())) > 5, f"{name} is empty"
    assert len(result["labels"]) == 3
    assert result["notes"] == []
    numbers = json.loads((out / "numbers.json").read_text())
    config = encoder_of(task).config
    height, width = config.image_size
    assert numbers["grid"] == [height // 2, width // 2]
    prepared = task.preprocess(decode(source, task.preprocess.channels))[None]
    pool: Pool = "average" if config.pool == "average" else "token"
    heat = rollout(attention_maps(task, prepared), config.prefix_tokens, pool)
    np.testing.assert_allclose(numbers["rollout"], heat.view(height // 2, width // 2), rtol=1e-4)
    assert np.shape(numbers["attention_distance"]) == (config.depth, 4)
    assert all(np.shape(maps) == (4, height // 2, width // 2) for maps in numbers["heads"].values())
    assert "&lt;b&gt;" in (out / "index.html").read_text()


def test_what_a_model_lacks_is_left_out_and_said(tmp_path: Path) -> None:
    """Without positions there is no figure of them; without a head the answer is a vector."""
    image = Image.new("L", (30, 20))
    result = explain(vitrail.create("nano/2", positions="none"), image, tmp_path / "out")
    assert not (tmp_path / "out" / "positions.png").exists()
    assert "no positions" in result["notes"][0]
    assert "no positions" in (tmp_path / "out" / "index.html").read_text()
    assert len(result["embedding"]) == 64 and "labels" not in result


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for source in (tmp_path / "text.png", tmp_path / "missing.png"):
        with pytest.raises(UserError, match=source.name):
            explain(vitrail.create("nano/2", classes=3), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [1, 6, 7, 12, 32])
def test_shown_layers_have_the_first_and_the_last(layers: int) -> None:
    shown = shown_layers(layers)
    assert shown[0] == 0
    assert shown[-1] == layers - 1
    assert len(set(shown)) == len(shown) == min(layers, 6)
