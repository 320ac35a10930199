"""Several processes of this machine that train together: what each returns."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle  # not of `multiprocessing`, which shares the memory of tensors with a process that ends
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from vitrail.train.launcher import free_port, loopback
from vitrail.train.parallel import World

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = 300.0
"""seconds after which ranks wait for each other for ever"""


def in_ranks(
    count: int, shard: bool, work: Callable[Concatenate[World, P], T], *args: P.args, **named: P.kwargs
) -> list[T]:
    """What `work` returns in each of `count` ranks. AssertionError with the traceback if one raises.

    The ranks are forked from a process that has imported what they need and done nothing else: PyTorch's threads do
    not survive a fork. So `work` is a function of a module, and its arguments can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitrail.train.build", "vitrail.train.loop"])
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    ranks = [
        context.Process(target=_rank, args=(World(rank, count, "cpu", shard), port, end, work, args, named))
        for rank, (_, end) in enumerate(pipes)
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


def _rank(
    world: World, port: int, end: Connection, work: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    torch.set_num_threads(1)  # of each, since they share the cores
    logging.getLogger("vitrail").setLevel(logging.CRITICAL if world.rank else logging.NOTSET)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    try:
        place = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=place, rank=world.rank, world_size=world.size)
        end.send_bytes(pickle.dumps((True, work(world, *args, **named))))
        dist.barrier()
    except BaseException:
        end.send_bytes(pickle.dumps((False, f"rank {world.rank}: {traceback.format_exc()}")))
    finally:
        end.close()
        os._exit(0)
