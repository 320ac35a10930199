"""Every hook of the contract, by small tasks that are trained, scored, saved, loaded and used as any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from PIL import Image
from torch import Tensor

import vitrail
from vitrail import recipes, tasks
from vitrail.baselines import CNNConfig
from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Labels
from vitrail.errors import UserError
from vitrail.plain import flat_fields
from vitrail.report import write_report
from vitrail.sizes import SIZES
from vitrail.start import score
from vitrail.tasks.classify import Classes, Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.tasks.values import Settings
from vitrail.train.build import build
from vitrail.train.folder import RunFolder
from vitrail.train.loaders import evaluation_loader
from vitrail.train.loop import Components, fit
from vitrail.train.probe import features
from vitrail.train.run import Run, with_fields
from vitrail.train.unused import USED_WITH, warn_unused
from vitrail.variants import VariantConfig

CPU = torch.device("cpu")
KINDS: dict[str, type[toys.Toy]] = {
    "dense": toys.Dense,
    "teacher": toys.Teacher,
    "twins": toys.Twins,
    "locate": toys.Locate,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys are tasks like any other: a line of `TASKS` each, and nothing else."""
    import sys

    monkeypatch.setitem(sys.modules, "toys", toys)
    for name, kind in KINDS.items():
        monkeypatch.setitem(tasks.TASKS, name, f"toys:{kind.__name__}")


def halves(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Images of odd sizes with a dark and a light half, and their masks."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        height, width = torch.randint(9, 40, (2,), generator=generator).tolist()
        mask = torch.zeros(height, width, dtype=torch.uint8)
        (mask[:, width // 2 :] if i % 2 else mask[height // 2 :])[:] = 1
        noise = torch.randint(0, 40, (3, height, width), generator=generator)
        found.append(((mask[None] * 180 + noise).to(torch.uint8), mask))
    return found


def splits(kind: type[Task]) -> Splits:
    if kind.target is toys.Rectangles:
        return toys.Rectangles.open("rectangles")
    images = halves()
    keys = [str(i) for i in range(len(images))]
    target: Any = Labels(torch.arange(len(images)) % 2, ["wide", "high"])
    if kind.target is Masks:
        target = Masks([mask for _, mask in images], keys, ["dark", "light"])
    whole = ImageSet("halves", keys, [image for image, _ in images], target)
    return Splits(whole.subset(range(8)), whole.subset([8, 9]), whole.subset([10, 11]))


def run_of(settings: Settings, **changes: Any) -> Run:
    run = Run(recipe="toy", data="halves", task=settings, model=SIZES["nano/2"], epochs=3, batch_size=4, workers=0)
    return replace(run, augment=Augment(crop="resized", scale=(0.5, 1.0), flip=True), **changes)


def trained(kind: type[toys.Toy], path: Path, **changes: Any) -> tuple[Components, dict[str, Any], RunFolder]:
    run = run_of(kind.settings(), **changes)
    components, steps = build(run, splits(kind), CPU)
    folder = RunFolder(path / "run")
    with folder.new():
        folder.begin(run, components.task.classes)
        scores = fit(run, components, folder, steps)
    return components, scores, folder


@pytest.mark.parametrize("name", KINDS)
def test_a_task_of_one_file_trains_scores_saves_loads_and_reports(name: str, tmp_path: Path) -> None:
    components, scores, folder = trained(KINDS[name], tmp_path)
    rule = KINDS[name].score
    assert rule is not None and scores["split"] == "test" and scores[rule.name] is not None
    values = [row[rule.name] for row in folder.rows() if row["kind"] == "val"]
    assert len(values) == 3
    loaded = vitrail.load(folder.path)
    assert type(loaded).__name__ == KINDS[name].__name__
    best = max(values) if rule.best == "max" else min(values)
    kept = loaded.evaluate(components.loaders, "val")
    assert kept[rule.name] == pytest.approx(best, abs=1e-5), "the checkpoint is the best one by the task's own score"
    page = write_report(folder.path).read_text()
    assert rule.text(best) in page
    assert ("light and dark" in page) == (name == "dense")


def test_views_reach_the_loss_and_the_teacher_follows_each_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    components, _, _ = trained(toys.Teacher, tmp_path)
    task = components.task
    assert isinstance(task, toys.Teacher) and task.updates == [(step, 6) for step in range(6)]
    batch = next(components.train.batches())
    assert [tuple(view.shape) for view in batch["views"]] == [(4, 3, 8, 8)] * 2 + [(4, 3, 4, 4)] * 2
    assert all(not value.requires_grad for value in task.teacher.parameters())


@pytest.mark.parametrize("name", ["dense", "teacher", "locate"])
def test_micro_batches_add_up_to_the_batch_for_masks_and_views(name: str) -> None:
    kind = KINDS[name]
    components, _ = build(run_of(kind.settings()), splits(kind), CPU)
    batch, task = next(components.train.batches()), components.task.eval()
    whole = task.loss(batch)
    for count in (2, 4):
        pieces = [task.loss(piece) for piece in kind.target.split(batch, count)]
        assert len(pieces) == count
        for entry, value in whole.items():
            assert sum(float(piece[entry]) for piece in pieces) == pytest.approx(float(value), rel=1e-5)


def test_lower_resolution_at_first_is_for_one_view_per_sample_and_masks_follow(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="early_size"):
        build(run_of(toys.Teacher.settings(), early_size=4), splits(toys.Teacher), CPU)
    sizes = []

    class Watched(toys.Dense):
        def loss(self, batch: Any, gather: Any = None) -> dict[str, Tensor]:
            sizes.append((*batch["image"].shape[-2:], *batch["mask"].shape[-2:]))
            return super().loss(batch, gather)

    run = run_of(toys.DenseSettings(), early_size=4, early=0.5)
    components, steps = build(run, splits(toys.Dense), CPU)
    components.task.__class__ = Watched
    folder = RunFolder(tmp_path / "run")
    with folder.new():
        folder.begin(run, components.task.classes)
        fit(run, components, folder, steps)
    assert sizes == [(4, 4, 4, 4)] * 3 + [(8, 8, 8, 8)] * 3


def test_a_task_that_scores_in_its_own_way_is_scored_on_the_command_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, scores, folder = trained(toys.Teacher, tmp_path)
    monkeypatch.setattr(toys.Teacher.target, "open", lambda *args, **kwargs: splits(toys.Teacher))
    name, again = score(vitrail.load(folder.path), str(folder.path), "halves", "test")
    assert name == "test" and again["distance"] == pytest.approx(scores["distance"], abs=1e-5)


class Flipped(Classify):
    """Sees an image and its mirror image, and does not merge their outputs."""

    def frames(self, image: Any) -> Any:
        return super().frames(image).with_flips()

    def outputs_for(self, batch: Any) -> Any:
        return Task.outputs_for(self, batch)

    def answer(self, batch: Any) -> list[Any]:
        return [Classes([], 1) for _ in batch["image"]]


def test_several_frames_need_an_answer_that_merges_them() -> None:
    task = Flipped(encoder_for(SIZES["nano/2"]), ["wide", "high"], Preprocess(size=(8, 8)))
    loader = evaluation_loader(task, splits(toys.Linear).train, CPU)
    with pytest.raises(ValueError, match="8 answers for 4 images"):
        task.predict([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 4)
    with pytest.raises(ValueError, match="16 frames of 8 images"):
        task.evaluate({"val": loader}, "val")
    with pytest.raises(UserError, match="features are those of one frame per image"):
        features(task, loader, "fp32")


def test_training_images_are_evaluated_as_others_are() -> None:
    """By tiles and flips where the task sees these, and whole where training cuts random crops."""
    components, _ = build(run_of(toys.DenseSettings()), splits(toys.Dense), CPU)
    task, images = components.task, splits(toys.Dense).train
    batch = next(components.loaders["train"].evaluation())
    assert torch.equal(
        batch["image"],
        task.preprocess.normalise(torch.cat([task.prepare(images.open(i)).images for i in batch["sample"].tolist()])),
    )


def test_images_in_memory_for_crops_are_evaluated_as_streamed_ones() -> None:
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    data = ImageSet("noise", list("abcdef"), pixels, Labels(torch.arange(6) % 2, ["a", "b"]))
    way = Preprocess(size=(8, 8), crop_fraction=0.5)
    for memory in (True, False):
        how: Any = {"batch_size": 6, "seed": 0, "train": True, "augment": Augment(crop="resized"), "memory": memory}
        (batch,) = Loader(data, way, **how).evaluation()
        assert torch.equal(batch["image"], torch.stack([way(image) for image in pixels]))


def test_a_mask_of_another_size_is_named_also_where_the_task_prepares_images_itself() -> None:
    images = halves()
    masks = Masks([mask for _, mask in images[:3]] + [torch.zeros(5, 7, dtype=torch.uint8)], list("abcd"), ["x", "y"])
    four = ImageSet("halves", list("abcd"), [image for image, _ in images[:4]], masks)
    loader = evaluation_loader(toys.Dense(), four, CPU, max_bad=1.0)
    assert sum(len(batch["truth"]) for batch in loader.evaluation()) == 3 and list(loader.bad) == [3]


def test_a_task_prepares_its_own_images_in_training_too(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []

    def prepared(task: toys.Dense, image: Any, augment: Any = None, draw: Any = None) -> Any:
        draws.append(draw)
        return Task.prepare(task, image, augment, draw)

    monkeypatch.setattr(toys.Dense, "prepare", prepared)
    components, _ = build(run_of(toys.DenseSettings()), splits(toys.Dense), CPU)
    batch = next(components.train.batches())
    assert [draw[:2] for draw in draws] == [(0, 0)] * 4 and batch["image"].shape == (4, 3, 8, 8)


def test_a_loss_of_the_whole_batch_refuses_accumulation_and_takes_what_is_gathered() -> None:
    with pytest.raises(UserError, match="whole batch"):
        build(run_of(toys.MatchSettings(), accumulate=2), splits(toys.Twins), CPU)
    components, _ = build(run_of(toys.MatchSettings()), splits(toys.Twins), CPU)
    batch = next(components.train.batches())
    others = torch.nn.functional.normalize(torch.randn(5, 64), dim=1)
    alone = components.task.eval().loss(batch)
    joined = components.task.loss(batch, gather=lambda own: torch.cat([own, others]))
    assert float(joined["loss"]) > float(alone["loss"]), "more images to be told from"


def test_masks_follow_their_images_in_training_and_refuse_what_no_affine_follows() -> None:
    components, _ = build(run_of(toys.DenseSettings()), splits(toys.Dense), CPU)
    batch = next(components.train.batches())
    light = batch["image"].mean(dim=1) > 0
    seen = batch["mask"] != 255
    assert seen.any() and float((light == batch["mask"].bool())[seen].double().mean()) > 0.85
    for augment in (Augment(mixup=0.5), Augment(policy="randaugment")):
        with pytest.raises(UserError, match="masks"):
            build(replace(run_of(toys.DenseSettings()), augment=augment), splits(toys.Dense), CPU)


def test_a_dense_answer_has_the_size_of_the_original_in_predict_and_in_the_score() -> None:
    components, _ = build(run_of(toys.DenseSettings()), splits(toys.Dense), CPU)
    task = components.task
    for image, mask in halves():
        (answer,) = task.predict([image])
        assert isinstance(answer, toys.Segments) and answer.mask.shape == mask.shape
        assert float((answer.mask == mask).double().mean()) > 0.9
        assert answer.draw(Image.fromarray(image.permute(1, 2, 0).numpy())).size == (image.shape[2], image.shape[1])
    together = task.predict([image for image, _ in halves()])
    alone = [task.predict([image])[0] for image, _ in halves()]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, toys.Segments) and isinstance(other, toys.Segments)
        assert torch.equal(one.mask, other.mask)
    scores = task.evaluate(components.loaders, "val")
    right = [(task.predict([image])[0].mask == mask) for image, mask in halves()[8:10]]  # type: ignore[attr-defined]
    assert scores["pixel_accuracy"] == sum(int(r.sum()) for r in right) / sum(r.numel() for r in right)
    assert scores["count"] == 2


@pytest.mark.parametrize("crop", ["resized", "jitter"])
def test_boxes_follow_their_images_in_training_and_back_in_answers(crop: Any) -> None:
    augment = Augment(crop=crop, scale=(0.5, 1.0), jitter=(0.6, 1.6), flip=True)
    run = replace(run_of(toys.LocateSettings()), augment=augment, model=replace(SIZES["nano/2"], image_size=(32, 24)))
    components, _ = build(run, splits(toys.Locate), CPU)
    task, batch = components.task, next(components.train.batches())
    assert batch["box"].shape == (4, 2, 4) and bool((batch["box_class"] == -1).any()), "padded to two boxes"
    loss = task.loss(batch)
    assert 0 < int(loss["count"]) <= 8 and float(loss["loss"] / loss["count"]) < 0.04, "about a pixel"
    val = components.loaders["val"].set
    found = task.predict([val.image(i, 3) for i in range(len(val))])
    for answer, boxes in zip(found, toys.Rectangles.of(val).boxes, strict=True):
        assert isinstance(answer, toys.Found)
        assert answer.labels == ["red", "green"] and float((answer.boxes - boxes).abs().max()) < 3
    scores = task.evaluate(components.loaders, "val")
    assert scores["mean_iou"] > 0.8 and scores["count"] == 2


def test_options_change_how_a_task_prepares() -> None:
    task = toys.Dense()
    image = torch.zeros(3, 8, 40, dtype=torch.uint8)
    few = len(task.prepare(image).images)
    task.choose({"overlap": 0.75})
    assert len(task.prepare(image).images) > few
    with pytest.raises(UserError, match="--top is not an option of this model's task, dense"):
        task.choose({"top": 3})


def test_boxes_come_back_in_pixels_of_the_original_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toys.Locate(preprocess=Preprocess((24, 24))).save(tmp_path / "model")
    canvas = Image.new("RGB", (90, 30))
    canvas.paste((255, 0, 0), (30, 6, 75, 24))
    canvas.save(tmp_path / "a.png")
    assert command("predict", tmp_path / "a.png", "--model", tmp_path / "model", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["boxes"]
    assert found["label"] == "red" and found["box"] == pytest.approx([30, 6, 75, 24], abs=4)  # a pixel of the input


@pytest.mark.parametrize("suffix", [".jsonl", "", ".csv"])
def test_the_command_line_needs_to_know_no_task(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitrail.cli import main

    toys.Dense().save(tmp_path / "model")
    for i, (image, _) in enumerate(halves(2)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    inputs, out = [str(tmp_path / f"{i}.png") for i in range(2)], tmp_path / f"out{suffix}"
    assert main(["predict", *inputs, "--model", str(tmp_path / "model"), "--overlap", "0.5", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["task"] for row in rows] == ["dense", "dense"] and all("segments" in row for row in rows)
    assert main(["predict", *inputs, "--model", str(tmp_path / "model"), "--out", str(out)]) == 0
    assert out.exists() and (suffix or len(list(out.rglob("*.png"))) == 2)


@pytest.mark.parametrize(
    ("classes", "width", "kept"),
    [
        (["wide", "high"], 4, {"hidden.weight", "hidden.bias", "head.weight", "head.bias"}),
        (["wide", "high"], 5, {"head.bias"}),
        (["high", "wide"], 4, set()),  # as many classes, whose outputs mean something else
    ],
)
def test_a_task_that_starts_from_its_own_kind_keeps_what_fits(
    classes: list[str], width: int, kept: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = splits(toys.Linear)
    loaded = toys.Linear(encoder_for(SIZES["nano/2"]), classes, width)
    task = toys.Linear.adopt(toys.LinearSettings(), loaded, data, loaded.preprocess)
    own, theirs = task.state_dict(), loaded.state_dict()
    same = {name for name in own if own[name].shape == theirs[name].shape and torch.equal(own[name], theirs[name])}
    assert same == kept | {name for name in own if name.startswith("encoder.")}
    assert task.classes == ["wide", "high"]
    assert ("head.weight and 2 more start with new values" in caplog.text) == (width == 5)


def test_a_task_that_starts_from_another_kind_keeps_the_encoder() -> None:
    data, loaded = splits(toys.Linear), vitrail.create("nano/2", classes=["wide", "high"])
    task = toys.Linear.adopt(toys.LinearSettings(), loaded, data, loaded.preprocess)
    assert task.encoder is loaded.encoder


# Hooks that name something: each decides what the commands say.


def command(*arguments: Any) -> int:
    from vitrail.cli import main

    return main([str(argument) for argument in arguments])


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of `Locate`, for the command line."""
    run = replace(run_of(toys.LocateSettings()), recipe="locate", data="rectangles", epochs=1)
    monkeypatch.setitem(recipes.RECIPES, "locate", lambda images: run)
    return "locate"


def test_settings_in_the_weights_are_fixed_and_free_ones_may_change(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", recipe, "--data", "rectangles", "--out", tmp_path / "first") == 0
    start = ("train", recipe, "--data", "rectangles", "--init", tmp_path / "first")
    assert command(*start, "--weight", "2", "--out", tmp_path / "second") == 0
    assert RunFolder(tmp_path / "second").run().task == toys.LocateSettings(weight=2.0)
    capsys.readouterr()
    assert command(*start, "--slots", "2", "--out", tmp_path / "third") == 2
    said = capsys.readouterr().err
    assert "slots" in said and said.count("\n") == 1 and not (tmp_path / "third").exists()


def test_a_method_without_a_use_for_a_setting_says_so(caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(toys.LocateSettings())
    warn_unused(run, replace(run, task=toys.LocateSettings(weight=3.0)), "linear")
    assert "method linear does not use --weight" in caplog.text
    caplog.clear()
    warn_unused(run, replace(run, task=toys.LocateSettings(slots=2)), "linear")
    warn_unused(run, replace(run, task=toys.LocateSettings(weight=3.0)), "full")
    assert not caplog.text


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"muon_lr": 0.1}, "--muon-lr has no effect without --optimizer muon"),
        ({"muon_lr": 0.1, "optimizer": "muon"}, ""),
        ({"scale": (0.3, 1.0), "crop": "shift"}, "--scale has no effect without --crop resized or inception"),
        ({"policy_strength": 20, "policy": "trivial"}, "--policy-strength has no effect without --policy randaugment"),
        ({"early": 0.5}, "--early has no effect without --early-size"),
        ({"early": 0.5, "early_size": 8}, ""),
        ({"rotary_offset": 0.5, "rotary": "mixed"}, "--rotary-offset has no effect without --rotary axial"),
        ({"rotary_pairs": "halves"}, "--rotary-pairs has no effect without --rotary"),
        ({"epochs": 5.0, "max_steps": 20}, "--epochs has no effect beside --max-steps"),
        ({"mlp_ratio": 2.0, "mlp_hidden": 96}, "--mlp-ratio has no effect beside --mlp-hidden"),
        ({"mlp_ratio": 2.0}, ""),
        ({"weight": 3.0}, "--weight has no effect without --slots 2"),
        ({"weight": 3.0, "slots": 2}, ""),
    ],
)
def test_an_option_that_another_leaves_without_effect_is_named(
    changes: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toys.Locate, "used_with", {"weight": ("slots", (2,))})
    run = run_of(toys.LocateSettings())
    warn_unused(run, with_fields(run, changes), "full")
    assert len(caplog.messages) == bool(line) and caplog.text.count(line)


def test_every_option_that_depends_on_another_names_fields_of_a_run() -> None:
    for kind in map(tasks.task_class, tasks.TASKS):
        known = flat_fields(replace(run_of(kind.settings()), model=VariantConfig()))
        for name, (other, among) in {**USED_WITH, **kind.used_with}.items():
            assert name in known and other in known
            assert {*map(str, among)} <= {*known[other].words}


def test_any_encoder_takes_weights_of_another_kind_with_their_preprocessing() -> None:
    network = CNNConfig(image_size=(16, 16))
    changed = recipes.from_weights(replace(run_of(toys.LocateSettings()), mean=(0.1, 0.2, 0.3)), "x", network)
    assert isinstance(changed.model, CNNConfig) and changed.mean is None
    with pytest.raises(UserError, match="x is a .* which toy does not train"):
        recipes.from_weights(run_of(toys.DenseSettings()), "x", network)


def test_the_loss_of_validation_is_drawn_under_the_name_of_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, folder = trained(toys.Locate, tmp_path)
    rows = [row for row in folder.rows() if row["kind"] == "val"]
    drawn: list[Any] = []

    def chart(panels: Any) -> str:
        drawn.append(panels)
        return ""

    monkeypatch.setattr("vitrail.report.curves.chart", chart)
    write_report(folder.path)
    (validation,) = [line for line in drawn[0][0].lines if line.label == "validation"]
    assert drawn[0][0].title == "loss" and "loss" not in rows[0]
    assert [y for _, y in validation.points] == [row["distance"] for row in rows] and len(rows) == 3


def test_only_portable_tasks_are_written_in_other_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.Locate().save(tmp_path / "own")
    for to in ("timm", "hf", "google"):
        assert command("convert", tmp_path / "own", tmp_path / "out", "--to", to) == 2
        assert f"{to} cannot store this model of the task 'locate'" in capsys.readouterr().err
    assert command("convert", tmp_path / "own", tmp_path / "out") == 0
    with pytest.raises(UserError, match="cannot be loaded as dense$"):
        vitrail.load(tmp_path / "own", task="dense")
    letterboxed = vitrail.create("nano/2")
    letterboxed.preprocess = replace(letterboxed.preprocess, resize="letterbox")
    letterboxed.save(tmp_path / "boxed")
    assert command("convert", tmp_path / "boxed", tmp_path / "timm", "--to", "timm") == 2
    assert "timm cannot store that this model's images are letterboxed" in capsys.readouterr().err


def test_the_encoder_of_any_task_loads_as_the_headless_one(tmp_path: Path) -> None:
    task = toys.Locate().eval()
    task.save(tmp_path / "own")
    alone = vitrail.load(tmp_path / "own", task="embed")
    assert type(alone).headless and alone.preprocess == task.preprocess
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(alone(images), task.encoder.pool(task.features(images)))
    with pytest.raises(UserError, match="task='embed' has no head for 3 classes"):
        vitrail.load(tmp_path / "own", task="embed", classes=3)


def test_what_people_agree_on_is_for_data_with_several_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toys.Locate().save(tmp_path / "own")
    words = ("eval", tmp_path / "own", "--data", "rectangles", "--human", "--json")
    assert command(*words) == 2
    assert "the data of the task locate has one answer per image" in capsys.readouterr().err

    def agreed(kind: Any, data: ImageSet) -> dict[str, Any]:
        return {"mean_iou": 0.5, "count": len(data)}

    monkeypatch.setattr(toys.Locate, "human", classmethod(agreed))
    assert command(*words) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["source"], row["split"], row["mean_iou"], row["count"]) == ("human", "test", 0.5, 2)
