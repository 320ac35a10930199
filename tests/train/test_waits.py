"""Nothing in a step of training makes the host wait for a GPU. Seen with tensors that have a device but no data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrail.data.augment import Augment, Augmenter, stream_keys
from vitrail.data.mixing import mix_pairs
from vitrail.data.preprocess import Preprocess
from vitrail.recipes import RECIPES
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.train.joined import join_statistics
from vitrail.train.logits import QKClip
from vitrail.train.optim import Average, Optimizers
from vitrail.train.parallel import World
from vitrail.train.run import Run, with_fields
from vitrail.train.scale import LossScale
from vitrail.train.step import LossModule, train_step

GPU = torch.device("cuda")
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")
"""operators whose result the host reads, or whose size depends on values"""


class Waits(TorchDispatchMode):
    """Notes the operators for which the host waits: reads, and copies between devices that block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        name = str(func).rpartition(".")[0]
        copies = name in ("aten._to_copy", "aten.copy_")
        # A CPU tensor of one number goes into a kernel as an argument.
        between = {x.device.type for x in [*given, *made] if copies or x.ndim or x.device.type != "cpu"}
        blocks = not (kwargs.get("non_blocking") or (name == "aten.copy_" and args[2:3] == (True,)))
        if name in READS or (len(between) > 1 and blocks):
            self.found.append(f"{func} of {[(x.device.type, tuple(x.shape)) for x in given]}")
        return out


@contextmanager
def no_data() -> Iterator[None]:
    """In this block, tensors have shapes and devices, also of a GPU that is not there, and modules can move to it."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class Event:
    """In the place of a CUDA event."""

    def record(self) -> None: ...


def small(**changes: Any) -> tuple[Run, Classify]:
    run = with_fields(RECIPES["cifar10"](45_000), {"width": 16, "depth": 2, "heads": 2, "compile": False, **changes})
    run = replace(run, precision="fp32")  # PyTorch's autocast warns where there is no GPU
    return run, Classify(encoder_for(run.model), ["a", "b", "c"], Preprocess(run.model.image_size))


def unfilled(loss: Tensor, parameters: Sequence[Tensor], scale: Tensor | None, last: bool) -> list[Tensor]:
    """In the place of the gradients: PyTorch's backward pass asks the driver of the GPU."""
    return [torch.empty_like(p) for p in parameters]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"optimizer": "muon", "layer_decay": 0.75},
        {"optimizer": "adamw"},
        {"optimizer": "lamb"},
        {"optimizer": "muon", "qk_norm": False, "qk_clip": 1.0},
        {"optimizer": "adamw", "positions": "sine", "stem": ()},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_waits_for_nothing(changes: dict[str, Any], scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, task = small(**changes)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with no_data():
        task = task.to(GPU).train()
        batch: dict[str, Any] = {
            "image": torch.randn(4, 3, 32, 32, device=GPU),
            "label": torch.rand(4, 3, device=GPU),
            "sample": torch.arange(4, device=GPU),
            "key": torch.full((), 12345, device=GPU),
        }
        optimizers = Optimizers(task, run.optim, scale=LossScale(4, GPU) if scaled else None)
        module, average = LossModule(task), Average(task, 0.9)
        clip = QKClip(task, run.optim.qk_clip) if run.optim.qk_clip else None
        monkeypatch.setattr(module, "gradients", unfilled)

        def step(number: int) -> None:
            train_step(run, module, batch, optimizers, 1.0)
            if clip is not None:
                clip.after(0, batch["image"])
            average.update(number)

        step(0)
        with Waits() as waits:
            step(1)
    assert not waits.found, waits.found


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop="shift", flip=True, policy="trivial", cutmix=0.5, erase=0.25),
        Augment(crop="resized", flip=True, policy="three", rotation=10.0, mixup=0.8, cutmix=1.0),
        Augment(crop="inception", policy="big-vision", mixup=0.2),
        Augment(policy="randaugment"),
    ],
    ids=lambda augment: augment.policy,
)
def test_augmentation_waits_for_nothing(augment: Augment) -> None:
    preprocess = Preprocess((8, 8))
    Augmenter(augment, preprocess.size)  # tables are kept for later calls, which must not get those without data
    with no_data():
        augmenter = Augmenter(augment, preprocess.size, GPU)
        images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=GPU)
        draws, keys = torch.arange(4, device=GPU), stream_keys(0, 1).to(GPU)
        with Waits() as waits:
            x = augmenter(images, draws, keys)
            if augment.mixes:
                x, _, _ = mix_pairs(x, draws, keys, augment)
            preprocess.normalise(x)
    assert not waits.found, waits.found


def test_batch_norm_over_processes_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers: None)
    norm, world = torch.nn.BatchNorm2d(3), World(0, 2, "cuda")
    join_statistics(norm, world)
    with no_data(), torch.no_grad(), world.step():
        norm = norm.to(GPU)
        with Waits() as waits:
            norm(torch.randn(2, 3, 4, 4, device=GPU))
    assert not waits.found, waits.found


def test_waits_are_noticed() -> None:
    with no_data(), Waits() as waits:
        rates = torch.ones(2, device=GPU)
        rates[[0, 1]], rates.cpu(), torch.ones(2).to(GPU)
        rates.copy_(torch.ones(2), non_blocking=True), torch.ones(2).to(GPU, non_blocking=True), rates * torch.tensor(2)
    assert [found.partition(" ")[0] for found in waits.found][-2:] == ["aten._to_copy.default"] * 2
    assert len(waits.found) >= 3
