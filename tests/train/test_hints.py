"""What the log of a run tells: each fault gives its hint, healthy runs give none."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run, train
from torch import nn

from vitrail.recipes import RECIPES
from vitrail.tasks import task_of
from vitrail.tasks.answers import one_class
from vitrail.train.hints import Hints, Signs, checksums, hints, signs_of, unmoved, untrained
from vitrail.zoo import create, load

FALLING = [2.28, 2.05, 1.7, 1.3, 1.0, 0.8, 0.6, 0.5, 0.45, 0.42]


def rows(losses: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"loss": loss, "skipped": 0, "wait": 0.02, **more} for loss in losses]


def vals(losses: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"cross_entropy": loss, "top1": 0.8, "count": 500, **more} for loss in losses]


HEALTHY = Signs(
    train=rows(FALLING, accuracy=0.9),
    val=vals([1.6, 1.1, 0.9, 0.8, 0.7]),
    classes=10,
    batch_size=128,
    val_loss="cross_entropy",
    train_score="accuracy",
    score="top1",
    image=(0.1, 0.9),
    unmoved=(0.0, ""),
)

FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rises above a guess": ("rate-too-high", {"train": rows([2.3, 7.9, 4.2, 2.9, 2.4])}),
    "first row after the jump": ("rate-too-high", {"train": rows([9.5, 3.2, 2.4, 2.33, 2.31])}),
    "rises late": ("rate-too-high", {"train": rows([2.3, 1.4, 0.9, 2.2, 2.3, 2.3, 2.3])}),
    "steps without a number": ("rate-too-high", {"train": rows([2.3, 2.2, 2.1], skipped=2)}),
    "steps without a number, from the first on": ("rate-too-high", {"train": [{"skipped": 10}]}),
    "stays, at a high rate": ("rate-too-high", {"train": rows([2.35, 2.31, 2.3, 2.31]), "rate": 100.0}),
    "stays, at a low rate": ("rate-too-low", {"train": rows([2.31, 2.3, 2.31, 2.3]), "rate": 1e-3}),
    "falls slowly": ("rate-too-low", {"train": rows([2.31, 2.3, 2.29, 2.28, 2.27, 2.26])}),
    "stays at ln(classes)": ("loss-at-rest", {"train": rows([2.31, 2.30, 2.304, 2.303, 2.302, 2.304])}),
    "stays at ln(batch)": ("loss-at-rest", {"train": rows([4.86, 4.85, 4.852, 4.85, 4.853, 4.851]), "classes": 0}),
    "pixels of 0 to 255": ("wrong-mean-std", {"image": (-260.0, 1.2)}),
    "std far too large": ("wrong-mean-std", {"image": (0.0, 0.004)}),
    "weights at rest": ("frozen", {"unmoved": (0.9, "encoder.patches.projection.weight")}),
    "one class": ("collapsed", {"answers": "99 % of the images are predicted as 'cat'"}),
    "waits": ("starved", {"train": rows(FALLING, wait=0.8), "streamed": True}),
    "val loss rises": ("overfit", {"train": rows([*FALLING, 0.1, 0.02]), "val": vals([1.0, 0.8, 1.1, 1.5])}),
    "score of training images only": (
        "overfit",
        {"train": rows(FALLING, accuracy=0.99), "val": vals([0.9, 0.9], top1=0.6)},
    ),
    "logits": ("attention-logits", {"val": [{"attention_logits": [9.0, 12.0 * 3**i]} for i in range(4)]}),
    "weights of a new model": ("loaded-nothing", {"untrained": "checkpoint"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_gives_its_hint(name: str) -> None:
    check, changes = FAULTS[name]
    assert [hint.check for hint in hints(replace(HEALTHY, **changes))] == [check]


def test_fine_tuning_is_not_told_to_change_its_model() -> None:
    """Which its weights fix: `--qk-norm` is refused there."""
    grown = replace(HEALTHY, **FAULTS["logits"][1])
    remedies = [hint.remedy for own in (True, False) for hint in hints(replace(grown, from_scratch=own))]
    assert [("--qk-norm" in remedy, "--qk-clip 100" in remedy) for remedy in remedies] == [(True, True), (False, True)]


@pytest.mark.parametrize("bound", [{"qk_norm": True}, {"qk_clip": 100.0, "from_scratch": False}])
def test_a_bound_that_a_run_has_is_no_remedy(bound: dict[str, Any]) -> None:
    """`--qk-clip` is refused beside a norm on queries and keys, which `digits` has without a flag."""
    (hint,) = hints(replace(HEALTHY, **FAULTS["logits"][1], **bound))
    assert hint.remedy == "lower --muon-lr or --lr, or raise --weight-decay"
    run = RECIPES["digits"](1000)
    assert signs_of(run, task_of(run.task), 10).qk_norm


def test_logits_that_are_not_numbers_have_not_grown() -> None:
    rows = [{"attention_logits": [9.0, logit]} for logit in (4.0, float("nan"), float("inf"))]
    assert not list(hints(replace(HEALTHY, val=rows)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": ()},
        {"val": ()},
        {"train": rows([0.4, 0.38, 0.37, 0.36, 0.36]), "from_scratch": False},  # fine-tuning begins low
        {"train": rows([3.3, 2.6, 1.9, 1.5]), "val_loss": "", "classes": 11},  # a second loss beside cross-entropy
        {"train": rows([-8.0, -8.2, -8.3]), "classes": 0},  # rewards
        {"train": rows([2.303, 2.302, 2.303]), "done": 0.1},  # during warm-up
        {"train": rows(FALLING, wait=0.6)},  # augments in memory
        {"train": rows([0.7, 0.69, 0.67, 0.66, 0.62]), "classes": 2},
        {"train": rows([8.0, 5.5, 4.6, 4.1, 3.9]), "classes": 0, "batch_size": 8},  # words
        {"val": vals([0.9, 0.9], top1=0.6, count=5), "train": rows(FALLING, accuracy=0.99)},
        {"val": [{"attention_logits": [11.0, 14.0 + i]} for i in range(9)]},
        {"train": rows([2.3, 2.2]), "answers": "99 % of the images are predicted as 'cat'"},  # after few steps
    ],
)
def test_healthy_run_gives_none(changes: dict[str, Any]) -> None:
    assert list(hints(replace(HEALTHY, **changes))) == []


def test_hint_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Hints(create("nano/2", classes=3), RECIPES["digits"](100))
    with caplog.at_level(logging.WARNING, "vitrail"):
        for step in range(1, 4):
            watch.evaluated({}, 300 * torch.ones(2, 3, 8, 8), step / 3)
    told = [record.message for record in caplog.records if "mean 300" in record.message]
    assert len(told) == 1 and "--mean" in told[0]


def test_a_resumed_run_knows_its_log_and_repeats_no_hint(caplog: pytest.LogCaptureFixture) -> None:
    """A run whose loss is nearly at its end falls slowly, which says nothing of its rate."""
    log = [{"kind": "train", **row} for row in rows(FALLING)] + [{"kind": "val", **row} for row in vals([1.0, 0.5])]
    high = rows([2.3, 7.9, 4.2, 2.9, 2.4])
    again = [{"kind": "train", **row} for row in high]
    late = rows([0.42, 0.419, 0.418, 0.417])
    for before, after, told in ((log, late, 0), (again, high[-1:], 0), ([], high, 1)):
        caplog.clear()
        watch = Hints(create("nano/2", classes=10), RECIPES["digits"](100))
        with caplog.at_level(logging.WARNING, "vitrail"):
            if before:
                watch.resumed(before, 0.5)
            for row in after:
                watch.logged(row)
        assert len(caplog.records) == told, caplog.text


def test_weights_that_are_those_of_a_new_model_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once: at the first row of a new run, and not when it is resumed."""
    create("nano/2", classes=10, channels=1, image_size=8).save(tmp_path / "start")
    run = small_run(init=str(tmp_path / "start"), model=load(tmp_path / "start").encoder.config, eval_every=9.0)
    for steps, resume, told in ((20, False, 1), (40, True, 0)):
        caplog.clear()
        train(run, tmp_path / "run", steps, resume)
        assert sum("loading them changed nothing" in line for line in caplog.messages) == told


@pytest.mark.parametrize(
    "collapsed, told",
    [
        ([True], 1),  # the only evaluation of a short run
        ([False, True], 1),  # the last one
        ([False, True, True, False], 1),
        ([True, False], 0),  # small networks begin so
        ([True, True, False, False, False], 0),
        ([False, False, True, False], 0),  # for one evaluation
        ([False], 0),
    ],
)
def test_one_predicted_class_is_told_once_it_stays(
    collapsed: list[bool], told: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Hints(create("nano/2", classes=["cat", "dog"]), RECIPES["digits"](100))
    watch.train += rows([0.7, 0.6, 0.5])
    with caplog.at_level(logging.WARNING, "vitrail"):
        for i, one in enumerate(collapsed, 1):
            confusion = [[30, 0], [30, 0]] if one else [[25, 5], [5, 25]]
            scores = {"confusion": confusion, "classes": ["cat", "dog"], "count": 60}
            watch.evaluated(scores, torch.randn(4, 3, 8, 8), i / len(collapsed))
    assert sum("100% of the images are predicted as 'cat'" in line for line in caplog.messages) == told


def test_fast_dev_run_gives_no_hint(caplog: pytest.LogCaptureFixture) -> None:
    watch = Hints(create("nano/2", classes=3), replace(RECIPES["digits"](100), fast_dev_run=True))
    with caplog.at_level(logging.WARNING, "vitrail"):
        watch.evaluated({}, 300 * torch.ones(2, 3, 8, 8), 1.0)
    assert not caplog.records


def test_weights_that_stay_are_found() -> None:
    moving = nn.Linear(30, 1)
    module = nn.Sequential(nn.Linear(30, 30), moving, nn.Linear(1, 1).requires_grad_(False))
    first = checksums(module)
    assert unmoved(module, first)[0] == 1
    with torch.no_grad():
        moving.weight[0, 7] += 1e-7
        moving.bias.add_(1)
    share, name = unmoved(module, first)
    assert share == pytest.approx(930 / 961) and name == "0.weight"


def test_new_weights_are_told_from_trained_ones() -> None:
    assert untrained(create("nano/2", classes=3).encoder)
    assert not untrained(load("classify").encoder)


@pytest.mark.parametrize(
    "confusion, collapsed",
    [
        ([[10, 0], [10, 0]], True),
        ([[0, 10], [0, 10]], True),
        ([[10, 0], [5, 5]], False),
        ([[99, 0], [1, 0]], False),  # nearly all images are of that class
        ([[0, 0], [0, 0]], False),
    ],
)
def test_one_class_for_all(confusion: list[list[int]], collapsed: bool) -> None:
    assert (one_class(confusion, ["cat", "dog"]) is not None) is collapsed
