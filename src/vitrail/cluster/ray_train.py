"""`vitrail cluster ray train`: the same `train` command, started by Ray Train on the machines of a cluster.

Ray Train starts the processes, joins them (torch.distributed) and starts all of them again when one dies; the run then
resumes, since they are of the same job (`train/job.py`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.cluster.grid import flags_in, read_grid
from vitrail.cluster.ray_session import library, session, shortened
from vitrail.errors import RunError, UserError
from vitrail.train.job import JOB


def train(words: Sequence[str], workers: int, gpus: float, failures: int, address: str | None) -> Path:
    """Train with the `words` of a `train` command, by so many workers; returns the run's folder.

    UserError for words that `train` would refuse.
    """
    if workers < 1 or failures < 0:
        raise UserError("--workers must be at least 1, and --max-failures at least 0")
    flags = flags_in(words)
    for flag in ("--grid", "--grid-index", "--nproc", "--device"):
        if flag in flags:
            raise UserError(f"{flag} has no meaning here: leave it out")
    grid = read_grid(words)
    if "--out" not in flags:
        raise UserError("name the run's folder with --out: by it a worker that is started again finds its run")
    ray = library()
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UserError(f"Ray Train is not installed ({error}): pip install 'vitrail[cluster]'") from None
    out = grid.out.resolve()
    with session(ray, address):
        there = ray.cluster_resources()
        for name, each in (("GPU", gpus), ("CPU", 1.0)):
            if each * workers > there.get(name, 0):
                raise UserError(
                    f"{workers} workers need {each * workers:g} {name}s and the cluster has {there.get(name, 0):g}: "
                    "lower --workers"
                )
        trainer = TorchTrainer(
            work,
            train_loop_config={"words": [*words], "job": grid.job, "folder": str(Path.cwd())},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
            run_config=RunConfig(
                name=out.name,
                storage_path=str(out.parent / ".ray"),
                failure_config=FailureConfig(max_failures=failures),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what the workers raise in its own classes
            raise RunError(f"{shortened(error)}; Ray's log of that worker has its lines") from None
    return grid.out


def work(config: dict[str, Any]) -> None:
    """What each worker does: `vitrail train`, from the beginning or from what an earlier attempt has saved."""
    import torch.distributed as dist

    from vitrail.cli import main

    os.chdir(config["folder"])  # Ray Train gives each worker a folder of its own
    os.environ[JOB] = config["job"]
    if dist.is_initialized():
        # `train` joins the processes as it does under torchrun, at a port that Ray's own group does not hold.
        port = [_free_port()]
        dist.broadcast_object_list(port, 0)
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(port[0])
    sys.argv = ["vitrail", "train", *config["words"]]  # which the run's log records
    if code := main(sys.argv[1:]):
        raise RuntimeError(f"vitrail train ended with exit code {code}")


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("", 0))
        return int(opened.getsockname()[1])
