"""Several processes of this machine that train together, forked from the test: what each returns."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle  # not of `multiprocessing`, which shares the memory of tensors with a process that ends
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vitrail.train.launcher import free_port, loopback
from vitrail.train.parallel import World

T = TypeVar("T")
PATIENCE = 300.0
"""seconds after which ranks wait for each other for ever"""


def in_ranks(count: int, work: Callable[[World], T], shard: bool = False) -> list[T]:
    """What `work` returns in each of `count` ranks. AssertionError with the traceback if one raises."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    ranks = [
        context.Process(target=_rank, args=(rank, count, shard, port, work, end)) for rank, (_, end) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for _, end in pipes:
        end.close()
    found: list[Any] = []
    for reader, _ in pipes:
        try:
            given: tuple[bool, Any] = (False, "a rank hangs")
            if reader.poll(PATIENCE):
                given = pickle.loads(reader.recv_bytes())
        except EOFError:
            given = (False, "a rank was killed")
        good, value = given
        if not good:
            for rank in ranks:
                rank.kill()
        assert good, value
        found.append(value)
    for rank in ranks:
        rank.join()
    return found


def _rank(rank: int, count: int, shard: bool, port: int, work: Callable[[World], Any], end: Connection) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    logging.getLogger("vitrail").setLevel(logging.CRITICAL if rank else logging.NOTSET)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
        end.send_bytes(pickle.dumps((True, work(World(rank, count, "cpu", shard)))))
        dist.barrier()
    except BaseException:
        end.send_bytes(pickle.dumps((False, f"rank {rank}: {traceback.format_exc()}")))
    finally:
        end.close()
        os._exit(0)
