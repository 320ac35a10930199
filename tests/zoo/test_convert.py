"""`vitrail convert`: there and back, the certificate, and preprocessing that travels with the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import checked
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitrail
from vitrail.cli import main
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.tasks.classify import Classes, Classify
from vitrail.tasks.task import Task
from vitrail.zoo import convert, huggingface, load_certified

PREPARED = Preprocess((16, 16), "crop", 0.8, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
NAMES = ["Hund", "a cat, or two", "犬"]


def small(classes: list[str] | None = NAMES, **changes: Any) -> Task:
    torch.manual_seed(0)
    values = {"width": 32, "depth": 2, "heads": 2, "patch": 4, "image_size": 16, "activation": "gelu_tanh"}
    model = vitrail.create("nano/2", classes, preprocess=PREPARED, **{**values, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


MODELS: dict[str, dict[str, Any]] = {
    "classifier": {},
    "encoder": {"classes": None},
    "mean of the patches": {"class_token": False, "pool": "average"},
    "attention pooling": {"class_token": False, "pool": "attention", "classes": None},
    "registers": {"registers": 4, "layer_scale": 0.1, "classes": None, "activation": "gelu"},
    "distilled": {"pool": "distilled", "distillation": True, "activation": "gelu"},
}
GOES = {
    "classifier": ("timm", "hf", "google"),
    "encoder": ("timm", "hf", "google"),
    "mean of the patches": ("timm", "hf", "google"),
    "attention pooling": ("timm", "hf", "google"),
    "registers": ("hf",),
    "distilled": ("timm", "hf"),
}


@pytest.mark.parametrize("name, to", [(name, to) for name, targets in GOES.items() for to in targets])
def test_there_and_back_to_the_same_bits_and_outputs(name: str, to: str, tmp_path: Path) -> None:
    model = small(**MODELS[name])
    model.save(tmp_path / "own")
    certificate = convert(tmp_path / "own", tmp_path / "out", to, verify=True)
    assert certificate.written is not None
    library = {"timm": "timm", "hf": "transformers"}.get(to)
    if library is not None:
        pytest.importorskip(library)
        assert max(d.relative for d in certificate.written.differences.values()) < 1e-5
    again = convert(tmp_path / "out", tmp_path / "back", verify=True)
    assert again.task == model.name
    back = vitrail.load(tmp_path / "back")
    bits = back.state_dict()
    assert bits.keys() == model.state_dict().keys()
    assert all(torch.equal(bits[key], value) for key, value in model.state_dict().items())
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(back(images), model(images), atol=1e-5)
    if to != "google":  # an .npz holds weights alone
        assert back.preprocess == model.preprocess and back.classes == model.classes


def test_the_command_tells_what_became_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small().save(tmp_path / "own")
    out = tmp_path / "hf"
    assert main(["convert", str(tmp_path / "own"), str(out), "--to", "hf", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["to"] == "hf" and row["written"] is None and row["preprocess"]["mean"] == [0.1, 0.2, 0.3]
    weights = load_file(out / "model.safetensors")
    save_file({**weights, "vit.embeddings.mask_token": torch.zeros(1, 1, 32)}, out / "model.safetensors")
    assert main(["convert", str(out), str(tmp_path / "timm"), "--to", "timm"]) == 0
    said = capsys.readouterr().out
    assert "Hugging Face vit (ViTForImageClassification)" in said and "joined" in said and "renamed" in said
    assert "16x16, crop, crop 0.8, bilinear, mean 0.1 0.2 0.3, std 0.4 0.5 0.6" in said
    assert "left out    vit.embeddings.mask_token: replaces masked patches" in said
    assert "not compared (--verify does)" in said and said.endswith(f"written to {tmp_path / 'timm'} (timm)\n")
    used = {name for weight in load_certified(out)[1].as_row()["weights"] for name in weight["from"]}
    assert used == weights.keys()


def test_load_verify_says_what_it_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small().save(tmp_path / "own")
    vitrail.load(tmp_path / "own", classes=5, image_size=(16, 24), channels=4, verify=True)
    for words in (
        "adapted from 3 to 4 channels",
        "interpolated from 16x16 pixels to 16x24",
        "a new head for 5 classes",
    ):
        assert caplog.text.count(words) == 1


def test_outputs_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason is: such a conversion is not to be used."""
    pytest.importorskip("transformers")
    small().save(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "hf", "hf")
    make = huggingface.reference

    def other(files: Any) -> Any:
        theirs = make(files)
        assert theirs is not None
        return lambda images: {name: value * 1.001 for name, value in theirs(images).items()}

    monkeypatch.setattr(huggingface, "reference", other)
    with pytest.raises(UserError, match="differ by 1.0e-03 .* do not use this conversion") as caught:
        vitrail.load(tmp_path / "hf", verify=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, to, reason",
    [
        ({"stem": (8, 16)}, "hf", "stem"),
        ({"stem": (8, 16)}, "google", "stem"),
        ({"stem": (8, 16)}, "timm", "stem"),
        ({"norm_eps": 1e-5}, "google", "norm_eps=1e-05"),
        ({"activation": "gelu"}, "google", "activation='gelu'"),
        ({"registers": 2}, "google", "registers=2"),
        ({"qk_norm": True}, "hf", "qk_norm"),
        ({"rotary": "axial"}, "google", "rotary='axial'"),
    ],
)
def test_what_a_target_cannot_express_is_refused_by_its_name(
    changes: dict[str, Any], to: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(**changes).save(tmp_path / "own")
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to", to]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_other_tasks_stay_ours(tmp_path: Path) -> None:
    model = small()
    Classify(model.encoder, NAMES, model.preprocess, neighbours=4).save(tmp_path / "own")
    for to in ("timm", "hf", "google"):
        with pytest.raises(UserError, match="cannot store this model of the task 'classify'"):
            convert(tmp_path / "own", tmp_path / "out", to)
    assert convert(tmp_path / "own", tmp_path / "out").task == "classify"


@pytest.mark.parametrize("to", ["vitrail", "timm", "hf"])
def test_preprocessing_and_names_travel_through_the_commands(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    model.save(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "out", to)
    folder = tmp_path / "images"
    colours = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    for name, pair in zip(NAMES, colours, strict=True):
        (folder / name).mkdir(parents=True)
        for i, colour in enumerate(pair):
            image(colour).save(folder / name / f"{i}.png")
    capsys.readouterr()
    assert main(["predict", str(folder), "--model", str(tmp_path / "out"), "--json", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = model.predict([Image.open(row["image"]) for row in rows])
    for row, answer in zip(rows, wanted, strict=True):
        assert [label["label"] for label in row["labels"]] == [
            label["label"] for label in checked(Classes, answer).labels
        ]
        assert row["labels"][0]["score"] == pytest.approx(checked(Classes, answer).labels[0]["score"], abs=1e-4)
    assert main(["eval", str(tmp_path / "out"), "--data", str(folder), "--json", "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    right = sum(row["labels"][0]["label"] == Path(row["image"]).parent.name for row in rows)
    assert scores["top1"] == pytest.approx(right / len(rows)) and scores["count"] == 6


def image(colour: Tensor) -> Image.Image:
    """A coloured slope, wider than high, so that resizing and cropping matter."""
    slope = torch.linspace(0, 1, 40)[None, :, None] * torch.linspace(0.2, 1, 24)[:, None, None]
    return Image.fromarray((slope * colour * 255).to(torch.uint8).numpy())


def test_scores_of_each_class_for_itself_travel(tmp_path: Path) -> None:
    model = small()
    assert isinstance(model, Classify)
    model.loss_kind = "sigmoid"
    model.save(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "hf", "hf")
    answers = [task.predict([image(torch.ones(3))])[0] for task in (model, vitrail.load(tmp_path / "hf"))]
    wanted, found = (checked(Classes, answer).labels for answer in answers)
    assert [label["score"] for label in found] == pytest.approx([label["score"] for label in wanted], abs=1e-4)
    assert sum(label["score"] for label in found) != pytest.approx(1, abs=0.01)


def test_sizes_that_are_no_square_and_other_channels_travel(tmp_path: Path) -> None:
    prepared = replace(PREPARED, size=(16, 24), channels=4, mean=(0.5,) * 4, std=(0.25,) * 4, resize="squash")
    torch.manual_seed(0)
    model = vitrail.create(
        "nano/2", NAMES, preprocess=prepared, patch=4, image_size=(16, 24), channels=4, activation="gelu"
    )
    model.save(tmp_path / "own")
    for to in ("timm", "hf", "vitrail"):
        convert(tmp_path / "own", tmp_path / to, to)
        back = vitrail.load(tmp_path / to)
        assert back.preprocess == prepared and back.classes == NAMES


def test_defaults_that_stand_in_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small().save(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "hf", "hf")
    (tmp_path / "hf" / "preprocessor_config.json").unlink()
    for _ in range(2):
        assert vitrail.load(tmp_path / "hf").preprocess.mean == (0.5, 0.5, 0.5)
    assert caplog.text.count("no preprocessor_config.json") == 1


def test_a_place_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    small().save(tmp_path / "own")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for to in ("vitrail", "hf", "timm"):
        with pytest.raises(UserError, match="exists and is not empty: choose another name"):
            convert(tmp_path / "own", tmp_path / "mine", to)
    (tmp_path / "note.txt").write_text("dear")
    for to in ("vitrail", "hf", "timm", "google"):
        with pytest.raises(UserError, match="note.txt exists: choose another name"):
            convert(tmp_path / "own", tmp_path / "note.txt", to)
    before = (tmp_path / "own" / "config.json").read_bytes()
    with pytest.raises(UserError, match="own exists and is not empty: choose another name"):
        convert(tmp_path / "own", tmp_path / "own")  # not even a checkpoint is overwritten
    assert (tmp_path / "own" / "config.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("layout", ["vitrail", "timm", "hf"])
def test_loading_imports_no_more_than_a_model_needs(layout: str, tmp_path: Path) -> None:
    """Each of these takes from half a second to two, which `vitrail.load` in a small program would wait for."""
    vitrail.create("nano/2", classes=3, norm_eps=1e-12 if layout == "hf" else 1e-6).save(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "model", layout)
    code = (
        "import sys, vitrail; vitrail.load(sys.argv[1]); "
        "print(sorted({'torchvision', 'matplotlib', 'transformers', 'torch._dynamo'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
