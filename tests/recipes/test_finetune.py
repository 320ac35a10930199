"""Fine-tuning through the command: what is chosen, what moves, and one kind of run folder for every method."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import checked
from PIL import Image
from torch import Tensor, nn

import vitrail
from vitrail.cli import main
from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.errors import Stopped
from vitrail.recipes import from_weights
from vitrail.recipes.finetune import FEW, FEW_PER_CLASS, NARROW, choose, finetune, resolve_auto
from vitrail.recipes.folder import folder
from vitrail.report.compare import compare
from vitrail.report.run import read_run
from vitrail.tasks.classify import Classes, Classification, Classify
from vitrail.tasks.classify.knn import Neighbours
from vitrail.tasks.encoder import encoder_of
from vitrail.tasks.task import Task
from vitrail.tasks.values import Features
from vitrail.train import frozen, loop
from vitrail.train.build import build, start
from vitrail.train.folder import RunFolder
from vitrail.train.loaders import evaluation_loader
from vitrail.train.probe import features
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, train_step
from vitrail.train.tune import Tune, tune
from vitrail.vit import ViT, ViTConfig
from vitrail.zoo import change_drop_path

CPU = torch.device("cpu")
METHODS = ("full", "linear", "lora", "last-blocks", "knn")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in brightness: twelve noisy images each to train on, six to test."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, level in (("dark", 40), ("middle", 120), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                values = level + generator.integers(-30, 30, (20, 18 + i, 3))
                Image.fromarray(values.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for seven other classes, with a batch norm whose statistics must not move."""
    path = tmp_path_factory.mktemp("weights") / "start"
    torch.manual_seed(0)
    vitrail.create("nano/2", classes=7, width=16, heads=2, depth=3, image_size=8, stem=(4,)).save(path)
    return path


def command(images: Path, weights: Path, out: Path, *options: str) -> list[str]:
    args = ["train", "finetune", "--data", str(images), "--init", str(weights), "--out", str(out)]
    return [*args, "--device", "cpu", "--workers", "0", "--epochs", "3", "--batch-size", "8", *options]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_one_kind_of_run(
    method: str, images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another size, that is not square, for grey images and other classes."""
    out = tmp_path / "run"
    assert main(command(images, weights, out, "--method", method, "--image-size", "12", "16", "--channels", "1")) == 0
    assert {"recipe.json", "metrics.jsonl", "report.html", "classes.json", "best"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "recipe.json").read_text())["tune"]["method"] == method
    kinds = [row["kind"] for row in RunFolder(out).rows()]
    assert kinds[0] == "start" and kinds[-2:] == ["test", "done"] and {"train", "val"} <= set(kinds)
    counts = read_run(out).images
    assert counts["val"] > 0 and (counts["train"] + counts["val"], counts["test"]) == (36, 18)

    model = vitrail.load(out)
    assert (model.classes, model.preprocess.size, model.preprocess.channels) == (
        ["dark", "light", "middle"],
        (12, 16),
        1,
    )
    assert not [name for name in model.state_dict() if "lora" in name]
    assert checked(Classes, model.predict([Image.new("RGB", (20, 20))])[0]).labels[0]["score"] > 1 / 3
    assert main(["eval", str(out), "--data", str(images), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["count"] == 18
    row = compare([out])[0]
    assert row["test"] == scores["top1"] and row["best_val"] is not None


@pytest.mark.parametrize("recipe", ["finetune", "folder"])
def test_images_of_five_channels_make_a_model_of_five(recipe: str, weights: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, level in (("wet", 40), ("dry", 180)):
        (tmp_path / "fields" / name).mkdir(parents=True)
        for i in range(6):
            values = level + generator.integers(-30, 30, (16, 16, 5))
            np.save(tmp_path / "fields" / name / f"{i}.npy", values.astype(np.uint8))
    small = ["--init", str(weights)] if recipe == "finetune" else ["--width", "24", "--depth", "1", "--stem", "4"]
    args = ["train", recipe, "--data", str(tmp_path / "fields"), "--out", str(tmp_path / "run"), *small]
    assert main([*args, "--image-size", "16", "16", "--epochs", "1", "--workers", "0", "--device", "cpu"]) == 0
    model = vitrail.load(tmp_path / "run")
    assert model.preprocess.channels == 5 == len(model.preprocess.mean)
    (answer,) = model.predict([torch.zeros(5, 20, 20, dtype=torch.uint8)])
    assert checked(Classes, answer).labels


def start_of(weights: Path) -> dict[str, Tensor]:
    return {k: v for k, v in vitrail.load(weights).state_dict().items() if k.startswith("encoder.")}


@pytest.mark.parametrize(
    "method, moves",
    [
        ("linear", ()),
        ("knn", ()),
        ("last-blocks", ("encoder.blocks.1.", "encoder.blocks.2.", "encoder.norm.")),
        ("lora", ("encoder.blocks.",)),
    ],
)
def test_what_is_frozen_stays_bit_equal(
    method: str, moves: tuple[str, ...], images: Path, weights: Path, tmp_path: Path
) -> None:
    # At the checkpoint's own size, since at another the positions are interpolated.
    assert main(command(images, weights, tmp_path / "run", "--method", method, "--image-size", "8", "8")) == 0
    before, after = start_of(weights), vitrail.load(tmp_path / "run").state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert all(name.startswith(moves) for name in moved)
    assert all(any(name.startswith(start) for name in moved) for start in moves)
    if method == "lora":
        assert all(name.endswith("weight") and "norm" not in name for name in moved)
    else:
        assert {name for name in before if moves and name.startswith(moves)} == moved


def test_full_moves_everything_and_early_layers_least(images: Path, weights: Path, tmp_path: Path) -> None:
    assert main(command(images, weights, tmp_path / "run", "--method", "full", "--layer-decay", "0.5")) == 0
    before, after = start_of(weights), vitrail.load(tmp_path / "run").state_dict()
    steps = [
        float((after[name] - before[name]).abs().mean())
        for name in (f"encoder.blocks.{i}.mlp.up.weight" for i in range(3))
    ]
    assert 0 < steps[0] < steps[1] < steps[2]


def test_the_linear_head_is_where_training_it_would_end(images: Path, weights: Path, tmp_path: Path) -> None:
    """Through the whole model, the gradient of loss and penalty vanishes at the head that was solved for."""
    assert main(command(images, weights, tmp_path / "run", "--method", "linear")) == 0
    task = vitrail.load(tmp_path / "run").double()
    assert isinstance(task, Classify)
    run = RunFolder(tmp_path / "run").run()
    components, _ = build(run, open_data(images), CPU)
    rows = [row for row in RunFolder(tmp_path / "run").rows() if "strength" in row]
    strength = min(rows, key=lambda row: row["cross_entropy"])["strength"]
    inputs, labels = zip(*((b["image"], b["label"]) for b in components.train.evaluation()), strict=True)
    std = features(components.task, components.train).vectors.double().std(dim=0, correction=0)
    head = checked(nn.Linear, task.get_submodule("head.linear"))
    loss = F.cross_entropy(task(torch.cat(inputs).double()), torch.cat(labels))
    (loss + strength / 2 * (head.weight * std).square().sum()).backward()
    assert head.weight.grad is not None and head.bias.grad is not None
    assert float((head.weight.grad / std).abs().max()) < 1e-4 and float(head.bias.grad.abs().max()) < 1e-4


def lora_run(weights: Path, images: Path) -> Run:
    run = from_weights(finetune(36), str(weights), encoder_of(vitrail.load(weights)).config)
    optim = replace(run.optim, ema=0.9)
    return replace(run, data=str(images), tune=Tune("lora", lora_rank=2), optim=optim, batch_size=8, workers=0)


def test_a_stopped_lora_run_resumes_to_the_same_bits(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lora_run(weights, images)
    steps = 0

    def interrupted(*args: object) -> AsyncScalars:
        nonlocal steps
        steps += 1
        if steps == 12:  # of 8 in one go, and 8 with a stop in the middle
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)  # type: ignore[arg-type]

    def fit(path: Path, resume: bool = False) -> dict[str, Tensor]:
        components, _ = build(run, open_data(images), CPU)
        folder = RunFolder(path)
        if not resume:
            folder.begin(run, components.task.classes)
        loop.fit(run, components, folder, 8, resume)
        return torch.load(path / "state" / "step-8.pt", weights_only=True)["module"]

    monkeypatch.setattr(loop, "train_step", interrupted)
    whole = fit(tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(tmp_path / "resumed")
    again = fit(tmp_path / "resumed", resume=True)
    assert any("lora_a" in name for name in whole) and whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    saved = [vitrail.load(tmp_path / name / "last").state_dict() for name in ("whole", "resumed")]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())


def test_the_size_of_the_data_chooses() -> None:
    assert choose(FEW_PER_CLASS * 10 - 1, 10)[0] == "linear"
    assert choose(FEW_PER_CLASS * 10, 10)[0] == "lora" == choose(FEW - 1, 10)[0]
    assert choose(FEW, 10)[0] == "full" == choose(10**7, 1000)[0]
    assert choose(FEW - 1, 10, NARROW)[0] == "lora" and choose(FEW - 1, 10, NARROW - 1)[0] == "full"
    assert choose(FEW_PER_CLASS * 10 - 1, 10, NARROW - 1)[0] == "linear"
    assert "243 images, 121 per class" in choose(243, 2)[1]


def test_the_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    run = resolve_auto(finetune(243), 243, 2, {})
    assert run.tune.method == "lora" and run.optim.lr == 5e-4
    [line] = caplog.messages
    assert line.startswith("method lora: 243 images, 121 per class, are enough to adapt the encoder")
    assert line.endswith("; learning rate 0.0005")


@pytest.mark.parametrize("method, lr, decay", [("full", 1e-4, 0.75), ("lora", 5e-4, 1.0), ("last-blocks", 1e-4, 1.0)])
def test_what_is_requested_is_kept(method: str, lr: float, decay: float, caplog: pytest.LogCaptureFixture) -> None:
    run = resolve_auto(finetune(243), 243, 2, {"method": method})
    assert (run.tune.method, run.optim.lr, run.optim.layer_decay) == (method, lr, decay)
    assert resolve_auto(finetune(243), 243, 2, {"method": method, "lr": 0.3}).optim.lr == 0.3
    assert not caplog.messages, "a method that the user chose needs no reason"


def test_a_narrower_model_gets_a_higher_rate_and_a_small_one_moves_as_from_scratch() -> None:
    run = finetune(5000)
    model = checked(ViTConfig, run.model)
    narrower = replace(run, model=replace(model, width=384, heads=6))
    small = replace(run, model=replace(model, width=192, heads=3))
    assert resolve_auto(narrower, 5000, 10, {}).optim.lr == 2 * resolve_auto(run, 5000, 10, {}).optim.lr
    assert resolve_auto(small, 5000, 10, {}).optim == folder(5000).optim
    assert resolve_auto(small, 5000, 10, {"lr": 0.3}).optim.lr == 0.3


@pytest.mark.parametrize("recipe, method, optimizer", [("cifar10-quick", "full", "muon"), ("folder", "full", "muon")])
def test_other_recipes_start_from_weights_with_their_own_rates_and_folder_as_finetune_does(
    recipe: str, method: str, optimizer: str, images: Path, weights: Path, tmp_path: Path
) -> None:
    given, out = ["--data", str(images), "--init", str(weights)], tmp_path / "run"
    options = ["--epochs", "1", "--batch-size", "16", "--image-size", "8", "8", "--device", "cpu", "--workers", "0"]
    assert main(["train", recipe, *given, *options, "--out", str(out), "--drop-path", "0.2"]) == 0
    run = RunFolder(out).run()
    assert (run.tune.method, run.optim.optimizer) == (method, optimizer)
    assert checked(ViT, encoder_of(vitrail.load(out))).config.drop_path == 0.2


def test_a_run_of_knn_is_a_start_too(images: Path, weights: Path, tmp_path: Path) -> None:
    assert main(command(images, weights, tmp_path / "knn", "--method", "knn")) == 0
    known = vitrail.load(tmp_path / "knn")
    assert isinstance(known, Classify) and isinstance(known.head, Neighbours)
    assert known.head.keys.shape == (len(known.head.labels), 16) and known.neighbours == len(known.head.labels)
    assert main(command(images, tmp_path / "knn", tmp_path / "full", "--method", "full")) == 0
    for plain in (vitrail.load(tmp_path / "full"), vitrail.load(tmp_path / "knn", classes=5)):
        assert isinstance(plain, Classify) and plain.neighbours is None and not isinstance(plain.head, Neighbours)


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_a_frozen_encoder_reads_each_image_once(
    method: str, images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(task: Task, loader: Loader, *precision: str) -> Features:
        read.extend(loader.set.keys)
        return features(task, loader, *precision)  # type: ignore[arg-type]

    monkeypatch.setattr(frozen, "features", counted)
    assert main(command(images, weights, tmp_path / "run", "--method", method)) == 0
    assert read and len(read) == len(set(read)), "features are computed once, however many heads are tried on them"


def test_skipping_blocks_in_training_changes_no_weight(weights: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    task, plain = vitrail.load(weights), vitrail.load(weights)
    change_drop_path(task, 0.9)
    assert torch.equal(task.features(images).patches, plain.features(images).patches)
    assert not torch.equal(task.train().features(images).patches, plain.train().features(images).patches)


def test_images_are_prepared_as_the_checkpoint_says_and_a_change_is_logged_once(
    images: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Preprocess((16, 16), "squash", 0.875, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    task = vitrail.load(weights)
    task.preprocess = own
    task.save(tmp_path / "start")
    run = replace(lora_run(tmp_path / "start", images), tune=Tune())
    splits = open_data(images)
    assert start(run, splits).preprocess == own and not caplog.messages
    assert start(replace(run, interpolation="bicubic", resize="squash"), splits).preprocess.interpolation == "bicubic"
    [line] = caplog.messages
    assert line.startswith("interpolation bicubic differs from") and "accuracy may be lower" in line


def test_the_same_classes_in_another_order_start_a_new_head_and_say_so(
    images: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = open_data(images)
    task = vitrail.load(weights).with_classes(splits.train.classes[::-1])
    task.save(tmp_path / "start")
    run = replace(lora_run(tmp_path / "start", images), tune=Tune())
    assert start(run, splits).classes == splits.train.classes
    assert "start has these classes in another order, so the head starts with new values" in caplog.text


@pytest.mark.parametrize("hidden", [None, 6])
def test_a_fresh_head_starts_low_for_the_sigmoid_loss_and_a_learned_one_stays(
    hidden: int | None, images: Path, weights: Path, tmp_path: Path
) -> None:
    run = replace(lora_run(weights, images), task=Classification(loss="sigmoid", hidden=hidden))
    splits = open_data(images)
    fresh = start(run, splits)
    bias = fresh.get_parameter("head.linear.bias")
    assert bias.tolist() == pytest.approx([-math.log(3)] * 3)
    bias.data = torch.tensor([1.0, 2.0, 3.0])
    fresh.save(tmp_path / "learned")
    again = start(replace(run, init=str(tmp_path / "learned")), splits)
    assert again.get_parameter("head.linear.bias").tolist() == [1.0, 2.0, 3.0] and again.loss_kind == "sigmoid"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--crop-fraction", "3"], "--crop-fraction must be above 0 and at most 1"),
        (["--width", "32"], "--width is fixed by the weights of"),
        (["--registers", "2"], "--registers is fixed by the weights of"),
        (["--no-qkv-bias"], "--no-qkv-bias is fixed by the weights of"),
        (["--attention-init", "mimetic"], "--attention-init is fixed by the weights of"),
        (["--init", "classfy"], "did you mean classify?"),
        (["--init", "nowhere/to/be/found.safetensors"], "no model 'nowhere/to/be/found.safetensors'"),
        (["--mean", "0.5"], "need 3 numbers, one per channel"),
        (["--method", "lroa"], "--method cannot be 'lroa': did you mean lora?"),
        (["--method", "prompts"], "choose from auto, full, frozen, linear, lora, last-blocks, knn"),
        (["--method", "last-blocks", "--last-blocks", "9"], "the encoder has 3 blocks"),
        (["--method", "linear", "--loss", "sigmoid"], "method linear does not use --loss"),
        (["--lora-rank", "0"], "must be at least 1"),
        (["--weighted"], "both compensate for rare classes: add --no-balanced or --no-weighted"),
    ],
)
def test_wrong_options_get_one_line(
    options: list[str],
    message: str,
    images: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(images, weights, tmp_path / "run", *options)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        (
            ["--method", "linear", "--lr", "0.1", "--no-flip", "--smoothing", "0", "--compile"],
            "--smoothing, --flip, --lr",
        ),
        (["--method", "knn", "--last-blocks", "1", "--ema", "0.9"], "--ema, --last-blocks"),
        (["--method", "lora", "--lora-rank", "2", "--last-blocks", "1", "--lr", "1e-4"], "--last-blocks"),
        (["--method", "last-blocks", "--lora-alpha", "8", "--last-blocks", "1"], "--lora-alpha"),
    ],
)
def test_options_that_a_method_makes_no_use_of_are_named(
    options: list[str],
    named: str,
    images: Path,
    weights: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(command(images, weights, tmp_path / "run", *options)) == 0
    also = {"linear": ", --epochs, --compile", "knn": ", --epochs"}.get(options[1], "")
    assert f"method {options[1]} does not use {named}{also}" in caplog.messages


def test_a_method_without_weights_is_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "folder", "--data", str(images), "--method", "lora", "--out", str(tmp_path / "run")]
    assert main(args) == 2
    assert "name them with --init" in capsys.readouterr().err


def test_lora_needs_blocks() -> None:
    from vitrail.baselines import CNNConfig
    from vitrail.tasks.encoder import encoder_for

    config = CNNConfig()
    task = Classify(
        encoder_for(config),
        ["a", "b"],
        vitrail.create("nano/2").preprocess,
    )
    with pytest.raises(vitrail.errors.UserError, match="needs an encoder of blocks"):
        tune(task, Tune("lora"))


def test_eval_scores_an_encoder_without_a_head(
    images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vitrail.load(weights, classes=0).save(tmp_path / "encoder")
    assert main(["eval", str(tmp_path / "encoder"), "--data", str(images), "--json", "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["split"] == "test" and scores["count"] == 18 and "top1" not in scores
    assert scores["knn_top1"] > 0.6 and scores["linear_top1"] > 0.6
    assert main(["eval", str(tmp_path / "encoder"), "--data", str(images), "--split", "train"]) == 2
    assert "learn from the training split" in capsys.readouterr().err
    # Without other splits, those to score and to choose the penalty on are cut off the training split.
    scored = []
    for options in ([], ["--split", "val"]):
        assert main(["eval", str(tmp_path / "encoder"), "--data", str(images / "train"), "--json", *options]) == 0
        scored.append(json.loads(capsys.readouterr().out))
    assert scored[0]["split"] == "val" and scored[1] == scored[0]


def test_eval_probes_a_model_with_a_head_too(
    images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["eval", str(weights), "--data", str(images), "--probe", "--json"]) == 0
    assert "top1" not in json.loads(capsys.readouterr().out)
    assert "only the model's features are scored: the data has 3 classes and the model 7" in caplog.text
    vitrail.load(weights, classes=["dark", "light", "middle"]).save(tmp_path / "same")
    assert main(["eval", str(tmp_path / "same"), "--data", str(images), "--probe", "--json"]) == 0
    assert {"top1", "knn_top1", "linear_top1"} <= json.loads(capsys.readouterr().out).keys()


def test_eval_of_a_model_that_knows_fewer_classes_gets_one_line(
    images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vitrail.load(weights, classes=["dark", "light"]).save(tmp_path / "two")
    assert main(["eval", str(tmp_path / "two"), "--data", str(images)]) == 2
    said = capsys.readouterr().err
    assert "the model does not know 'middle'" in said and said.count("\n") == 1


def test_without_data_a_recipe_for_anyones_images_asks_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "folder"]) == 2 == main(["train", "finetune"])
    assert capsys.readouterr().err.count("no data: give --data") == 2


def test_without_data_a_recipe_for_a_set_that_is_not_here_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITRAIL_DATA", raising=False)
    assert main(["train", "vit-s16-90"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "vitrail: no data: vit-s16-90 is for imagenet, which vitrail does not download: give --data its folder, or "
        "another set\n"
    )


def test_features_do_not_depend_on_how_they_are_batched(images: Path, weights: Path) -> None:
    task = vitrail.load(weights, classes=0)
    train = open_data(images).train
    whole, few = (evaluation_loader(task, train, CPU) for _ in range(2))
    few.batch_size = 5
    torch.testing.assert_close(features(task, whole).vectors, features(task, few).vectors, rtol=1e-4, atol=1e-5)
