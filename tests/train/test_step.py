"""How the network is compiled for a step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.recipes import RECIPES
from vitrail.train.build import build
from vitrail.train.optim import Optim, Optimizers, groups
from vitrail.train.run import with_fields
from vitrail.train.step import LossModule, compile_network, train_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "device, wanted, mode", [(CPU, True, None), (GPU, False, None), (GPU, True, "reduce-overhead")]
)
def test_cuda_graphs_are_recorded_where_a_run_asks_for_them_on_a_gpu(
    device: torch.device,
    wanted: bool,
    mode: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: dict[str, Any] = {}
    run = replace(RECIPES["digits"](1000), cuda_graphs=wanted, compile=True)
    module = LossModule(build(replace(run, compile=False), open_data("digits"), CPU)[0].task)
    monkeypatch.setattr(module, "compile", lambda **options: seen.update(options))
    compile_network(module, run, device)
    assert seen == {"dynamic": False, "mode": mode}
    assert ("--cuda-graphs has no effect" in caplog.text) == (wanted and mode is None)


def test_a_graph_is_of_one_batch_per_step() -> None:
    """The gradients of a micro-batch would be overwritten by the next one."""
    run = replace(RECIPES["digits"](1000), cuda_graphs=True)
    with pytest.raises(UserError, match="remove --accumulate, or add --no-cuda-graphs"):
        with_fields(run, {"accumulate": 2})
    assert with_fields(run, {"accumulate": 2, "cuda_graphs": False}).accumulate == 2


def test_nothing_of_the_backward_pass_outlives_the_step() -> None:
    """A recorded pass writes its results into the same memory at each step; here they are spoiled after it."""
    run = replace(RECIPES["digits"](1000), batch_size=16, precision="fp32")
    weights = []
    for spoil in (False, True):
        components, _ = build(run, open_data("digits"), CPU)
        module, own = LossModule(components.task.train()), Optimizers(components.task, run.optim)
        made: list[torch.Tensor] = []
        plain = module.task.loss

        def loss(batch: Any, plain: Any = plain, made: list[torch.Tensor] = made) -> dict[str, torch.Tensor]:
            found = {name: value * 1.0 for name, value in plain(batch).items()}
            made.extend(found.values())
            return found

        module.task.loss = loss  # type: ignore[method-assign,assignment]
        rows = []
        for _, batch in zip(range(3), components.train.batches(), strict=False):
            scalars = train_step(run, module, batch, own, 1.0)
            for value in made if spoil else []:
                value.detach().fill_(float("nan"))
            made.clear()
            rows.append(scalars.read())
        weights.append((rows, [value.clone() for value in module.parameters()]))
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(a, b) for a, b in zip(weights[0][1], weights[1][1], strict=True))


def test_a_step_at_another_image_size_is_that_of_plain_pytorch() -> None:
    """Positions are interpolated then, which gives their gradient other strides than theirs.

    SGD, since AdamW would make a step of full size of a gradient that is rounding alone, on any processor.
    """
    optim = Optim(optimizer="sgd", lr=0.1, weight_decay=0.1)
    run = replace(RECIPES["digits"](1000), batch_size=16, precision="fp32", optim=optim)
    run = with_fields(run, {"class_token": False, "pool": "average"})
    components, _ = build(run, open_data("digits"), CPU)
    task = components.task.train()
    plain = copy.deepcopy(task)
    theirs = torch.optim.SGD(groups(plain, optim)[0], lr=optim.lr, momentum=0.9, fused=False)
    module, ours = LossModule(task), Optimizers(task, optim)
    batches = components.train.batches()
    for _ in range(3):
        batch = next(batches)
        batch["image"] = torch.nn.functional.interpolate(batch["image"], (6, 4), mode="bilinear")
        train_step(run, module, dict(batch), ours, 1.0)
        found = plain.loss(batch)
        (found["loss"] / found["count"]).backward()
        theirs.step()
        theirs.zero_grad()
    for (name, one), another in zip(task.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, another, atol=1e-5, rtol=1e-4, msg=name)
