"""What every task must keep, whatever its job. Runs over `TASKS`: a new task only adds its examples."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from task_examples import EXAMPLES, batch_for, inputs, rows_of, target_for
from torch import Tensor

import vitrail
from vitrail.data.sets import ImageSet
from vitrail.errors import UserError
from vitrail.tasks import TASKS, task_class, task_of
from vitrail.tasks.exported import run_by
from vitrail.tasks.task import Task
from vitrail.train.loaders import evaluation_loader

EACH = [(name, example) for name, examples in EXAMPLES.items() for example in examples]


@pytest.fixture(params=EACH, ids=", ".join)
def task(request: pytest.FixtureRequest) -> Task:
    return made(*request.param)


def made(name: str, example: str) -> Task:
    torch.manual_seed(0)
    return EXAMPLES[name][example]()


def refused(call: Callable[[], Any]) -> bool:
    """Whether a task refuses something, which takes one line."""
    try:
        call()
    except UserError as error:
        line = str(error)
    else:
        return False
    assert "\n" not in line
    return True


def trainable(task: Task) -> bool:
    return not refused(lambda: task.loss(batch_for(task, 2)))


def scored(task: Task) -> bool:
    return not refused(task.metric)


def test_every_task_has_examples_and_names_itself() -> None:
    assert EXAMPLES.keys() == TASKS.keys()
    for name in TASKS:
        kind = task_class(name)
        assert kind.name == name and issubclass(kind, Task)
        if kind.score is not None:
            assert kind.settings.name == name and task_of(kind.settings()) is kind


def test_a_name_that_is_no_task_is_refused() -> None:
    with pytest.raises(UserError, match="no task 'segmnt': choose from classify"):
        task_class("segmnt")


def test_saved_loaded_and_plain_data(task: Task, tmp_path: Path) -> None:
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert type(again) is type(task) and again.classes == task.classes
    assert json.loads(json.dumps(task.config())) == json.loads(json.dumps(again.config()))
    own, loaded = task.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    batch = batch_for(task, 3)
    # The same bits in other memory: some processors choose a kernel by where a tensor begins, and round otherwise.
    ours, theirs = task.eval()(*inputs(task, batch)), again(*inputs(task, batch))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_features_keep_their_grid_at_odd_sizes(task: Task) -> None:
    tokens = task.features(torch.randn(2, 3, 6, 14))
    assert tokens.grid == (3, 7) and tokens.patches.shape == (2, 21, 64)


# Answers


def test_predict_takes_images_of_any_kind_and_no_image(task: Task) -> None:
    images = [Image.new("RGB", (9, 30), "red"), Image.new("L", (40, 8)), Image.new("CMYK", (8, 8))]
    answers = task.train().predict(images)
    assert len(answers) == 3
    assert not task.training
    assert task.predict([]) == []


def test_answers_are_rows_lines_and_figures(task: Task) -> None:
    image = Image.new("RGB", (50, 33), "teal")
    (answer,) = task.predict([image])
    assert json.loads(json.dumps(answer.row())) == answer.row() and answer.row()
    assert "\n" not in answer.text()
    figure = answer.draw(image)
    assert figure.mode == "RGB" and figure.width >= image.width and figure.height > image.height


def close(one: Any, other: Any) -> None:
    """Plain data that is the same but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            close(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            close(a, b)
    else:
        assert one == pytest.approx(other, abs=1e-4) if isinstance(one, float) else one == other


def test_answers_do_not_depend_on_the_batch(task: Task) -> None:
    images = [torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8) for _ in range(5)]
    for together, alone in zip(task.predict(images), [task.predict([p])[0] for p in images], strict=True):
        close(together.row(), alone.row())


def test_predict_is_answer_on_the_batches_of_evaluation(task: Task) -> None:
    sizes = [(30, 20), (9, 31), (30, 20)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    data = ImageSet("any", list("abc"), images, target_for(task, sizes))
    predicted = task.predict(images)
    with torch.inference_mode():
        batches = list(evaluation_loader(task, data, torch.device("cpu")).evaluation())
        scored = [answer for batch in batches for answer in task.answer(batch)]
    assert [i for batch in batches for i in batch["sample"].tolist()] == [0, 1, 2]
    for one, other in zip(predicted, scored, strict=True):
        close(one.row(), other.row())


def test_a_batch_of_eight_and_of_nothing_go_through_forward(task: Task) -> None:
    def counts(outputs: Tensor | dict[str, Tensor]) -> set[int]:
        return {len(value) for value in (outputs.values() if isinstance(outputs, dict) else [outputs])}

    batch = batch_for(task, 8)
    assert counts(task(*inputs(task, batch))) == {8}
    if len(inputs(task, batch)) == 1:
        assert counts(task(batch["image"][:0])) == {0}


def test_what_is_explained_is_a_scalar_per_image_with_a_gradient(task: Task) -> None:
    batch = batch_for(task.eval(), 3)
    for parameter in task.parameters():
        if not parameter.any():  # a new head starts at 0, and its gradient is 0 everywhere
            torch.nn.init.normal_(parameter, std=0.02)
    batch["image"].requires_grad_()
    scalars = task.explained(batch)
    assert scalars.shape == (3,)
    assert scalars.requires_grad
    scalars.sum().backward()
    assert batch["image"].grad is not None and batch["image"].grad.flatten(1).any(dim=1).all()


def test_options_of_another_task_are_refused(task: Task) -> None:
    with pytest.raises(UserError, match=f"--no-such is not an option of this model's task, {task.name}"):
        task.choose({"no_such": 1})


# Loss


@pytest.mark.parametrize("name, example", EACH)
@given(count=st.integers(2, 7), data=st.data())
@settings(max_examples=8)
def test_the_loss_is_a_sum_over_any_split_of_a_batch(name: str, example: str, count: int, data: Any) -> None:
    task = made(name, example).eval()
    if not trainable(task) or task.whole_batch:
        return
    batch = batch_for(task, count, seed=count)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    cut = data.draw(st.integers(1, count - 1))
    whole = task.loss(batch)
    pieces = [task.loss(rows_of(batch, rows)) for rows in (order[:cut], order[cut:])]
    for entry in whole:
        total = sum(float(piece[entry]) for piece in pieces)
        assert total == pytest.approx(float(whole[entry]), rel=1e-4, abs=1e-4), entry


def test_accumulation_gives_the_same_gradient(task: Task) -> None:
    """Also in training, where stochastic depth is drawn by (seed, epoch, sample)."""
    if not trainable(task) or task.whole_batch:
        return
    task.train()
    batch = batch_for(task, 6)
    assert task.keep(batch) is None or task.keep(batch).shape[0] == 6  # type: ignore[union-attr]

    def gradients(pieces: list[Tensor]) -> list[Tensor]:
        task.zero_grad()
        for rows in pieces:
            task.loss(rows_of(batch, rows))["loss"].backward()
        return [p.grad.clone() for p in task.parameters() if p.grad is not None]

    whole, parted = gradients([torch.arange(6)]), gradients([torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5])])
    assert len(whole) == len(parted) > 0
    for one, other in zip(whole, parted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_loss_counts_its_items_and_is_finite(task: Task) -> None:
    if trainable(task):
        found = task.loss(batch_for(task, 4))
        assert found["loss"].isfinite() and float(found["count"]) >= 4 and found["loss"].requires_grad


# Metrics


def test_metrics_count_each_sample_once_in_any_order(task: Task) -> None:
    if not scored(task):
        return
    task.eval()
    batch = batch_for(task, 6)

    def scores(pieces: list[list[int]], merged: bool = False) -> dict[str, Any]:
        metrics = [task.metric() for _ in range(2)]
        for place, piece in enumerate(pieces):
            rows = rows_of(batch, torch.tensor(piece))
            outputs = task.answer(rows) if task.metric_reads == "answers" else task(rows["image"])
            metrics[place % 2 if merged else 0].update(rows, outputs)
        if merged:
            metrics[0].merge(metrics[1].state())
        return metrics[0].compute()

    with torch.inference_mode():
        whole = scores([[0, 1, 2, 3, 4, 5]])
        close(whole, scores([[5, 3, 1], [0, 4, 2], [3, 3]]))
        close(whole, scores([[2, 0], [1, 4, 2], [3], [5, 3]], merged=True))
    assert task.score is not None and task.score.name in whole
    with pytest.raises(UserError, match="no image of the split can be read"):
        task.metric().compute()


# Export


def test_engines_of_its_programs_give_its_answers(task: Task) -> None:
    """Programs take and give tensors alone, and components that call them are those that the task answers with."""
    task.eval()
    batch = batch_for(task, 2)
    with torch.inference_mode():
        programs = task.programs(batch)
        for program in programs.values():
            found = program.module(*program.inputs.values())
            assert len(found) == len(program.outputs) and all(isinstance(each, Tensor) for each in found)
            assert program.free.keys() <= program.inputs.keys()
        engines = {name: program.module for name, program in programs.items()}
        outputs = {name: program.outputs for name, program in programs.items()}
        again = run_by(copy.deepcopy(task), engines, outputs, "an export")
        assert isinstance(again, type(task)) and again.components().keys() >= task.components().keys()
        assert [one.row() for one in again.answer(batch)] == [one.row() for one in task.answer(batch)]
    assert refused(lambda: again.features(batch["image"])) and refused(lambda: again.loss(batch))


def test_predict_takes_one_image_of_any_kind(task: Task, tmp_path: Path) -> None:
    """One image gives a list of one, and each kind of the same pixels the same answer."""
    pixels = torch.randint(0, 256, (9, 12, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    chw = pixels.permute(2, 0, 1)
    kinds: list[Any] = [
        image,
        path,
        str(path),
        path.read_bytes(),
        pixels.numpy(),
        chw,
        chw.float() / 255,
        pixels.numpy() / 255,
    ]
    first, *others = [task.predict(kind) for kind in kinds]
    assert len(first) == 1
    for other in others:
        close(other[0].row(), first[0].row())
    several: Any
    for several in ([path, image], [str(path)] * 2, pixels.numpy()[None].repeat(2, 0), torch.stack([chw, chw])):
        assert len(task.predict(several)) == 2
