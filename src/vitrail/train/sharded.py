"""FSDP2: each rank holds a share of the weights, of the optimizers' state and of the running average.

PyTorch's `fully_shard` gathers the weights of a block before it runs, and gives each rank its share of the summed
gradient after. It is applied to a copy of the task. The task itself stays whole: it is brought up to date before it is
evaluated or saved, so that checkpoints and states are those of one process, and any layout continues any other.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from vitrail.errors import UserError
from vitrail.tasks.task import Task
from vitrail.train.optim import Average, Optim, Optimizers, as_laid_out, groups
from vitrail.train.parallel import World
from vitrail.train.scale import LossScale
from vitrail.train.step import LossModule

Groups = list[dict[str, Any]]


class ShardedLoss(LossModule):
    """The loss of a task whose weights the ranks share out."""

    whole: Task
    """the task itself, which is evaluated and saved"""

    def __init__(self, task: Task, world: World) -> None:
        trained = copy.deepcopy(task)
        super().__init__(trained, world)
        self.__dict__["whole"] = task  # not a submodule: its weights stay whole
        mesh = init_device_mesh(torch.device(str(world.device)).type, (world.size,))
        alone = {p for p in trained.parameters() if p.ndim == 0}  # FSDP2 takes no scalars: each rank has them all
        if alone and "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UserError("this model has weights of one number, which --shard can leave whole from PyTorch 2.7 on")
        how: dict[str, Any] = {"mesh": mesh, **({"ignored_params": alone} if alone else {})}
        blocks = [block for module in trained.modules() for block in getattr(module, "blocks", ())]
        for block in blocks:
            fully_shard(block, **how)
        fully_shard(self, **how)
        self.blocks_to_compile = blocks

    def compile(self, *args: Any, **named: Any) -> None:
        """Compile each block separately: FSDP2 gathers its weights outside."""
        for block in self.blocks_to_compile:
            block.forward = torch.compile(block.forward, *args, **named)

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor], scale: Tensor | None, last: bool
    ) -> Sequence[Tensor | None]:
        """Of the last micro-batch this rank's share of the sums over ranks and micro-batches; of earlier ones, None.

        Earlier ones send nothing, and keep the weights that they have gathered.
        """
        assert isinstance(self, FSDPModule)
        self.set_requires_gradient_sync(last)
        self.set_reshard_after_backward(last)
        loss.backward(scale)
        if not last:
            return [None] * len(parameters)
        found = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return [self._summed(gradient) for gradient in found]

    def _summed(self, gradient: Tensor | None) -> Tensor | None:
        """FSDP2 gives means over the ranks, and nothing for weights that are not shared out."""
        if gradient is None:
            return None
        if isinstance(gradient, DTensor):
            return gradient.to_local() * self.world.size
        return self.world.sum([gradient])[0]

    def over_ranks(
        self, totals: dict[str, Tensor], gradients: list[Tensor | None], parameters: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        return self.world.sum_named(totals, self.requests), gradients

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        squares = torch.stack(torch._foreach_norm(list(gradients))).double().square()
        # Every rank has the whole gradient of a scalar.
        weights = torch.tensor([1.0 if gradient.ndim else 1 / self.world.size for gradient in gradients])
        (total,) = self.world.sum([(squares * weights.to(squares.device, non_blocking=True)).sum()])
        return total.sqrt().float()

    # Between the whole task and the shares

    def optimizers(self, optim: Optim, compile: bool, scale: LossScale | None) -> Optimizers:
        self._optimizers = ShardedOptimizers(self.task, optim, compile, scale, self.world)
        return self._optimizers

    def average(self, decay: float) -> Average:
        return ShardedAverage(self, decay)

    @torch.no_grad()
    def gather_whole(self) -> None:
        """Bring the whole task up to date. All ranks call it."""
        self.whole.load_state_dict(self.joined(self.shares()))

    @torch.no_grad()
    def scatter_whole(self) -> None:
        """Take the shares of the whole task's weights."""
        whole, names = self.whole.state_dict(), dict[Tensor, str]((p, name) for name, p in self.task.named_parameters())
        for name, share in self.shares().items():
            share.copy_(self.cut(name, whole[name]))
        for p, matrix in self._optimizers.owned.items():
            matrix.copy_(whole[names[p]])

    def shares(self) -> dict[str, Tensor]:
        """This rank's rows of each weight, and the statistics, which each rank has."""
        own = {name: value.detach() for name, value in self.task.state_dict().items()}
        return {name: share_of(value) for name, value in own.items()}

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a whole weight."""
        return cut(whole, self.world) if isinstance(self.task.state_dict()[name], DTensor) else whole

    def joined(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole weights of all ranks' rows. All ranks call it."""
        with torch.inference_mode(False), torch.no_grad():  # an evaluation is in inference mode, DTensors cannot be
            like = self.task.state_dict()
            found = {}
            for name, share in shares.items():
                shared = like[name]
                found[name] = whole_of(share, shared) if isinstance(shared, DTensor) else share
            return found


class _Shares:
    """What an `Average` follows."""

    def __init__(self, module: ShardedLoss) -> None:
        self.state_dict: Callable[[], dict[str, Tensor]] = module.shares


class ShardedAverage(Average):
    """A running average of this rank's rows. Its `values` are whole: all ranks ask for them together."""

    def __init__(self, module: ShardedLoss, decay: float) -> None:
        self._module = module
        self._own = Average(_Shares(module), decay)  # type: ignore[arg-type]

    def update(self, step: int) -> None:
        self._own.update(step)

    @property
    def values(self) -> dict[str, Tensor]:
        return self._module.joined(self._own.values)

    @values.setter
    def values(self, whole: dict[str, Tensor]) -> None:
        self._own.values = {name: self._module.cut(name, value).clone() for name, value in whole.items()}


class ShardedOptimizers(Optimizers):
    """Elementwise optimizers move each rank's rows. Those that need a whole matrix, Muon and LAMB, get it on one rank.

    Each matrix has an owner, which gathers its gradient, moves it and sends every rank its rows: so the ranks also
    share the work of Muon's products. Gradients are those of this rank's rows of `parameters`.
    """

    def __init__(self, task: Task, optim: Optim, compile: bool, scale: LossScale | None, world: World) -> None:
        self.world = world
        super().__init__(task, optim, compile, scale)
        self._moved, self.parameters = self.parameters, [*self._shared]

    def groups(self, task: Task, optim: Optim) -> tuple[Groups, Groups]:
        """The groups of the members: rows of this rank, and the matrices that it owns."""
        both = groups(task, optim)
        self._layout = [[list(group["params"]) for group in adamw_or_muon] for adamw_or_muon in both if adamw_or_muon]
        self._settings = [[{**group, "params": None} for group in each] for each in both if each]
        by_matrix = both if optim.optimizer == "lamb" else both[1:]
        matrices = [p for each in by_matrix for group in each for p in group["params"] if isinstance(p, DTensor)]
        self.owner = owners(matrices, self.world.size)
        self._shared = [p for each in self._layout for group in each for p in group]
        self.rows = {p: share_of(p.detach()) for p in self._shared}
        self.owned: dict[Tensor, Tensor] = {}
        for p in matrices:
            whole = whole_of(self.rows[p], p)
            if self.owner[p] == self.world.rank:
                self.owned[p] = whole
        return self._own(both[0]), self._own(both[1])

    def _own(self, chosen: Groups) -> Groups:
        """The groups with what this rank moves of them. One without any keeps an empty tensor: a member needs one."""
        found = []
        for group in chosen:
            own = [self.own(p) for p in group["params"] if p not in self.owner or p in self.owned]
            found.append({**group, "params": own or [torch.zeros(1, 0, device=group["params"][0].device)]})
        return found

    def own(self, parameter: Tensor) -> Tensor:
        """What this rank moves of a parameter: its rows, or the whole matrix if it owns it."""
        return self.owned[parameter] if parameter in self.owner else self.rows[parameter]

    def step(self, gradients: Sequence[Tensor | None], factor: float, good: Tensor | None = None) -> None:
        given = dict(zip(self.parameters, gradients, strict=True))
        sent = [p for p in self.owner if given[p] is not None]
        wholes = self._to_owners(sent, [given[p] for p in sent])
        moved = [p for p in self._shared if p not in self.owner or p in self.owned]
        by_moved = {self.own(p): wholes.get(p) if p in self.owner else given[p] for p in moved}
        self.move([(own, by_moved.get(own)) for own in self._moved], factor, good)
        self._from_owners(sent)

    def _sizes(self, parameters: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """How many numbers this rank sends each owner, and how many it gets of each rank."""
        out, back = [0] * self.world.size, [0] * self.world.size
        for p in parameters:
            out[self.owner[p]] += self.rows[p].numel()
            if p in self.owned:
                for rank in range(self.world.size):
                    back[rank] += rows_of(p, rank, self.world.size) * math.prod(p.shape[1:])
        return out, back

    def _to_owners(self, parameters: Sequence[Tensor], rows: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """The whole gradients of the matrices that this rank owns, from all ranks' rows. One message per pair."""
        if not parameters:
            return {}
        by_owner = sorted(zip(parameters, rows, strict=True), key=lambda one: self.owner[one[0]])
        sent = torch.cat([share.reshape(-1) for _, share in by_owner])
        out, back = self._sizes(parameters)
        got = sent.new_empty(sum(back))
        dist.all_to_all_single(got, sent, back, out)
        mine = [p for p, _ in by_owner if p in self.owned]
        size = self.world.size
        pieces = got.split([rows_of(p, rank, size) * math.prod(p.shape[1:]) for rank in range(size) for p in mine])
        return {
            p: torch.cat([piece.view(-1, *p.shape[1:]) for piece in pieces[number :: len(mine)]])
            for number, p in enumerate(mine)
        }

    def _from_owners(self, parameters: Sequence[Tensor]) -> None:
        """Write this rank's rows of the matrices that their owners have moved."""
        if not parameters:
            return
        by_owner = sorted(parameters, key=lambda p: self.owner[p])
        mine = [p for p in by_owner if p in self.owned]
        size = self.world.size
        pieces = [cut(self.owned[p], self.world, rank).reshape(-1) for rank in range(size) for p in mine]
        like = self.rows[by_owner[0]]
        sent = torch.cat(pieces) if pieces else like.new_empty(0)
        back, out = self._sizes(parameters)
        got = like.new_empty(sum(back))
        dist.all_to_all_single(got, sent, back, out)
        for p, piece in zip(by_owner, got.split([self.rows[p].numel() for p in by_owner]), strict=True):
            self.rows[p].copy_(piece.view_as(self.rows[p]))

    # The state of one process, on rank 0

    def _each(self) -> Iterator[tuple[int, int, Tensor]]:
        """The parameters with the number of their member and their number in it, as one process has them."""
        for member, each in enumerate(self._layout):
            for number, parameter in enumerate(p for group in each for p in group):
                yield member, number, parameter

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of one process, on rank 0; all ranks ask for it together, and the others get []."""
        own: dict[str, Tensor] = {}
        for member, number, p in self._each():
            if p not in self.owner or p in self.owned:
                state = self.members[member].state.get(self.own(p), {})
                own |= {
                    f"{member}.{number}.{name}": value.cpu().contiguous()
                    for name, value in state.items()
                    if isinstance(value, Tensor)
                }
        every = [load(each) for each in self.world.gather_bytes(save(own))]
        if not every:
            return []
        states: list[dict[str, Any]] = []
        for member, each in enumerate(self._layout):
            indices = iter(range(len([p for group in each for p in group])))
            settings = [
                {**self.members[member].defaults, **own, "params": [next(indices) for _ in group]}
                for own, group in zip(self._settings[member], each, strict=True)
            ]
            states.append({"state": {}, "param_groups": settings})
        for member, number, p in self._each():
            begin = f"{member}.{number}."
            names = dict.fromkeys(key for rank in every for key in rank if key.startswith(begin))
            found = {}
            for key in names:
                pieces = [rank[key] for rank in every if key in rank]
                rows = p not in self.owner and isinstance(p, DTensor) and pieces[0].ndim > 0
                found[key.removeprefix(begin)] = torch.cat(pieces) if rows else pieces[0]
            if found:
                states[member]["state"][number] = found
        return states if self.scale is None else [*states, self.scale.state_dict()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take this rank's share of the state of one process."""
        self._load_scale(states)
        for member, number, p in self._each():
            if p in self.owner and p not in self.owned:
                continue
            own = self.own(p)
            rows = p not in self.owner and isinstance(p, DTensor)
            self.members[member].state[own] = {
                name: as_laid_out(
                    (cut(value, self.world) if rows and value.ndim else value).to(own.device).clone(), own
                )
                for name, value in states[member]["state"].get(number, {}).items()
                if isinstance(value, Tensor)
            }


def share_of(value: Tensor) -> Tensor:
    """This rank's rows of a weight, in its own memory; any other weight unchanged."""
    with torch.no_grad():
        return value.to_local() if isinstance(value, DTensor) else value


def rows_of(parameter: Tensor, rank: int, size: int) -> int:
    """How many rows of a weight a rank has: as many as each, but the last ranks may have fewer or none."""
    most = -(-parameter.shape[0] // size)
    return max(0, min(most, parameter.shape[0] - rank * most))


def cut(whole: Tensor, world: World, rank: int | None = None) -> Tensor:
    """The rows of a rank, by default this one's."""
    rank = world.rank if rank is None else rank
    start = rank * -(-whole.shape[0] // world.size)
    return whole[start : start + rows_of(whole, rank, world.size)]


def whole_of(share: Tensor, like: DTensor) -> Tensor:
    """The whole of all ranks' rows, for a weight `like` it."""
    made = DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    whole: Tensor = made.full_tensor()
    return whole


def owners(matrices: Sequence[Tensor], size: int) -> dict[Tensor, int]:
    """A rank for each matrix, the largest first, each to the rank that has least so far: the same on all ranks."""
    loads = [0] * size
    found: dict[Tensor, int] = {}
    for matrix in sorted(matrices, key=lambda one: -one.numel()):
        rank = loads.index(min(loads))
        found[matrix] = rank
        loads[rank] += matrix.numel()
    return {matrix: found[matrix] for matrix in matrices}


def loss_module(task: Task, world: World) -> LossModule:
    """The loss of a task in the layout that the world asks for."""
    return ShardedLoss(task, world) if world.shard and world.size > 1 else LossModule(task, world)
