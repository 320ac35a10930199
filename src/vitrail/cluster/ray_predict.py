"""`vitrail cluster ray predict`: the predictions of a model for many images, by the workers of a Ray cluster.

Ray Data gives the work to the workers, restarts one that dies and repeats what it had not finished. This process writes
the rows, so that each image has one row whatever was repeated, and that only this machine needs the output folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitrail.cluster.inputs import Work, list_inputs, read
from vitrail.cluster.ray_session import library, session, shortened
from vitrail.cluster.row_files import RowFiles
from vitrail.data.pixels import Doubts
from vitrail.errors import RunError, UserError
from vitrail.predictions.answers import BATCH, Row, answer_items
from vitrail.tasks.task import Task

log = logging.getLogger("vitrail")

RESTARTS = 10
"""how often Ray starts a worker again, and a batch of it; more deaths than this are no accident"""
REPORT = 30.0
"""seconds between lines of progress"""


@dataclass(frozen=True)
class Workers:
    """How many workers predict, and what each takes."""

    count: int | None = None
    """None: one per GPU of the cluster, or one per CPU core if it has none"""
    gpus: float | None = None
    """of each worker; None: 1 if the cluster has any, else 0"""
    batch: int = BATCH


def predict(task: Task, data: str, out: Path, workers: Workers, address: str | None) -> str:
    """Predict for all images of `data` that have no row in the folder `out` yet; returns a line about its rows."""
    if workers.batch < 1 or (workers.count is not None and workers.count < 1):
        raise UserError("--workers and --batch-size must be at least 1")
    if workers.gpus is not None and not 0 <= workers.gpus < math.inf:
        raise UserError(f"--gpus-per-worker must be at least 0, got {workers.gpus:g}")
    ray = library()
    inputs = list_inputs(data)
    names = inputs.names()
    if len({*names}) < len(names):
        raise UserError(f"{data} holds two images of the same name: rows could not be told apart")
    with RowFiles(out, shared(task, data)) as files:
        work = inputs.work(files.done)
        todo = len(names) - len(files.done & {*names})
        if files.done:
            log.warning(f"{out} has rows of {len(names) - todo:,} of {len(names):,} images already")
        if work:
            with session(ray, address):
                _collect(ray, task, work, workers, files, todo)
    if missing := len({*names} - files.done):
        raise RunError(f"{missing:,} of {len(names):,} images have no row: the same command continues")
    return files.text()


def shared(task: Task, data: str) -> dict[str, Any]:
    """What all rows of a folder have in common, as plain data."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in task.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    place = str(Path(data).resolve()) if Path(data).exists() else data
    options = json.loads(json.dumps(asdict(task.option)))
    return {"task": task.name, "weights": digest.hexdigest(), "options": options, "data": place}


def _collect(ray: Any, task: Task, work: list[Work], workers: Workers, files: RowFiles, todo: int) -> None:
    """Let the workers answer, and keep the rows as they come."""
    count, gpus, cores = allotted(workers, ray.cluster_resources())
    log.warning(f"{todo:,} images for {count} workers" + (f" with {gpus:g} GPU each" if gpus else " on the CPU"))
    began = told = time.monotonic()
    finished = 0
    try:
        for rows in _answers(ray, task, work, workers.batch, count, {"num_gpus": gpus, "num_cpus": cores}):
            finished += files.add(rows)
            if time.monotonic() - told > REPORT:
                told = time.monotonic()
                log.warning(f"{finished:,} of {todo:,} images, {finished / (told - began):,.0f} per second")
    except (UserError, RunError):
        raise
    except ray.exceptions.RayError as error:
        raise RunError(f"{shortened(error)}; the rows so far are kept, and the same command continues") from None


def allotted(workers: Workers, resources: Mapping[str, float]) -> tuple[int, float, float]:
    """How many workers a cluster with these resources gets, and the GPUs and CPU cores of each.

    Raises UserError if the cluster lacks what the workers need.
    """
    gpus_there, cores_there = resources.get("GPU", 0), resources.get("CPU", 0)
    if not cores_there:
        raise UserError("the cluster has no CPU cores for workers: add a machine to it, or choose another --address")
    gpus = workers.gpus if workers.gpus is not None else float(gpus_there > 0)
    if gpus > gpus_there:
        raise UserError(f"a worker needs {gpus:g} GPU and the cluster has {gpus_there:g}: lower --gpus-per-worker")
    most = int(gpus_there / gpus) if gpus else workers.count or int(cores_there)
    if (count := workers.count or most) > most:
        raise UserError(f"{count} workers with {gpus:g} GPU each, and the cluster has room for {most}: lower --workers")
    return count, gpus, min(1.0, cores_there / (count + 1))  # Ray waits for ever for cores that no machine has


def _answers(
    ray: Any, task: Task, work: list[Work], batch: int, count: int, needs: dict[str, float]
) -> Iterator[list[Row]]:
    """The rows of `count` workers, in any order; each `needs` these resources."""
    blocks = max(1, min(len(work), 10_000, max(4 * count, math.ceil(len(work) / (4 * batch)))))
    images = ray.data.from_items(work, override_num_blocks=blocks)
    if "table" in work[0]:  # one row group per block, since each may be large
        images = ray.data.from_items(work, override_num_blocks=len(work)).flat_map(rows_of, num_cpus=needs["num_cpus"])
    answered = images.map_batches(
        Predictor,
        fn_constructor_args=[ray.put(task.cpu())],
        batch_size=batch,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=count),
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        **needs,
    )
    for block in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        yield [json.loads(row) for row in block.column("row").to_pylist()]


def rows_of(work: Work) -> list[dict[str, Any]]:
    """The images of a row group of a Parquet file, as a worker takes them."""
    rows = []
    for name, item in read({key: value.tolist() if hasattr(value, "tolist") else value for key, value in work.items()}):
        rows.append(
            {
                "name": name,
                "path": str(item) if isinstance(item, Path) else "",
                "data": item if isinstance(item, bytes) else b"",
            }
        )
    return rows


class Predictor:
    """A worker: it has the model, and answers batches of images."""

    def __init__(self, task: Any) -> None:
        import ray

        from vitrail.train.device import choose_device

        device = choose_device("cuda" if ray.get_gpu_ids() else "cpu")
        self.task: Task = ray.get(task).to(device).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """The row of each image of a batch, as JSON."""
        items = list(_items(batch))
        there = [(name, item) for name, item in items if item is not None]
        answers = iter(answer_items(self.task, there, Doubts()))
        rows = [next(answers)[0] if item is not None else self.missing(name) for name, item in items]
        return {"row": [json.dumps(row) for row in rows]}

    def missing(self, name: str) -> Row:
        return {"image": name, "task": self.task.name, "error": f"{name}: there is no image"}


def _items(batch: dict[str, Sequence[Any]]) -> Iterator[tuple[str, Path | bytes | None]]:
    """The name of each image of a batch, and its file or content."""
    if "data" not in batch:
        for name, path in zip(batch["name"], batch["path"], strict=True):
            yield from read({"name": str(name), "path": str(path)})
        return
    for name, path, data in zip(batch["name"], batch["path"], batch["data"], strict=True):
        yield str(name), Path(path) if path else bytes(data) or None
