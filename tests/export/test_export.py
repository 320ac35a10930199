"""Exports against the models that they are made from: numbers, answers, and what they refuse."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from export.exports import FORMATS, an_image, exported, filled
from PIL import Image
from task_examples import EXAMPLES

import vitrail
from vitrail import cli
from vitrail.errors import RunError, UserError
from vitrail.export import Traced, export, meta_of, trace_all, write_programs
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig
from vitrail.zoo.exports import FORMAT

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "patch": 4, "image_size": (12, 16)}
"""of the variants"""


def rows(task: Task, images: list[Image.Image]) -> list[dict[str, Any]]:
    return [answer.row() for answer in task.predict(images)]


def assert_same_rows(found: Any, expected: Any) -> None:
    """Equal words and numbers of things; scores within 1e-4."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-3)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same_rows(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_rows(one, other)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier, and its export for any size as pt2, which needs no extra."""
    folder = tmp_path_factory.mktemp("small")
    out, _ = exported(filled(vitrail.create("nano/2", classes=["a", "b", "c"])), folder, "pt2")
    return folder / "source", out


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind, example", [(kind, example) for kind, each in EXAMPLES.items() for example in each])
def test_every_task_predicts_the_same_rows(kind: str, example: str, to: str, tmp_path: Path) -> None:
    task = filled(EXAMPLES[kind][example]())
    out, result = exported(task, tmp_path, to)
    assert result.proof.share < 1e-3 and result.proof.compared == 9 and not result.sizes
    again = vitrail.load(out)
    assert type(again).__name__ == f"Exported{type(task).__name__}" and isinstance(again, type(task))
    assert again.classes == task.classes and again.preprocess == task.preprocess
    images = [an_image(seed) for seed in range(3)]
    assert_same_rows(rows(again, images), rows(task, images))


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "changes",
    [
        {"registers": 3, "resampling": "offset", "rotary": "centred", "rotary_pairs": "halves"},
        {"positions": "sine", "rotary": "mixed", "pool": "attention", "mlp": "gated", "layer_scale": 0.5},
        {"resampling": "bicubic_corners", "distillation": True, "pool": "distilled", "norm": "rms"},
        {
            "window": 2,
            "global_blocks": (1,),
            "class_token": False,
            "pool": "average",
            "neck": 8,
            "relative": "decomposed",
        },
        {"stem": (8, 16), "stem_blocks": 1, "qk_norm": True, "arrangement": "post", "kv_heads": (1, 2)},
        {
            "differential": True,
            "floor_grid": True,
            "image_size": (13, 18),
            "arrangement": "parallel",
            "activation": "quick_gelu",
        },
        {"arrangement": "joint", "rotary": "axial", "rotary_reference": (3, 3), "attention_norm": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_variants_at_any_size(changes: dict[str, Any], to: str, tmp_path: Path) -> None:
    task = filled(vitrail.create(VariantConfig(**{**SMALL, **changes}), classes=5))
    out, result = exported(task, tmp_path, to)
    assert not result.sizes and result.proof.share < 1e-3
    images = [an_image(seed) for seed in range(2)]
    assert_same_rows(rows(vitrail.load(out), images), rows(task, images))


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_tables_of_relative_positions_are_for_the_listed_sizes(to: str, tmp_path: Path) -> None:
    task = filled(vitrail.create(VariantConfig(**SMALL, relative="both"), classes=3))
    out, result = exported(task, tmp_path, to, sizes=[(12, 16), (20, 12)])
    assert result.sizes == [(12, 16), (20, 12)] and result.proof.share < 1e-3 and result.proof.compared == 6
    again = vitrail.load(out)
    images = torch.randn(3, 3, 20, 12)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), task(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="is an export for images of 12x16, 20x12, got 16x16"):
        again(torch.randn(1, 3, 16, 16))


def test_an_export_answers_as_its_model(small: tuple[Path, Path]) -> None:
    task, again = vitrail.load(small[0]), vitrail.load(small[1])
    images = [an_image(seed) for seed in range(5)]
    assert_same_rows(rows(again, images), rows(task, images))
    for shape in ((1, 3, 4, 4), (7, 3, 10, 22)):
        with torch.inference_mode():
            torch.testing.assert_close(again(torch.ones(shape)), task(torch.ones(shape)), atol=1e-4, rtol=1e-4)


def test_an_export_carries_its_preprocessing_and_classes(small: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(small[1] / "model.pt2") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("vitrail.json")]
        meta = json.loads(archive.read(name))
    assert meta["config"]["classes"] == ["a", "b", "c"] and meta["version"] == vitrail.__version__
    assert meta["config"]["preprocess"] == vitrail.load(small[0]).preprocess.as_dict()
    assert vitrail.load(small[1] / "model.pt2").classes == ["a", "b", "c"]  # the file alone is enough


def test_scores_kept_beside_an_export_do_not_hide_it(small: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(small[1], tmp_path / "out")
    (out / "scores.json").write_text("{}")
    assert vitrail.load(out).classes == ["a", "b", "c"]
    (out / "config.json").write_text("{}")  # a checkpoint of another library may have a graph beside it
    with pytest.raises(UserError, match="holds no checkpoint"):
        vitrail.load(out)


def test_an_export_is_scored(small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate("abc" * 2):
        (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
        an_image(i).save(tmp_path / "test" / name / f"{i}.png")
    found = []
    for source in small:
        assert cli.main(["eval", str(source), "--data", str(tmp_path), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["confusion"] == found[1]["confusion"] and found[0]["count"] == 6
    assert found[1]["cross_entropy"] == pytest.approx(found[0]["cross_entropy"], abs=1e-4)


def test_images_that_the_scores_leave_out_are_named(
    small: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i, name in enumerate("abc" * 40):
        (tmp_path / "data" / "test" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (2 * i, 0, 0)).save(tmp_path / "data" / "test" / name / f"{i}.png")
    (tmp_path / "data" / "test" / "a" / "broken.png").write_bytes(b"broken")
    found = export(small[0], tmp_path / "out", "pt2", data=str(tmp_path / "data"))
    assert found.scores is not None and found.scores.images == 120
    assert "broken.png" in caplog.text


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ["export", "classify", "{out}", "--to", "tflite"],
            "no format 'tflite' that an engine here runs: choose",
        ),
        (["export", "classify", "{out}", "--to", "pt2", "--precision", "fp4"], "no precision 'fp4'"),
        (["export", "classify", "{out}", "--to", "onnx", "--precision", "bf16"], "choose --to pt2 or openvino"),
        (["export", "classify", "{out}", "--to", "pt2", "--precision", "int8"], "choose --to onnx or openvino"),
        (["export", "classify", "{out}", "--to", "pt2", "--sizes", "33"], "33x33 does not divide into 4 pixels"),
        (["export", "classify", "{out}", "--to", "pt2", "--sizes", "32y32"], "'32y32' is not a size"),
        (
            ["export", "classify", "{out}", "--to", "onnx", "--precision", "int8", "--data", "digits", "--sizes", "64"],
            "int8 is calibrated at the model's own size: list 32x32 alone, or leave out --sizes",
        ),
        (
            ["export", "classify", "{out}", "--to", "pt2", "--split", "val"],
            "--split and --images choose what is scored: name the data set with --data",
        ),
        (["export", "classify", "{out}", "--to", "pt2", "--images", "9"], "name the data set with --data"),
        (
            ["export", "classify", "{out}", "--to", "pt2", "--data", "digits", "--images", "0"],
            "--images must be at least 1, got 0",
        ),
        (["export", "{export}", "{out}", "--to", "pt2"], "is an export itself: give the checkpoint"),
        (["convert", "{export}", "{out}"], "is an export, which predicts and is scored but has no weights"),
        (["explain", "{image}", "--model", "{export}", "--out", "{out}"], "is an export, which predicts"),
        (["predict", "{image}", "--model", "{export}", "--verify"], "is an export, which cannot be changed"),
        (
            ["train", "folder", "--data", "digits", "--init", "{export}", "--out", "{out}"],
            "is an export, which predicts",
        ),
    ],
)
def test_what_is_refused(
    command: list[str],
    message: str,
    small: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    an_image(0).save(image := tmp_path / "image.png")
    names = {"export": small[1], "out": tmp_path / "out", "image": image}
    assert cli.main([word.format(**names) for word in command]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_export_does_not_take(small: tuple[Path, Path]) -> None:
    again = vitrail.load(small[1])
    for height, width in ((8, 9), (2, 8)):
        with pytest.raises(UserError, match=f"multiples of 2 from 4 pixels on, got {height}x{width}"):
            again(torch.ones(1, 3, height, width))
    with pytest.raises(UserError, match="check the channels"):
        again(torch.ones(1, 1, 8, 8))


def test_workers_that_prepare_images_get_no_engine(small: tuple[Path, Path]) -> None:
    again = vitrail.load(small[1])
    copy = pickle.loads(pickle.dumps(again))
    assert type(copy) is type(vitrail.load(small[0]))
    assert torch.equal(copy.prepare(an_image(0)).images, again.prepare(an_image(0)).images)


def test_no_weights_to_change(small: tuple[Path, Path], tmp_path: Path) -> None:
    again = vitrail.load(small[1])
    for use in (lambda: again.save(tmp_path / "x"), lambda: again.features(torch.ones(1, 3, 8, 8))):
        with pytest.raises(UserError, match="is an export"):
            use()
    with pytest.raises(UserError, match="cannot be changed"):
        vitrail.load(small[1], classes=5)
    assert not (tmp_path / "x").exists()


def changed(source: Path, folder: Path, change: Any) -> Path:
    """A copy of a pt2 file, with each entry as `change(name, bytes)` has it."""
    copy = folder / source.name
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return copy


def test_files_that_are_damaged_or_foreign(small: tuple[Path, Path], tmp_path: Path) -> None:
    source = small[1] / "model.pt2"

    def newer(name: str, content: bytes) -> bytes:
        if not name.endswith("vitrail.json"):
            return content
        return json.dumps({**json.loads(content), "export": FORMAT + 1, "version": "9.9"}).encode()

    with pytest.raises(UserError, match="written by vitrail 9.9, a newer release than this one: upgrade vitrail"):
        vitrail.load(changed(source, tmp_path, newer))
    (tmp_path / "model.pt2").write_bytes(source.read_bytes()[:10_000])
    with pytest.raises(UserError, match="truncated or damaged"):
        vitrail.load(tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("other/models/model.json", "{}")
    with pytest.raises(UserError, match="other.pt2 is not an export of vitrail"):
        vitrail.load(tmp_path / "other.pt2")


def test_the_file_of_one_program_may_have_any_name(small: tuple[Path, Path], tmp_path: Path) -> None:
    renamed = Path(shutil.copy(small[1] / "model.pt2", tmp_path / "phone.pt2"))
    images = [an_image(seed) for seed in range(2)]
    for source in (renamed, tmp_path):
        assert_same_rows(rows(vitrail.load(source), images), rows(vitrail.load(small[0]), images))
    shutil.copy(small[1] / "model.pt2", tmp_path / "tablet.pt2")
    with pytest.raises(UserError, match=r"holds phone.pt2 and tablet.pt2, of two exports: give one of these files"):
        vitrail.load(tmp_path)
    assert vitrail.load(tmp_path / "tablet.pt2").classes == ["a", "b", "c"]


def test_data_that_cannot_be_scored_are_refused_before_the_work(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vitrail.export.trace_sizes")
    for name in ("bird", "fish"):
        (tmp_path / "data" / name).mkdir(parents=True)
        an_image(1).save(tmp_path / "data" / name / "1.png")
    with pytest.raises(UserError, match="the model does not know 'bird'"):
        export(small[0], tmp_path / "out", "pt2", data=str(tmp_path / "data"))


@pytest.mark.slow
def test_files_of_two_models_with_one_config_are_not_mixed(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        (folder := tmp_path / str(seed)).mkdir()
        task, sizes = filled(vitrail.create("nano/2", classes=["a", "b"])), [(8, 8), (8, 12)]
        traced: Traced = {size: trace_all(task, size, 2, torch.float32) for size in sizes}
        write_programs(folder, meta_of(task, "pt2", "fp32", sizes, traced), traced)
        folders.append(folder)
    assert vitrail.load(folders[0]).classes == ["a", "b"]
    shutil.copy(folders[0] / "model-8x12.pt2", folders[1])
    with pytest.raises(UserError, match=r"model-8x(8|12).pt2 belongs to another export than the files beside it"):
        vitrail.load(folders[1])
    (folders[0] / "model-8x12.pt2").rename(folders[0] / "wide.pt2")
    with pytest.raises(UserError, match=r"model-8x12.pt2 is missing, .*: copy the whole folder and keep its names"):
        vitrail.load(folders[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": []}, "config has the type list"),
        ({"precision": 8}, "precision has the type int"),
        ({"files": {"tokenizer.json": 1}}, "files are not texts by plain names"),
        ({"files": {"../x": ""}}, "files are not texts by plain names"),
        ({"multiple": 0}, "multiple is not a number from 1 to"),
        ({"multiple": True}, "multiple is not a number from 1 to"),
        ({"sizes": [8]}, "sizes are not heights and widths"),
        ({"sizes": [[8, "8"]]}, "sizes are not heights and widths"),
        ({"sizes": {}}, "sizes are not heights and widths"),
        ({"programs": {}}, "it has no programs"),
        ({"programs": {"model": 3}}, "programs are not inputs and outputs by plain names"),
        ({"programs": {"../model": {"inputs": ["images"], "outputs": ["output"]}}}, "programs are not inputs and"),
        ({"programs": {"model": {"inputs": ["images"], "outputs": [1]}}}, "programs are not inputs and outputs"),
        ({"more": 1}, "its fields are not config, files"),
        ({"config": {}}, "does not describe a model"),
        ({"config": {"vitrail": 1, "task": "classify", "preprocess": {"size": "x"}}}, "does not describe a model"),
    ],
)
def test_metadata_that_is_none(changes: dict[str, Any], message: str, small: tuple[Path, Path], tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return json.dumps({**json.loads(content), **changes}).encode() if name.endswith("vitrail.json") else content

    with pytest.raises(UserError, match=message) as caught:
        vitrail.load(changed(small[1] / "model.pt2", tmp_path, change))
    assert "\n" not in str(caught.value)


def test_an_export_without_the_program_of_its_task(small: tuple[Path, Path], tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("vitrail.json"):
            return content
        found = json.loads(content)
        return json.dumps({**found, "programs": {"other": found["programs"]["model"]}}).encode()

    other = changed(small[1] / "model.pt2", tmp_path, change)
    with pytest.raises(UserError, match="lacks a program of this task"):
        vitrail.load(other.rename(tmp_path / "other.pt2"))


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"torch.ops.aten.addmm.default", b"torch.os.system", "calls torch.os.system"),
        (b"torch.ops.aten.linear.default", b"torch.os.system", "calls torch.os.system"),
        (b'"expr_str": "', b'"expr_str": "__import__(\'os\').getcwd() + ', "has the expression"),
    ],
)
def test_a_program_that_would_run_anything_is_refused(
    old: bytes, new: bytes, message: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    hit = []

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("models/model.json"):
            hit.append(content.count(old))
            return content.replace(old, new)
        return content

    bad = changed(small[1] / "model.pt2", tmp_path, change)
    if not sum(hit):
        pytest.skip(f"this release of PyTorch does not write {old.decode()}")
    with pytest.raises(UserError, match=message):
        vitrail.load(bad)


def test_an_export_that_differs_is_not_kept(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.export.TOLERANCE", -1.0)
    with pytest.raises(RunError, match=r"differs from the model by .* nothing is kept"):
        export(small[0], tmp_path / "out", "pt2", sizes=[(8, 8)])
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_traced_is_named(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())

    monkeypatch.setattr("vitrail.vit.MLP.forward", forward)
    with pytest.raises(UserError, match=r"encoder.blocks.0.mlp cannot be exported: .*data-dependent"):
        export(small[0], tmp_path / "out", "pt2", sizes=[(8, 8)])
