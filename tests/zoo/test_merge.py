"""Token merging as a change at load: the weights stay, and what cannot merge says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from task_examples import EXAMPLES
from torch import Tensor

import vitrail
from vitrail.baselines import CNNConfig
from vitrail.errors import UserError
from vitrail.explain.attention import attention_maps
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig, VariantViT, as_variant
from vitrail.vit import ViT, ViTConfig
from vitrail.zoo import change_merge, convert
from vitrail.zoo.assemble import task_around

CONFIG: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "image_size": (16, 16)}


def saved(path: Path, **changes: Any) -> Task:
    torch.manual_seed(0)
    model = vitrail.create(VariantConfig(**CONFIG, **changes), classes=["cat", "dog"]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save(path)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_model_merges_with_the_same_weights_and_back(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain")
    merging = vitrail.load(tmp_path / "plain", merge=4)
    assert merging.encoder.config.merged == (4, 4) and not merging.training
    for name, value in plain.state_dict().items():
        assert torch.equal(merging.state_dict()[name], value)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in merging.parameters())
    assert not torch.allclose(merging(images()), plain(images()))
    assert torch.equal(vitrail.load(tmp_path / "plain", merge=(4, 4))(images()), merging(images()))
    merging.save(tmp_path / "merging")
    assert torch.equal(vitrail.load(tmp_path / "merging")(images()), merging(images()))
    for path in ("plain", "merging"):
        again = vitrail.load(tmp_path / path, merge=0)
        assert as_variant(again.encoder.config) == plain.encoder.config
        assert torch.equal(again(images()), plain(images()))


def test_a_plain_vit_becomes_a_variant_that_merges_and_back() -> None:
    task = vitrail.create(ViTConfig(**CONFIG), classes=2).eval()
    expected = task.features(images())
    change_merge(task, 2)
    assert type(task.encoder) is VariantViT
    change_merge(task, [0])
    assert type(task.encoder) is ViT
    assert torch.equal(task.features(images()).patches, expected.patches)


@pytest.mark.parametrize("kind, example", [(kind, example) for kind, each in EXAMPLES.items() for example in each])
def test_every_task_answers_with_an_encoder_that_merges(kind: str, example: str) -> None:
    task = EXAMPLES[kind][example]()
    if not isinstance(task.encoder, ViT):
        with pytest.raises(UserError, match="has no tokens that merge|has no encoder"):
            change_merge(task, 2)
        return
    change_merge(task, 2)
    height, width = task.preprocess.size
    tokens = task.features(torch.randn(2, task.preprocess.channels, height, width))
    patch = task.encoder.config.patch
    assert tokens.grid == (height // patch, width // patch)
    assert tokens.patches.shape[1] == tokens.grid[0] * tokens.grid[1]
    if not task.headless:
        pixels = torch.randint(0, 256, (task.preprocess.channels, height, width), dtype=torch.uint8)
        assert len(task.predict([pixels])) == 1


def test_what_cannot_merge_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "rotary", rotary="axial")
    with pytest.raises(UserError, match="cannot merge, since its rotary positions"):
        vitrail.load(tmp_path / "rotary", merge=2)
    assert vitrail.load(tmp_path / "rotary", merge=0).encoder.config.rotary == "axial"
    model = vitrail.create("nano/2", classes=2)
    cnn = task_around(encoder_for(CNNConfig()), model.preprocess, ["a", "b"])
    with pytest.raises(UserError, match="the CNN of task classify has no tokens that merge: leave out merge"):
        change_merge(cnn, 2)
    model = saved(tmp_path / "m")
    with pytest.raises(UserError, match="merge needs one number for all blocks, or one for each of 2: got 3"):
        vitrail.load(tmp_path / "m", merge=(1, 2, 3))
    change_merge(model, 2)
    with pytest.raises(UserError, match="this model merges tokens, so its attention is not between patches"):
        attention_maps(model, images())


@pytest.mark.parametrize("to", ["timm", "hf", "google"])
def test_no_other_library_stores_that_tokens_merge(to: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "m")
    change_merge(model, 2)
    model.save(tmp_path / "merging")
    with pytest.raises(UserError, match="merge"):
        convert(tmp_path / "merging", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
