"""Positions, filters, and the files that `explain` writes."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.data.decode import decode
from vitrail.errors import UserError
from vitrail.explain.attention import attention_maps, rollout
from vitrail.explain.command import explain
from vitrail.explain.explanation import block_for, explanation, in_blocks, spaced
from vitrail.explain.filters import patch_filters
from vitrail.explain.overlay import on_image, tinted
from vitrail.explain.packing import packed
from vitrail.explain.positions import position_similarity
from vitrail.explain.trace import Pool, encoder_of

OF_TOKENS = {"relevance.png", "pca.png", "similarity.png"}
IMAGES = OF_TOKENS | {"rollout.png", "heads.png", "norms.png", "positions.png", "filters.png", "distance.png"}


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
        {"depth": 1},
        pytest.param(
            {"channels": 1, "pool": "average", "class_token": False, "image_size": (6, 12)}, marks=pytest.mark.slow
        ),
        pytest.param({"channels": 5, "registers": 2, "stem": (4,), "depth": 8}, marks=pytest.mark.slow),
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
    written = IMAGES | {"numbers.json", "arrays.npz", "index.html"}
    assert {path.name for path in out.iterdir()} == written == set(result["files"])
    for name in IMAGES:
        with Image.open(out / name) as drawn:
            assert min(drawn.size) > 100
            assert len(set(drawn.convert("L").tobytes())) > 5, f"{name} is empty"
    assert len(result["labels"]) == 3
    assert result["notes"] == []
    numbers = json.loads((out / "numbers.json").read_text())
    config = encoder_of(task).config
    height, width = config.image_size
    grid = [height // 2, width // 2]
    assert numbers["grid"] == grid
    prepared = task.preprocess(decode(source, task.preprocess.channels))[None]
    pool: Pool = "average" if config.pool == "average" else "token"
    heat = rollout(attention_maps(task, prepared), config.prefix_tokens, pool)
    np.testing.assert_allclose(numbers["rollout"], heat.view(*grid), rtol=1e-4)
    assert np.shape(numbers["distance"]) == (config.depth, 4)
    with np.load(out / "arrays.npz") as arrays:
        assert {name: {"shape": list(a.shape), "type": str(a.dtype)} for name, a in arrays.items()} == numbers["arrays"]
        assert arrays["heads"].shape == (config.depth, 4, *grid)
        assert arrays["relevance_outputs"].shape == (3, *grid) == (len(numbers["outputs"]), *grid)
    page = (out / "index.html").read_text()
    assert "&lt;b&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|url\(|@import", page), "it must load nothing"


def test_of_an_image_of_many_patches_only_some_outputs_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    task, shown = vitrail.create("nano/2", classes=["a", "b", "c"]), Image.new("RGB", (9, 9))
    monkeypatch.setattr("vitrail.explain.explanation.ROLLED", 15)  # it has 16
    first = explanation(task, shown).facts["outputs"]
    found = explanation(task, shown, outputs_of_large=1, of_class=first[2])
    assert len(first) == 3 and found.facts["outputs"] == [first[0], first[2]]
    assert found.arrays["relevance_outputs"].shape == (2, 4, 4)
    assert explanation(task, shown, outputs_of_large=2).facts["outputs"] == first[:2]


def test_what_a_model_lacks_is_left_out_and_said() -> None:
    """Without positions there is nothing about them; without a head the answer is a vector."""
    found = explanation(vitrail.create("nano/2", positions="none"), Image.new("L", (30, 20)))
    assert "positions" not in found.arrays and "outputs" not in found.facts
    assert len(found.notes) == 1 and "no positions" in found.notes[0]
    assert len(found.row["embedding"]) == 64


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for source in (tmp_path / "text.png", tmp_path / "missing.png"):
        with pytest.raises(UserError, match=source.name):
            explain(vitrail.create("nano/2", classes=3), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_image_and_the_nearest_of_a_folder(tmp_path: Path) -> None:
    task = vitrail.create("nano/2", classes=["a", "b"], image_size=(8, 12))
    first, dark, broken = image(tmp_path / "first.png"), tmp_path / "dark.png", tmp_path / "broken.png"
    Image.new("RGB", (40, 20)).save(dark)
    broken.write_text("no image")
    same = tmp_path / "same.png"
    same.write_bytes(first.read_bytes())
    found = explanation(task, first, dark, [dark, broken, same])
    assert [Path(row["image"]).name for row in found.facts["nearest"]] == ["same.png", "dark.png"]
    assert found.facts["nearest"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(found.notes) == 1 and "broken.png" in found.notes[0]
    assert found.arrays["similarity_beside"].shape == (24, 24)
    assert found.arrays["pca_beside"].shape == (4, 6, 3)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--beside", "missing.png"], "missing.png"),
        (["--beside", "."], "folder"),
        (["--near", "missing"], "missing"),
        (["--near", "empty"], "empty"),
    ],
)
def test_bad_second_images_are_refused(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    image(Path("a.png"))
    assert main(["explain", "a.png", "--out", "out", *more]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line and not Path("out").exists()


@pytest.mark.slow
def test_the_command_compares_and_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = image(tmp_path / "a.png"), image(tmp_path / "b.png", (30, 20))
    out = tmp_path / "out"
    assert main(["explain", str(first), "--beside", str(second), "--near", str(tmp_path), "--out", str(out)]) == 0
    answer, page = capsys.readouterr().out.splitlines()
    assert answer.startswith(f"{first}: ") and page == str(out / "index.html")
    # The figures are in the page: loaded late, they would only be missing from prints and screenshots.
    assert "<img" in (text := Path(page).read_text()) and 'loading="lazy"' not in text
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers["nearest"][0]["image"] == str(first) and (out / "nearest.png").exists()
    assert numbers["arrays"]["similarity_beside"]["shape"] == [64, 64]


@pytest.mark.parametrize("layers, most", [(1, 6), (6, 6), (7, 6), (12, 6), (32, 6), (12, 2), (3, 12)])
def test_spaced_layers_have_the_first_and_the_last(layers: int, most: int) -> None:
    shown = spaced(layers, most)
    assert shown[0] == 0
    assert shown[-1] == layers - 1
    assert len(set(shown)) == len(shown) == min(layers, most)


def test_spaced_layers_of_a_small_budget() -> None:
    assert spaced(12, 1) == [11]
    assert spaced(12, 0) == []


@pytest.mark.parametrize(
    "values, shape, layers, note",
    [
        (16 * 16 * 4 * 4, (4, 4, 16, 16), [1, 2, 3, 4], ""),
        (16 * 16 * 4 * 4 - 1, (3, 4, 16, 16), [1, 3, 4], ""),
        (16 * 16 * 4, (4, 1, 16, 16), [1, 2, 3, 4], "mean over heads"),
        (16 * 16, (4, 4, 4, 4), [1, 2, 3, 4], ""),  # blocks of 2 x 2 patches
    ],
)
def test_attention_between_patches_keeps_to_its_budget(
    values: int, shape: tuple[int, ...], layers: list[int], note: str
) -> None:
    found = explanation(vitrail.create("nano/2", classes=2), Image.new("RGB", (9, 9)), values=values)
    assert found.facts["attention_layers"] == layers
    assert found.arrays["attention"].shape == shape
    sums = found.arrays["attention"].astype(np.float32).sum(-1)
    assert sums.min() > 0 and sums.max() < 1.01  # the class token has the rest of a row
    assert any(note in own for own in found.notes) == bool(note)


def test_blocks_are_means_or_sums_of_neighbours_also_at_the_edge() -> None:
    values = torch.arange(15.0).expand(2, 15)  # 3 x 5 patches
    assert in_blocks(values, (3, 5), 2)[1].tolist() == pytest.approx([3, 5, 6.5, 10.5, 12.5, 14])
    assert in_blocks(values, (3, 5), 2, total=True)[0].tolist() == pytest.approx([12, 20, 13, 21, 25, 14])
    assert in_blocks(torch.ones(1, 5), (1, 5), 3).tolist() == [[1, 1]]
    assert torch.equal(in_blocks(values, (3, 5), 1), values)
    assert [block_for(n, 4 * 16**2) for n in (1, 16, 17, 64, 65)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "resize, size, frame",
    [
        ("squash", (40, 20), [0, 0, 1, 1]),
        ("crop", (40, 20), [0.25, 0, 0.75, 1]),  # width 40: a square from the middle
        ("letterbox", (40, 20), [0, -0.5, 1, 1.5]),
    ],
)
def test_the_frame_is_where_the_input_lies_in_the_image(resize: Any, size: tuple[int, int], frame: list[float]) -> None:
    task = vitrail.create("nano/2", classes=2, image_size=(8, 8))
    task.preprocess = replace(task.preprocess, resize=resize)
    found = explanation(task, Image.new("RGB", size))
    assert found.facts["frame"] == pytest.approx(frame, abs=1e-5)
    assert found.arrays["image"].shape == (20, 40, 3)


def test_packed_arrays_keep_each_maps_range() -> None:
    values = np.array([[[0.0, 0.5, 1.0], [10.0, 30.0, 20.0]], [[-1.0, -1.0, -1.0], [1e-6, 2e-6, 3e-6]]])
    told = packed(values)
    low, high = (np.frombuffer(base64.b64decode(told[edge]), np.float32).reshape(2, 2, 1) for edge in ("low", "high"))
    data = np.frombuffer(base64.b64decode(told["data"]), np.uint8).reshape(told["shape"])
    np.testing.assert_allclose(low + data / 255 * (high - low), values, rtol=0.01, atol=1e-9)
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert base64.b64decode(packed(pixels)["data"]) == pixels.tobytes() and "low" not in packed(pixels)


def test_all_of_an_explanation_is_plain_data() -> None:
    told = json.loads(json.dumps(explanation(vitrail.create("nano/2", classes=3), Image.new("RGB", (9, 9))).packed()))
    assert told["answer"]["labels"] and told["lens"][-1]["answer"] == told["answer"]
    assert told["arrays"]["attention"]["shape"] == [4, 4, 16, 16]


def test_maps_lie_where_their_patches_are() -> None:
    """A patch of a crop is drawn at its place in the original; what the model does not see is not coloured."""
    heat = torch.zeros(2, 2)
    heat[0, 1] = 1.0
    values, inside = on_image(heat, (8, 16), [0.25, 0, 0.75, 1], smooth=False)
    expected = np.zeros((8, 16))
    expected[:4, 8:12] = 1
    np.testing.assert_array_equal(values * inside, expected)
    assert inside.sum() == 8 * 8
    photo = np.zeros((8, 16, 3), dtype=np.float32)
    shown = tinted(photo, heat, [0.25, 0, 0.75, 1], smooth=False)
    assert np.ptp(shown[:, :4], axis=2).max() < 1e-6, "outside of the input all is grey"
    assert np.ptp(shown[0, 9]) > 0.3 and shown.min() > 0.1, "colourful, and not nearly black on a black photo"


@pytest.mark.parametrize("brightness", [0.0, 0.5, 1.0])
def test_a_stronger_place_is_darker_and_fuller_in_colour(brightness: float) -> None:
    """So maps are read on light and dark pages, and in a grey print, over dark and light photos alike."""
    photo = np.full((4, 64, 3), brightness, dtype=np.float32)
    shown = tinted(photo, torch.linspace(0, 1, 64).expand(4, -1), [0, 0, 1, 1], smooth=False)[0]
    grey = shown @ np.array([0.2126, 0.7152, 0.0722])
    assert np.ptp(shown[0]) < 1e-6, "what does not matter stays as the photo is"
    assert grey[-1] < grey[0] - 0.2 and (np.diff(grey[24:]) < 0).all()
    assert np.ptp(shown[-1]) > 0.3
