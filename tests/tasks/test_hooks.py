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
from vitrail import tasks
from vitrail.data.augment import Augment
from vitrail.data.masks import Masks
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Labels
from vitrail.errors import UserError
from vitrail.report import write_report
from vitrail.sizes import SIZES
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.tasks.values import Settings
from vitrail.train.build import build, evaluation_loader
from vitrail.train.loop import Components, fit
from vitrail.train.run import Run
from vitrail.train.state import RunFolder

CPU = torch.device("cpu")
KINDS: dict[str, type[toys.Toy]] = {"dense": toys.Dense, "teacher": toys.Teacher, "twins": toys.Twins}


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


@pytest.mark.parametrize("name", ["dense", "teacher"])
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


def test_lower_resolution_is_refused_where_more_than_one_image_would_follow() -> None:
    for name in ("dense", "teacher"):
        with pytest.raises(UserError, match="early_size"):
            build(run_of(KINDS[name].settings(), early_size=4), splits(KINDS[name]), CPU)


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


def test_options_change_how_a_task_prepares() -> None:
    task = toys.Dense()
    image = torch.zeros(3, 8, 40, dtype=torch.uint8)
    few = len(task.prepare(image).images)
    task.choose({"overlap": 0.75})
    assert len(task.prepare(image).images) > few
    with pytest.raises(UserError, match="--top is not an option of this model's task, dense"):
        task.choose({"top": 3})


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
