"""Check that weights arrived in the model. Every way of loading weights ends here.

Other loaders have reported "223 of 223 keys" while the model kept its random initial weights. So a model on the meta
device must be given every tensor; a model that already has values, which could hide a missing tensor, is checked by its
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.tasks.task import Task


def fill(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Assign the weights to the model without copying them; `source` names their origin.

    Raises:
        UserError: a tensor is missing, or the new weights do not change the model's outputs.
    """
    encoder, old = getattr(model, "encoder", model), _tensors(model)
    before = None if any(value.is_meta for value in old.values()) else features(encoder)
    model.load_state_dict(weights, assign=True)
    lost = [
        name
        for name, value in _tensors(model).items()
        if value.is_meta or (name in weights and value.data_ptr() != weights[name].data_ptr())
    ]
    if lost:
        raise UserError(f"{source}: {_several(lost)} did not reach the model: please report this checkpoint")
    if before is not None:
        after = features(encoder)
        _check_finite(after, source)
        if torch.equal(before, after) and any(not torch.equal(old[name], weights[name]) for name in weights):
            raise UserError(_unchanged(source))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, including non-persistent ones."""
    every = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return dict(chain(*every))


def check_encoder(
    encoder: nn.Module, fresh: nn.Module, given: Callable[[], Mapping[str, Tensor]], source: object
) -> None:
    """Refuse an encoder with the random initial values of `fresh`, built the same way, if the source has others.

    `given` returns the source's values, which are compared only on suspicion: they may be untrained too.
    """
    first, after = fresh.state_dict(), features(encoder)
    _check_finite(after, source)
    unchanged = torch.equal(features(fresh), after)
    same = [n for n, value in encoder.state_dict().items() if n in first and _is_drawn(first[n], value)]
    if not (unchanged or same):
        return
    theirs = given()
    differ = {n for n, value in first.items() if n in theirs and not torch.equal(theirs[n], value)}
    if unchanged and differ:
        raise UserError(_unchanged(source))
    if kept := [name for name in same if name in differ]:
        raise UserError(_random(kept, source))


def made_twice(make: Callable[[], Task], source: object) -> Task:
    """A model that another library builds and loads in one step.

    It is built from two random seeds: tensors that the weights do not reach differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = make()
        torch.manual_seed(1)
        again = make().state_dict()
    _check_finite(features(task.encoder), source)
    if drawn := [name for name, value in task.state_dict().items() if not _equal(value, again[name])]:
        raise UserError(_random(drawn, source))
    return task


@torch.inference_mode()
def features(encoder: Any) -> Tensor:
    """The encoder's tokens [2, P + N, D] of two fixed images, in evaluation mode."""
    config = encoder.config
    shape = (config.channels, *config.image_size)
    place = torch.linspace(0, 40, shape[0] * shape[1] * shape[2]).view(shape)
    first = next(encoder.parameters())
    training = encoder.training
    try:
        tokens = encoder.eval()(torch.stack([place.sin(), (3 * place).cos()]).to(first.device, first.dtype))
    finally:
        encoder.train(training)
    return torch.cat(tokens[:2], dim=1)


def _check_finite(found: Tensor, source: object) -> None:
    if not found.isfinite().all():
        raise UserError(f"the weights of {source} give features that are not finite: choose another checkpoint")


def _unchanged(source: object) -> str:
    return (
        f"the weights of {source} changed nothing: the features of two images are those of a new model; "
        "please report this checkpoint"
    )


def _random(names: list[str], source: object) -> str:
    return (
        f"{source}: {_several(names)} kept the random values of a new model, though the file has weights: "
        "please report this checkpoint"
    )


def _is_drawn(first: Tensor, value: Tensor) -> bool:
    """Whether a tensor has its random initial values; constant zeros or ones prove nothing."""
    return first.shape == value.shape and torch.equal(first, value) and bool((first != first.flatten()[:1]).any())


def _equal(one: Tensor, two: Tensor) -> bool:
    """Whether the values are equal; nan equals nan."""
    floats = one.is_floating_point()
    return torch.equal(one, two) or (floats and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True))


def _several(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
