"""What every task must keep, whatever its job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import vitrail
from vitrail.tasks.task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "classify": lambda: vitrail.create("nano/2", classes=["a", "b"]),
    "classify, sigmoid and hidden": lambda: vitrail.create("nano/2", classes=3, hidden=8, registers=1),
    "embed": lambda: vitrail.create("nano/2"),
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    torch.manual_seed(0)
    return TASKS[request.param]()


def test_saved_loaded_and_plain_data(task: Task, tmp_path: Path) -> None:
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert type(again) is type(task) and again.classes == task.classes
    assert json.loads(json.dumps(task.config())) == json.loads(json.dumps(again.config()))
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(task.eval()(images), again(images))


def test_features_keep_their_grid_at_odd_sizes(task: Task) -> None:
    tokens = task.features(torch.randn(2, 3, 6, 14))
    assert tokens.grid == (3, 7) and tokens.patches.shape == (2, 21, 64)


def test_predict_takes_pictures_of_any_kind_and_no_picture(task: Task) -> None:
    pictures = [Image.new("RGB", (9, 30), "red"), Image.new("L", (40, 8)), Image.new("CMYK", (8, 8))]
    answers = task.train().predict(pictures)
    assert len(answers) == 3 and all(answer.as_row() for answer in answers)
    assert not task.training
    assert task.predict([]) == []


def test_answers_do_not_depend_on_the_batch(task: Task) -> None:
    pictures = [torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8) for _ in range(5)]
    together, alone = task.predict(pictures), [task.predict([p])[0] for p in pictures]
    for a, b in zip(together, alone, strict=True):
        assert [x["label"] for x in a.labels] == [x["label"] for x in b.labels]
        assert a.embedding == pytest.approx(b.embedding, abs=1e-5)


def test_a_batch_of_eight_and_of_nothing_go_through_forward(task: Task) -> None:
    assert len(task(torch.randn(8, 3, 8, 8))) == 8
    assert len(task(torch.randn(0, 3, 8, 8))) == 0
