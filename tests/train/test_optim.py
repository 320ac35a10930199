"""Schedules, groups, Muon beside AdamW, and the running average."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
from torch import nn

import vitrail
from vitrail.data.augment import Augment
from vitrail.errors import UserError
from vitrail.tasks.caption import Captioning
from vitrail.tasks.segment import Segmentation
from vitrail.tasks.task import Task
from vitrail.train.muon import Muon
from vitrail.train.optim import Average, Optim, Optimizers, factor, groups
from vitrail.train.run import Run
from vitrail.train.tune import Tune
from vitrail.variants import VariantConfig


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_peak_once_and_end_near_zero(schedule: str) -> None:
    optim = Optim(schedule=schedule, warmup=0.1, cooldown=0.3)  # type: ignore[arg-type]
    values = [factor(optim, step, 100) for step in range(100)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(values) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] < 0.04
    if schedule == "constant":
        assert values[69] == 1.0 and values[85] == pytest.approx(0.5)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_each_parameter_stands_in_one_group_with_its_rate_and_decay(layer_decay: float) -> None:
    task = vitrail.create("nano/2", classes=3)
    optim = Optim(optimizer="muon", lr=1.0, muon_lr=2.0, weight_decay=0.3, layer_decay=layer_decay)
    adamw, muon = groups(task, optim)
    found = {
        id(p): (g["lr"], g["weight_decay"], kind)
        for kind, group in ((False, adamw), (True, muon))
        for g in group
        for p in g["params"]
    }
    assert len(found) == sum(len(g["params"]) for g in adamw + muon) == len(list(task.parameters()))
    encoder = task.get_submodule("encoder")
    assert found[id(encoder.get_parameter("blocks.3.mlp.up.weight"))] == (2.0 * layer_decay, 0.3, True)
    assert found[id(encoder.get_parameter("blocks.0.mlp.up.bias"))] == (layer_decay**4, 0.0, False)
    assert found[id(encoder.get_parameter("positions"))] == (layer_decay**5, 0.0, False)
    assert found[id(task.get_parameter("head.linear.weight"))] == (1.0, 0.3, False)


def test_muon_moves_a_matrix_by_an_orthogonal_step_of_adamws_size() -> None:
    task = vitrail.create("nano/2", classes=3)
    weight = task.get_parameter("encoder.blocks.0.mlp.up.weight")  # [256, 64]
    optimizers = Optimizers(task, Optim(optimizer="muon", muon_lr=0.1, weight_decay=0.0))
    before = weight.detach().clone()
    optimizers.step([torch.randn_like(parameter) for parameter in optimizers.parameters], 0.5, torch.tensor(True))
    moved = (before - weight.detach()) / 0.05
    singular = torch.linalg.svdvals(moved)
    # Newton-Schulz brings each singular value near 1; the factor 0.2 sqrt(max(rows, columns)) is AdamW's size.
    assert (singular / (0.2 * 256**0.5)).sub(1).abs().max() < 0.4
    assert all(p.grad is None for p in task.parameters())


def parameters_of(shapes: tuple[tuple[int, ...], ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_muon_is_nesterovs_momentum_made_orthogonal() -> None:
    """The published algorithm, written out for one matrix at a time in double precision."""
    ours = parameters_of(((8, 24), (24, 8), (8, 24)))
    muon = Muon([{"params": ours}], lr=0.1, weight_decay=0.1)
    expected = [p.detach().double() for p in ours]
    buffers = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            gradient = p.grad.double()
            buffers[i] = 0.95 * buffers[i] + 0.05 * gradient
            x = 0.05 * gradient + 0.95 * buffers[i]
            x = x.T if x.shape[0] > x.shape[1] else x
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            x = x.T if p.shape[0] > p.shape[1] else x
            expected[i] = expected[i] * (1 - 0.1 * 0.1) - 0.1 * 0.2 * max(p.shape) ** 0.5 * x
        muon.step()
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p.double(), q, atol=0.02, rtol=0.02)  # bf16's rounding, where the processor has it


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
def test_muon_equals_pytorchs_to_the_rounding_of_bf16() -> None:
    ours = parameters_of(((8, 24), (24, 8), (8, 24)))
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon([{"params": ours}], lr=0.1, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=0.02, rtol=0.02)


def test_muon_continues_from_its_state_with_other_gradients_missing() -> None:
    """Its momentum is stored by stack: a state that is read, or a gradient that is missing, changes the stacks."""
    ours, theirs = parameters_of(((8, 24), (8, 24))), parameters_of(((8, 24), (8, 24)))
    a, b = Muon([{"params": ours}], lr=0.1), Muon([{"params": theirs}], lr=0.1)
    for step in range(6):
        if step == 3:
            restored = Muon([{"params": ours}], lr=0.1)
            restored.load_state_dict(copy.deepcopy(a.state_dict()))
            a = restored
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if step % 2 and i else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="not compiled there: see `compiles_norms`")
def test_a_compiled_step_of_muon_is_the_same() -> None:
    shapes = ((8, 24), (24, 8), (8, 24), (4, 3, 3, 3))
    ours, theirs = parameters_of(shapes), parameters_of(shapes)
    a, b = Muon([{"params": ours}], compile=True), Muon([{"params": theirs}])
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for one in (a, b):
            one.param_groups[0]["lr"] = 0.1 / (step + 1)
            one.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=2e-2, rtol=2e-2)  # bf16's rounding, where the processor has it


def test_filters_move_as_the_matrices_that_they_are() -> None:
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 3, 3, 3))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    a, b = Muon([{"params": [filters]}], lr=0.1), Muon([{"params": [matrix]}], lr=0.1)
    for _ in range(2):
        filters.grad = torch.randn_like(filters)
        matrix.grad = filters.grad.flatten(1)
        a.step(), b.step()
    torch.testing.assert_close(filters.flatten(1), matrix)


def test_muon_takes_the_filters_of_convolutions() -> None:
    task = vitrail.create("micro/4", classes=3, stem=(8, 16))
    _, muon = groups(task, Optim(optimizer="muon"))
    taken = {id(p) for group in muon for p in group["params"]}
    filters = [p for p in task.parameters() if p.ndim == 4]
    assert len(filters) == 3 and all(id(p) in taken for p in filters)
    Optimizers(task, Optim(optimizer="muon"))


MODELS = {
    "paper": VariantConfig(32, 2, 2, 4, image_size=(8, 8)),
    "tokens": VariantConfig(32, 2, 2, 4, image_size=(8, 8), registers=2, stem=(4,), layer_scale=0.1),
    "distilled": VariantConfig(32, 2, 2, 4, image_size=(8, 8), pool="distilled", distillation=True),
    "attention": VariantConfig(32, 2, 2, 4, image_size=(8, 8), pool="attention"),
    "rotary": VariantConfig(32, 2, 2, 4, image_size=(8, 8), rotary="mixed"),
    "tables": VariantConfig(32, 2, 2, 4, image_size=(8, 8), relative="both"),
    "decomposed": VariantConfig(
        *(32, 2, 2, 4), image_size=(8, 8), class_token=False, pool="average", relative="decomposed"
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_decays_and_what_muon_takes_are_matrices_and_filters(name: str) -> None:
    task = vitrail.create(MODELS[name], classes=3)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    maps = {
        f"{name}.weight" for name, module in task.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }  # the only modules of these models that multiply what they read by a matrix
    adamw, muon = groups(task, Optim(optimizer="muon", weight_decay=0.3))
    assert {names[id(p)] for group in adamw + muon if group["weight_decay"] for p in group["params"]} == maps
    blocks = {name for name in maps if ".blocks." in name or task.get_parameter(name).ndim == 4}
    assert {names[id(p)] for group in muon for p in group["params"]} == blocks


Name = Literal["adamw", "sgd", "lamb", "muon"]


def twins(optimizer: Name) -> tuple[Task, Task, Optim]:
    """Two equal models, and the optimizer of both."""
    torch.manual_seed(0)
    config = VariantConfig(width=16, depth=1, heads=2, patch=4, image_size=(8, 8), stem=(4, 8))
    task = vitrail.create(config, classes=3)
    return task, copy.deepcopy(task), Optim(optimizer=optimizer)


@pytest.mark.parametrize("optimizer", get_args(Name))
def test_a_gradient_with_other_strides_moves_the_same(optimizer: Name) -> None:
    """PyTorch's fused optimizers read a gradient in the order of its memory on a CPU, whatever its strides are."""
    task, other, optim = twins(optimizer)
    ours, theirs = Optimizers(task, optim), Optimizers(other, optim)
    for _ in range(2):
        gradients = [torch.randn_like(parameter) for parameter in ours.parameters]
        ours.step([g.mT.contiguous().mT if g.ndim > 1 else g for g in gradients], 1.0)
        theirs.step(gradients, 1.0)
    for one, another in zip(task.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", get_args(Name))
def test_a_first_step_that_moves_nothing_leaves_no_trace(optimizer: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the scale of the loss is too large for fp16 at first: its gradients are not finite."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    task, other, optim = twins(optimizer)
    ours, theirs = Optimizers(task, optim), Optimizers(other, optim)
    torch.use_deterministic_algorithms(True)  # memory that is not filled then holds nan
    try:
        ours.step([torch.full_like(p, torch.inf) for p in ours.parameters], 1.0, torch.tensor(False))
        for _ in range(2):
            gradients = [torch.randn_like(parameter) for parameter in ours.parameters]
            for optimizers in (ours, theirs):
                optimizers.step(gradients, 1.0, torch.tensor(True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_state_with_other_strides_than_its_weights_resumes_the_same(optimizer: Name) -> None:
    """As of a run whose weights were interpolated for its image size, where the resumed one's were not."""
    task, other, optim = twins(optimizer)
    for parameter in other.parameters():
        parameter.data = parameter.data.mT.contiguous().mT if parameter.ndim > 1 else parameter.data
    ours, theirs = Optimizers(task, optim), Optimizers(other, optim)
    gradients = [torch.randn_like(parameter) for parameter in ours.parameters]
    ours.step(gradients, 1.0)
    other.load_state_dict(task.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizers in (ours, theirs):
        optimizers.step(gradients, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True))


def test_average_is_the_stated_recurrence() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = Average(module, 0.9)
    expected = 1.0
    for step in range(200):
        module.weight.data.fill_(float(step))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Optim(optimizer="adam"), "no optimizer 'adam': choose from adamw, muon, sgd, lamb"),  # type: ignore[arg-type]
        (lambda: Optim(schedule="cos"), "no schedule 'cos': choose from cosine, linear, constant, epochs"),  # type: ignore[arg-type]
        (lambda: Tune(method="head"), "no method 'head'"),  # type: ignore[arg-type]
        (lambda: Augment(crop="random"), "no crop 'random'"),  # type: ignore[arg-type]
        (lambda: Segmentation(head="query"), "no head 'query'"),  # type: ignore[arg-type]
        (lambda: Captioning(decoder="gpt"), "no decoder 'gpt'"),  # type: ignore[arg-type]
        (lambda: Run("r", "digits", precision="fp8"), "no precision 'fp8': choose from auto, bf16, fp16, fp32"),  # type: ignore[arg-type]
    ],
)
def test_a_recipe_of_python_or_json_names_only_what_there_is(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
