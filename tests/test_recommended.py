"""The recommended encoders: each is one that vitrail reads, and the table holds what the libraries say of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vitrail
from vitrail import recommended
from vitrail.cli import main
from vitrail.tasks import TASKS
from vitrail.tasks.encoder import encoder_for
from vitrail.variants import simplest
from vitrail.zoo.hub import is_id

ROOT = Path(__file__).resolve().parent.parent
ENCODERS = recommended.table()["encoders"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that fills the table."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("bench_recommended", ROOT / "bench" / "recommended.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_are_those_of_the_architecture_that_vitrail_builds(name: str, bench: ModuleType) -> None:
    with torch.device("meta"):
        encoder = encoder_for(simplest(bench.config_of(name)))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == ENCODERS[name]["parameters"]


@pytest.mark.parametrize("name", [name for name in ENCODERS if name.startswith("timm/")])
def test_timm_knows_the_name_the_size_and_the_licence(name: str) -> None:
    timm = pytest.importorskip("timm")
    config = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert config is not None and config.hf_hub_id == name
    assert config.license == ENCODERS[name]["licence"].lower() and config.input_size == (3, 224, 224)
    with torch.device("meta"):
        model = timm.create_model(name.removeprefix("timm/").partition(".")[0], num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == ENCODERS[name]["parameters"]


@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith("timm/")])
def test_transformers_builds_the_same_size(name: str, bench: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    kind, values, _ = bench.HUGGING_FACE[name]
    with torch.device("meta"):
        if kind == "clip":
            config: Any = transformers.CLIPVisionConfig(**values, patch_size=32)
            model: Any = transformers.CLIPVisionModelWithProjection(config)
        else:
            model = transformers.Dinov2Model(transformers.Dinov2Config(**values))
    extra = sum(p.numel() for name, p in model.named_parameters() if "mask_token" in name)
    assert sum(p.numel() for p in model.parameters()) - extra == ENCODERS[name]["parameters"]


def test_vitrail_loads_the_smallest_as_timm_saves_it(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = next(iter(ENCODERS))
    model = timm.create_model(name.removeprefix("timm/").partition(".")[0], num_classes=0)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = vitrail.load(tmp_path)
    assert loaded.name == "embed"
    assert sum(parameter.numel() for parameter in loaded.parameters()) == ENCODERS[name]["parameters"]


def test_every_task_has_six_and_its_command_names_them() -> None:
    assert set(recommended.tasks()) <= set(TASKS)
    for task in recommended.tasks():
        found = recommended.choice(task)
        assert len({each.id for each in found.encoders}) == 6
        for each in found.encoders:
            assert is_id(each.source) and each.source in found.command_for(each, "pets")
            assert "DATA" not in found.command_for(each, "pets")
        named = {name for by_images in found.suits.values() for name in by_images.values()}
        assert named <= {each.id for each in found.encoders}
        for by_images in found.suits.values():
            numbers = list(map(int, by_images))
            assert numbers == sorted(numbers) and numbers[0] == 0


@pytest.mark.parametrize(
    "images, gpu, name",
    [
        (200, False, "facebook/dinov2-small"),
        (999, True, "facebook/dinov2-base"),
        (1_000, False, "timm/vit_tiny_patch16_224.augreg_in21k"),
        (50_000, True, "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
    ],
)
def test_which_suits_depends_on_images_and_device(images: int, gpu: bool, name: str) -> None:
    found = recommended.suited("classify", images, gpu)
    assert found is not None and found.id == name


def test_none_suits_a_task_that_is_not_trained_or_a_set_that_needs_none() -> None:
    assert recommended.suited("embed", 100, False) is None and recommended.suited("none", 100, False) is None
    assert recommended.suited("classify", recommended.MANY, True) is None


def test_the_command_prints_rows_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in ("facebook/dinov2-small@ed25f3a", "Apache-2.0", "GB", "vitrail predict IMAGE --model segment", "timm"):
        assert word in text
    assert main(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == recommended.rows()
    assert {row["kind"] for row in rows} == {"encoder", "bundled", "format"}
    assert main(["models", "caption", "--json"]) == 0
    own = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(own) == 6 and {row["task"] for row in own} == {"caption"}


@pytest.mark.parametrize("task", ["tag", "regress"])
def test_tables_of_labels_and_numbers_start_from_what_classification_starts_from(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = recommended.suited(task, 200, False)
    assert found == recommended.suited("classify", 200, False) and found is not None
    command = recommended.choice(task).command_for(found, "t.csv")
    assert command == f"vitrail train finetune-{task} --data t.csv --init {found.source}"
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert f"\n{task}: vitrail train finetune-{task} --data DATA" in text
    assert text.count(found.source) == 4, "the tasks with the same encoders share one list"


def test_an_encoder_without_a_known_commit_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENCODERS["facebook/dinov2-small"], "revision", None)
    assert main(["models", "caption"]) == 0
    assert "DINOv2, unpinned" in capsys.readouterr().out
    assert main(["models", "caption", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["source"] == "facebook/dinov2-small" and row["revision"] is None


def test_listing_them_imports_no_torch() -> None:
    code = "import sys; from vitrail.cli import main; main(['models']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.endswith("False\n")
