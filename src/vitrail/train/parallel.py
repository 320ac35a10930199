"""Several processes train one model: what they sum, gather and tell each other. Applied from outside.

A task and its model know nothing of it. Each process is a *rank* of a `World`. The ranks split every batch, so that all
draws stay functions of (seed, epoch, sample); they sum losses, counts and gradients once per step, and the statistics
of batch norm in every forward pass. So N ranks compute what one does, but for the rounding of sums in another order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from vitrail.data.loader import Loader
from vitrail.errors import RunError, UserError

BUCKET = 25 << 20
"""bytes of gradients that are summed in one message: the messages of a step overlap each other"""


class Together(UserError):
    """An error that every rank raises, since one of them told the others."""


@dataclass(eq=False)
class World:
    """The processes of a run. One alone (`ALONE`) sums and gathers nothing."""

    rank: int = 0
    size: int = 1
    device: str | None = None
    """the name of this rank's device; None if there is one process, which chooses"""
    shard: bool = False
    """each rank holds a share of the weights and of the optimizers' state"""
    stepping: bool = field(default=False, init=False)
    """whether all ranks are in the forward pass of a step of training, in which batch norm sums over them"""
    used: bytes | None = field(default=None, init=False)
    """which of the optimizers' parameters have a gradient, on any rank"""

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        return self  # there is one, for the copies of a module too

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """The forward pass of a step, which all ranks enter."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    # Between the devices

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors over the ranks, the same bits on each: in messages of `BUCKET` bytes."""
        if self.size == 1:
            return list(tensors)
        waiting: list[tuple[Any, Tensor, list[Tensor]]] = []
        for members in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in members])
            waiting.append((dist.all_reduce(flat, async_op=True), flat, members))
        found: list[Tensor] = []
        for work, flat, members in waiting:
            work.wait()
            pieces = flat.split([tensor.numel() for tensor in members])
            found += [piece.view(tensor.shape) for piece, tensor in zip(pieces, members, strict=True)]
        return found

    def sum_named(self, totals: dict[str, Tensor], requests: dict[str, bool]) -> dict[str, Tensor]:
        """The sums of scalars over the ranks, and under the names of `requests` how many ranks have each."""
        if self.size == 1:
            return totals
        device = next(iter(totals.values())).device
        wishes = torch.tensor([float(wish) for wish in requests.values()], dtype=torch.float64)
        numbers = torch.stack([value.detach().double() for value in totals.values()])
        (numbers,) = self.sum([torch.cat([numbers, wishes.to(device, non_blocking=True)])])
        formats = [*(value.dtype for value in totals.values()), *(torch.float32 for _ in requests)]
        named = zip((*totals, *requests), numbers.unbind(), formats, strict=True)
        return {name: number.to(dtype) for name, number, dtype in named}

    def sum_given(self, gradients: list[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums of gradients over the ranks; None for a parameter of which no rank had one in the first step."""
        if self.size == 1:
            return gradients
        given = bytes(gradient is not None for gradient in gradients)
        if self.used is None:  # once: in every step the hosts would wait for each other
            self.used = bytes(max(each) for each in zip(*self.all_gather(given), strict=True))
        if any(a > b for a, b in zip(given, self.used, strict=True)):
            raise RunError("a weight got its first gradient after the first step: train this model in one process")
        pairs = zip(gradients, parameters, self.used, strict=True)
        own = [torch.zeros_like(p) if gradient is None else gradient for gradient, p, used in pairs if used]
        summed = iter(self.sum(own))
        return [next(summed) if used else None for used in self.used]

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, by rank: [B, ...] to [sum of B, ...]. Gradients flow back to each."""
        if self.size == 1:
            return rows
        found: Tensor = _Gather.apply(rows, self)
        return found

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    # Between the hosts

    def on_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks call it."""
        return flag if self.size == 1 else any(self.all_gather_number(int(flag)))

    def barrier(self) -> None:
        """Until all ranks call it."""
        if self.size > 1:
            self.all_gather_number(0)

    def all_gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, by rank."""
        if self.size == 1:
            return [data]
        sizes = self.all_gather_number(len(data))
        own = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        own[: len(data)] = _as_tensor(data)
        every = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(every, own)
        return [bytes(each[:size].numpy()) for each, size in zip(every, sizes, strict=True)]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, by rank, on rank 0; elsewhere []."""
        sizes = self.all_gather_number(len(data))
        own = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        own[: len(data)] = _as_tensor(data)
        every = [torch.empty_like(own) for _ in sizes] if self.is_main else []
        dist.gather(own, every or None, 0)
        return [bytes(each[:size].numpy()) for each, size in zip(every, sizes, strict=False)]

    def all_gather_number(self, number: int) -> list[int]:
        """A number of every rank, by rank."""
        if self.size == 1:
            return [int(number)]
        every = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(every, torch.tensor([int(number)]))
        return [int(each) for each in every]

    def broadcast(self, make: Callable[[], bytes]) -> bytes:
        """What `make` gives on rank 0. Its UserError or RunError is raised on every rank."""
        if self.size == 1:
            return make()
        message = b""
        if self.is_main:
            try:
                message = b"+" + make()
            except (UserError, RunError) as error:
                message = refusal(error)
        return received(self._send(message))

    def _send(self, data: bytes) -> bytes:
        """The bytes of rank 0."""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0)
        content = _as_tensor(data) if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return bytes(content.numpy())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block, then the others do: it downloads and refuses, once. Its errors are raised on all."""
        if self.size == 1:
            yield
            return
        if not self.is_main:
            received(self._send(b""))
            yield
            return
        try:
            yield
        except Exception as error:
            self._send(refusal(error))
            raise
        self._send(b"+")

    def check_same(self, what: str, value: Any) -> None:
        """Refuse to train if the ranks do not all see the same value."""
        every = self.all_gather(json.dumps(value, sort_keys=True).encode())
        other = next((rank for rank, each in enumerate(every) if each != every[0]), None)
        if other is not None:
            raise Together(
                f"process {other} does not see {what} that process 0 sees: give every machine the same files"
            )

    # Files

    def broadcast_weights(self, read: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Tensors that rank 0 reads from a file; the others need not see the file."""
        if self.size == 1:
            return read()
        kept: dict[str, Tensor] = {}

        def made() -> bytes:
            kept.update(read())
            return save({name: value.contiguous() for name, value in kept.items()})

        data = self.broadcast(made)
        return kept if self.is_main else load(data)

    def joined_rows(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The rows of all ranks' tensors, on a device. A rank without rows gives {}; if none has any, so does this."""
        if self.size == 1:
            return tensors
        own = save({name: value.cpu().contiguous() for name, value in tensors.items()}) if tensors else b""
        every = [load(each) for each in self.all_gather(own) if each]
        return {name: torch.cat([each[name] for each in every]).to(device) for name in (every or [{}])[0]}

    def share_bad(self, loader: Loader) -> None:
        """Every rank learns which images the others left out, so that all count the same. UserError if too many."""
        if self.size == 1:
            return
        found: dict[int, str] = {}
        for each in self.all_gather(json.dumps(loader.bad).encode()):
            found |= {int(sample): reason for sample, reason in json.loads(each).items()}
        loader.record_bad(dict(sorted(found.items())))


ALONE = World()


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def refusal(error: Exception) -> bytes:
    """An error as rank 0 sends it: the kind, then the message."""
    return (b"!" if isinstance(error, UserError) else b"?") + str(error).encode()


def received(message: bytes) -> bytes:
    """What rank 0 sent; its error is raised."""
    if message[:1] == b"+":
        return message[1:]
    raise (Together if message[:1] == b"!" else RunError)(message[1:].decode())


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one number format, in groups of at most `BUCKET` bytes, or of one tensor."""
    groups: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if not groups or groups[-1][0].dtype != tensor.dtype or size + bytes_ > BUCKET:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += bytes_
    return groups


class _Gather(torch.autograd.Function):
    """Rows of all ranks. Every rank's loss may depend on every row, so backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        sizes = world.all_gather_number(len(rows))  # between the hosts: the last batch of a small set may be uneven
        own = rows.new_zeros(max(sizes), *rows.shape[1:])
        own[: len(rows)] = rows
        every = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(every, own)
        ctx.start, ctx.count = sum(sizes[: world.rank]), len(rows)
        return torch.cat([each[:size] for each, size in zip(every, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.count], None
