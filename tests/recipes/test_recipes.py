"""Every recipe is built and run for a few steps, as its command would, on small images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checked import checked
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.cli import main
from vitrail.data.captions import open_captions
from vitrail.data.sets import Splits
from vitrail.errors import UserError
from vitrail.recipes import RECIPES, from_weights
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.caption import Caption, Captioning, Decoding
from vitrail.tasks.classify import Classes
from vitrail.tasks.encoder import encoder_for
from vitrail.train.build import start
from vitrail.train.folder import RunFolder
from vitrail.train.run import Run, _chosen
from vitrail.vit import ViTConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of sixteen noisy images."""
    root = tmp_path_factory.mktemp("recipes")
    generator = np.random.default_rng(0)
    for name, level in (("dark", 40), ("middle", 120), ("light", 200)):
        (root / name).mkdir()
        for i in range(16):
            values = level + generator.integers(-20, 20, (40, 36 + i, 3))
            Image.fromarray(values.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


HUB = ["caption-zoo", "caption-prefix"]
"""these start from others' weights: test_caption_zoo.py"""
CAPTIONERS = [name for name in RECIPES if name.startswith("caption-") and name not in HUB]


@pytest.fixture(scope="module")
def captioned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, each beside two captions."""
    root = tmp_path_factory.mktemp("captioned")
    for source in sorted(images.rglob("*.png")):
        kind = source.parent.name
        (root / f"{kind}{source.name}").write_bytes(source.read_bytes())
        (root / f"{kind}{source.stem}.txt").write_text(f"a {kind} image\nsomething {kind} and noisy\n")
    return root


SEGMENTERS = ("segment", "segment-whole")
TABLES = ("tag", "finetune-tag", "regress", "finetune-regress")
"""recipes that learn from a table of labels: see tasks/tag and tasks/test_regress_training.py"""
STARTS = {"caption-scst": "caption-vit", "caption-coca": "caption-match", "caption-rerank": "caption-match"}


@pytest.mark.parametrize(
    "name, start", [*((name, STARTS.get(name)) for name in CAPTIONERS), ("caption-scst", "caption-cnn-attention")]
)
def test_captioner_runs_a_few_steps(
    name: str, start: str | None, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocoevalcap", reason="needs pip install 'vitrail[caption]'")
    common = ["--data", str(captioned), "--device", "cpu", "--workers", "0", "--batch-size", "16", "--epochs", "1"]
    if start is not None:
        assert main(["train", start, *common, "--out", str(tmp_path / "start")]) == 0
        common += ["--init", str(tmp_path / "start")]
    assert main(["train", name, *common, "--out", str(tmp_path / "run")]) == 0
    rows = RunFolder(tmp_path / "run").rows()
    assert any(row["kind"] == "val" and 0 <= row["bleu1"] <= 1 for row in rows)
    capsys.readouterr()
    image = next(captioned.glob("*.png"))
    assert main(["predict", str(image), "--model", str(tmp_path / "run"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    first = row["captions"][0]
    assert row["caption"] == first["caption"] == "".join(token["text"] for token in first["tokens"]).strip()
    assert all(0 <= token["p"] <= 1 for token in first["tokens"])


def test_encoders_of_the_ladder_are_about_as_large() -> None:
    rungs = ("caption-cnn-rnn", "caption-cnn-lstm", "caption-cnn-attention", "caption-vit-lstm", "caption-vit")
    sizes = [
        sum(p.numel() for p in encoder_for(RECIPES[name](6000).model).parameters())
        for name in (*rungs, "caption-match", "caption-coca", "encoder-cifar10")
    ]
    assert max(sizes) <= 1.25 * min(sizes)


def loaded(path: Path) -> Caption:
    return checked(Caption, vitrail.load(path))


@pytest.mark.slow
def test_what_a_captioner_has_learned_is_kept(
    captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From matching to the index, each run from the one before, at its size or a larger one."""
    pytest.importorskip("pycocoevalcap", reason="needs pip install 'vitrail[caption]'")
    common = ["--data", str(captioned), "--device", "cpu", "--workers", "0", "--batch-size", "16"]
    small = ["--image-size", "32", "32", "--epochs", "1"]
    assert main(["train", "caption-match", *common, *small, "--out", str(tmp_path / "match")]) == 0
    larger = ["--image-size", "48", "48", "--early-size", "32", "--epochs", "1"]
    coca = ["--init", str(tmp_path / "match"), *larger, "--out", str(tmp_path / "coca")]
    assert main(["train", "caption-coca", *common, *coca]) == 0
    match, larger_images = loaded(tmp_path / "match"), loaded(tmp_path / "coca")
    assert larger_images.tokenizer.fingerprint == match.tokenizer.fingerprint
    assert larger_images.preprocess.size == (48, 48)
    after, learned = (task.get_parameter("decoder.embedding.weight") for task in (larger_images, match))
    near = torch.nn.functional.cosine_similarity(after, learned)
    assert near.median() > 0.9, "the words are those that were learned before"
    scst = ["--init", str(tmp_path / "coca"), "--epochs", "1", "--out", str(tmp_path / "scst")]
    assert main(["train", "caption-scst", *common, *scst]) == 0
    assert loaded(tmp_path / "scst").option.match > 0
    rerank = ["train", "caption-rerank", *common, "--init", str(tmp_path / "scst"), "--out", str(tmp_path / "rerank")]
    capsys.readouterr()
    assert main([*rerank, "--method", "full"]) == 2
    assert "consensus needs the recipe caption-rerank" in capsys.readouterr().err
    assert main(rerank) == 0
    made, before = loaded(tmp_path / "rerank"), loaded(tmp_path / "scst")
    assert made.preprocess.size == before.preprocess.size
    assert made.consensus is not None and made.consensus.sizes["images"] > 30
    theirs = before.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in made.state_dict().items() if name in theirs)
    for options in (["--match", "0", "--consensus", "0"], ["--consensus", "2", "--neighbours", "5"]):
        assert main(["eval", str(tmp_path / "rerank"), "--data", str(captioned), "--device", "cpu", *options]) == 0
    # Self-critical training has no bag-of-words loss. Where it comes back, it begins with how common each word is.
    run = RECIPES["caption-coca"](48)
    run = replace(run, init=str(tmp_path / "scst"), model=replace(run.model, image_size=(48, 48)))
    assert before.bag is None and isinstance(run.task, Captioning)
    run = replace(run, task=Caption.merged(run.task, before))
    task = start(run, Splits(open_captions(captioned).train, None, None), before)
    assert task.get_parameter("bag.linear.bias").max() > -1


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in [*CAPTIONERS, *HUB, *SEGMENTERS, *TABLES]])
def test_recipe_runs_a_few_steps(name: str, images: Path, tmp_path: Path) -> None:
    run = RECIPES[name](48)
    args = ["train", name, "--data", str(images), "--out", str(tmp_path / "run"), "--device", "cpu", "--no-compile"]
    args += ["--epochs", "2", "--workers", "0", "--batch-size", "16"]
    if name == "finetune-b16-384":
        vitrail.create("B/16", classes=7, width=32, depth=2, heads=2, image_size=32).save(tmp_path / "start")
        args += ["--init", str(tmp_path / "start"), "--image-size", "48", "32"]
    elif run.init is not None:  # the package's weights say what the model is
        args += ["--image-size", "16", "16"]
    elif isinstance(run.model, ViTConfig):  # the baselines are small by default
        side = str(2 * run.model.patch)
        args += ["--width", "32", "--depth", "2", "--heads", "2", "--image-size", side, side]
        args += ["--early-size", str(run.model.patch)] if run.early_size else []
    assert main(args) == 0
    rows = RunFolder(tmp_path / "run").rows()
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses and all(0 < loss < 10 for loss in losses)
    model = vitrail.load(tmp_path / "run")
    assert model.classes == ["dark", "light", "middle"]
    assert model.preprocess.channels == run.model.channels
    (answer,) = model.predict([Image.new("RGB", (50, 40), (40, 40, 40))])
    assert sum(label["score"] for label in checked(Classes, answer).labels) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_comes_back_from_its_file(name: str) -> None:
    run = RECIPES[name](1000)
    assert Run.from_dict(json.loads(json.dumps(run.as_dict()))) == run


def test_fingerprints_tell_what_runs_set() -> None:
    run = RECIPES["caption-vit"](1000)
    assert run.fingerprint == RECIPES["caption-vit"](1000).fingerprint == Run.from_dict(run.as_dict()).fingerprint
    assert len({recipe(1000).fingerprint for recipe in RECIPES.values()}) == len(RECIPES)
    assert isinstance(run.task, Captioning)
    deeper = replace(run, task=replace(run.task, decoding=Decoding(beam=4)))
    assert deeper.fingerprint != run.fingerprint
    # A field with its default value is not in it, so one that is added later changes nothing.
    assert "accumulate" not in _chosen(run) and "early_size" in _chosen(run)


def test_the_stem_of_cifar10_quick_holds_at_most_a_fifth_of_the_flops() -> None:
    model = encoder_for(RECIPES["cifar10-quick"](45_000).model).eval()
    images = torch.randn(1, 3, 32, 32)
    counts = []
    for module in (model.get_submodule("patches"), model):
        # Attention as plain products: fused on a CPU it is not counted before torch 2.7.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(images)
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] <= counts[1] / 5


def test_weights_bring_their_architecture_and_a_size_that_suits_them() -> None:
    start = SIZES["micro/4"]  # 32 pixels, patches of 4
    run = from_weights(RECIPES["folder"](200), "classify", start)
    assert (run.model.width, run.model.depth, run.model.image_size) == (start.width, start.depth, (64, 64))
    same = from_weights(RECIPES["cifar10"](200), "classify", start)
    assert same.model.image_size == (32, 32)
    variant = from_weights(RECIPES["folder"](200), "classify", config_for(start, registers=2))
    assert variant.model == config_for(start, registers=2, image_size=(64, 64), drop_path=0.1)


def test_attention_starts_as_trained_models_have_it_in_the_captioners_of_the_ladder() -> None:
    assert RECIPES["caption-vit"](200).attention_init == RECIPES["caption-match"](200).attention_init == "mimetic"
    assert RECIPES["caption-cnn-lstm"](200).attention_init == "xavier", "a CNN has no attention"


@pytest.mark.parametrize(("patch", "early"), [(14, 70), (16, 80), (32, 64)])
def test_weights_of_any_patch_keep_the_quick_steps(patch: int, early: int) -> None:
    start = replace(SIZES["S/16"], patch=patch, image_size=(7 * patch, 7 * patch))
    assert from_weights(RECIPES["caption-vit"](200), "weights", start).early_size == early
    # 24 pixels of this size have room for patches of 14 or 16 pixels, not 32.
    run = from_weights(RECIPES["cifar10-quick"](200), "weights", start)
    assert run.early_size == {14: 14, 16: 16, 32: None}[patch]


def test_quick_steps_keep_the_shape_of_the_images() -> None:
    run = RECIPES["cifar10-quick"](200)
    assert run.early_shape == (24, 24)
    wide = replace(run, model=replace(run.model, image_size=(32, 64)), early_size=16)
    assert wide.early_shape == (16, 32)
    assert replace(run, early_size=None).early_shape is None
    assert replace(run, early_size=32).early_shape is None, "nothing is made larger"


def test_a_baseline_does_not_start_from_a_transformer() -> None:
    with pytest.raises(UserError, match="classify is a Vision Transformer, which cnn-cifar10 does not train"):
        from_weights(RECIPES["cnn-cifar10"](200), "classify", SIZES["micro/4"])


def test_the_folder_recipe_follows_the_number_of_images() -> None:
    small, large = RECIPES["folder"](200), RECIPES["folder"](100_000)
    assert small.epochs > large.epochs and small.model.width < large.model.width
