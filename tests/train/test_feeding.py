"""The line about decoding at the start of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from images import folder_of

from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.train import feeding
from vitrail.train.feeding import decoding_line, measured, needed
from vitrail.train.run import Run
from vitrail.vit import ViTConfig

GPU = torch.device("cuda")
LOG: list[dict[str, Any]] = [
    {"images_per_s": 10.0, "wait": 0.0},
    {"images_per_s": 300.0, "wait": 0.75},
    {"kind": "val", "seconds": 3.0},
]


def tiny_run(**changes: Any) -> Run:
    return Run("x", data="none", model=ViTConfig(8, 1, 2, 8, (16, 16), stem=(4,)), **changes)


def tiny_task() -> Classify:
    model = tiny_run().model
    return Classify(encoder_for(model), ["a", "b"], Preprocess(model.image_size)).train()


@pytest.mark.parametrize(
    "workers, who", [(0, "the main process decodes"), (1, "1 worker decodes"), (3, "3 workers decode")]
)
def test_only_a_set_on_disk_is_measured_and_nothing_of_the_run_changes(workers: int, who: str, tmp_path: Path) -> None:
    images = open_data(folder_of(tmp_path / "data", {"a": 6, "b": 6})).train
    (tmp_path / "data" / "a" / "0.jpg").write_bytes(b"no image")

    def loader(memory: bool) -> Loader:
        return Loader(
            images, Preprocess((16, 16)), batch_size=4, seed=0, train=True, augment=Augment(crop="resized"),
            workers=workers, memory=memory, max_bad=0.5,
        )  # fmt: skip

    run, task = tiny_run(), tiny_task()
    assert decoding_line(run, task, loader(memory=True)) is None
    plain, measured = loader(memory=False), loader(memory=False)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    line = decoding_line(run, task, measured, LOG)
    assert line is not None and line.startswith(f"the images are read from disk: {who} about ")
    assert "GPU" not in line and line.endswith(" images/s"), "what a GPU needs is nothing to a CPU"
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert not measured.bad and not measured.wait
    assert torch.equal(next(measured.batches(1))["image"], next(plain.batches(1))["image"])


def test_what_a_gpu_needs_is_known_from_a_log_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run, task = tiny_run(), tiny_task()
    images = SimpleNamespace(streamed=None)
    on_gpu: Any = SimpleNamespace(memory=False, set=images, workers=1, device=GPU, rate=lambda: 500.0, world=1)
    plain = "the images are read from disk: 1 worker decodes about 500 images/s"
    monkeypatch.setattr(feeding, "measured", lambda *run: 2500.0)
    needs = "and the GPU needs about 2,500 images/s (measured on 32 images, without compiling)"
    assert decoding_line(run, task, on_gpu) == f"{plain}, {needs}"
    took = "and the GPU took about 1,200 images/s when it did not wait for data"
    assert decoding_line(run, task, on_gpu, LOG) == f"{plain}, {took}"
    monkeypatch.setattr(feeding, "measured", lambda *run: None)
    assert decoding_line(run, task, on_gpu) == plain
    assert needed(LOG) == 1200 and needed(LOG[:1]) == 10
    assert needed([]) is None and needed([{"images_per_s": 1.0, "wait": 1.0}]) is None


def test_several_processes_of_a_machine_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines with four processes each, of which this one has six cores. The log counts the images of all."""
    run, task = tiny_run(), tiny_task()
    loader: Any = SimpleNamespace(
        memory=False, set=SimpleNamespace(streamed=None), workers=2, device=GPU, rate=lambda: 500.0, world=8
    )
    monkeypatch.setattr(feeding, "measured", lambda *run: 2500.0)
    monkeypatch.setattr(feeding, "cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    start = (
        "the images are read from disk: 4 processes with 2 workers each decode about 3,000 images/s, and their 4 GPUs "
    )
    line = decoding_line(run, task, loader)
    assert line == f"{start}need about 10,000 images/s (measured on 32 images, without compiling)"
    line = decoding_line(run, task, loader, LOG)
    assert line == f"{start}took about 600 images/s when they did not wait for data"
    loader.workers, loader.device = 0, torch.device("cpu")
    line = decoding_line(run, task, loader)
    assert line == "the images are read from disk: 4 processes decode about 2,000 images/s"


@pytest.mark.parametrize("augment", [Augment(), Augment(mixup=0.5)])
def test_the_measurement_of_the_network_changes_nothing_of_the_run(augment: Augment, tmp_path: Path) -> None:
    """No weight, no statistic, no draw and no count; and bad images do not end it."""
    images = open_data(folder_of(tmp_path / "data", {"a": 6, "b": 6})).train
    (tmp_path / "data" / "a" / "0.jpg").write_bytes(b"no image")
    loader = Loader(
        images, Preprocess((16, 16)), batch_size=4, seed=0, train=True, memory=False, max_bad=0.5, augment=augment
    )
    task = tiny_task()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    state = torch.get_rng_state()
    speed = measured(tiny_run(), task, loader)
    assert speed is not None and speed > 0 and task.training
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert torch.equal(torch.get_rng_state(), state) and not loader.bad and not loader.wait
    for path in (tmp_path / "data").rglob("*.jpg"):
        path.write_bytes(b"no image")
    assert measured(tiny_run(), task, loader) is None


def test_a_measurement_that_does_not_fit_in_memory_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_data(folder_of(tmp_path / "data", {"a": 6, "b": 6})).train
    loader = Loader(images, Preprocess((16, 16)), batch_size=4, seed=0, train=True, memory=False)
    task = tiny_task()

    def full(batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(task, "loss", full)
    assert measured(tiny_run(), task, loader) is None and task.training
