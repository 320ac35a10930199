"""Optimizers: AdamW, LAMB, Muon for matrices, schedules, layer-wise learning rate decay, and the EMA of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.errors import UserError, require_choices
from vitrail.tasks.encoder import layers
from vitrail.tasks.task import Task
from vitrail.train.device import compiles_norms
from vitrail.train.lamb import Lamb
from vitrail.train.muon import Muon
from vitrail.train.scale import LossScale


@dataclass(frozen=True)
class Optim:
    """Optimizer and schedule. Learning rates are peak values; the schedule scales both by the same factor."""

    optimizer: Literal["adamw", "muon", "sgd", "lamb"] = "adamw"
    """muon: Muon for the blocks' matrices and convolution filters, AdamW for the rest; sgd: SGD with momentum 0.9, as
    in the paper's fine-tuning; lamb: LAMB, as in DeiT-III (arXiv 1904.00962)"""
    lr: float = 1e-3
    """learning rate at its peak, of AdamW where Muon trains the matrices"""
    muon_lr: float = 4e-3
    """learning rate of Muon; its updates are scaled to the size of AdamW's (arXiv 2502.16982)"""
    weight_decay: float = 0.05
    """weight decay, decoupled but in SGD; norms, biases, tokens and positions have none"""
    beta2: float = 0.999
    schedule: Literal["cosine", "linear", "constant", "epochs"] = "cosine"
    """learning rate after warm-up. cosine, linear: decay to `final`; constant: constant, then linear decay over
    `cooldown`; epochs: a cosine over all steps that changes only between epochs, one epoch late, as in DeiT's code"""
    warmup: float = 0.05
    """warm-up, as a fraction of the steps"""
    warmup_start: float | None = None
    """learning rate of the first step, as a fraction of the peak, which follows the last step of the warm-up; None: the
    first of equal increments, so that the last step of the warm-up has the peak"""
    final: float = 0.0
    """learning rate at the end of the decay, as a fraction of the peak"""
    cooldown: float = 0.2
    """final decay of the constant schedule, as a fraction of the steps"""
    layer_decay: float = 1.0
    """layer-wise learning rate decay: factor per layer, from the head down (arXiv 2106.08254); 1 for none"""
    clip: float = 0.0
    """gradient clipping: maximum norm of the gradient; 0 for no clipping"""
    qk_clip: float = 0.0
    """largest attention logit of a head of the encoder: above it, the weights of its queries and keys are scaled down
    after the step (arXiv 2507.20534); 0 for no bound"""
    ema: float = 0.0
    """decay of the exponential moving average (EMA) of the weights, which is then evaluated and saved; 0 for no EMA"""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("lr", "muon_lr", "weight_decay", "layer_decay", "clip", "qk_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        for name in ("warmup", "warmup_start", "cooldown", "final"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise UserError(f"{name} must be a fraction from 0 to 1, got {getattr(self, name)}")
        for name in ("beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")


def factor(optim: Optim, step: int, steps: int, epoch: int = 1) -> float:
    """The schedule's factor on the learning rates at `step` of `steps`, from 0 to 1; an epoch has `epoch` steps."""
    warmup, start = round(optim.warmup * steps), optim.warmup_start
    if start is None:
        warmup = max(1, warmup)
    if by_epoch := optim.schedule == "epochs":
        step = max(0, step // epoch - 1) * epoch
    if step < warmup:
        return (step + 1) / warmup if start is None else start + (1 - start) * step / warmup
    begin = 0 if by_epoch else warmup
    done = (step - begin) / max(1, steps - begin)
    if optim.schedule == "linear":
        shape = 1 - done
    elif optim.schedule == "constant":
        shape = min(1.0, (steps - step) / max(1, round(optim.cooldown * steps)))
    else:
        shape = 0.5 * (1 + math.cos(math.pi * done))
    return optim.final + (1 - optim.final) * shape


def groups(task: Task, optim: Optim) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameters for AdamW and matrices for Muon, grouped by layer and weight decay.

    Modules declare theirs. `no_decay` names tokens, positions and other tables: they are shaped like matrices but are
    not linear maps, so like norms and biases they get no weight decay (as in DeiT and BEiT). Muon trains the matrices
    of `blocks`, an encoder's or a decoder's, and convolution filters. The layers are those of `tasks.encoder.layers`;
    parameters outside the encoder belong to the last layer.
    """
    by_layer = layers(task.encoder)
    last = len(by_layer) - 1
    layer_of = {parameter: layer for layer, parameters in enumerate(by_layer) for parameter in parameters}
    tables = {getattr(module, name, None) for module in task.modules() for name in getattr(module, "no_decay", ())}
    blocks = [block for module in task.modules() for block in getattr(module, "blocks", ())]
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    adamw: dict[tuple[int, bool], list[Tensor]] = {}
    muon: dict[tuple[int, bool], list[Tensor]] = {}
    for parameter in task.parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and parameter not in tables
        matrix = decays and (parameter.ndim == 4 or (parameter.ndim == 2 and parameter in in_blocks))
        chosen = muon if optim.optimizer == "muon" and matrix else adamw
        chosen.setdefault((layer_of.get(parameter, last), decays), []).append(parameter)

    def as_groups(chosen: dict[tuple[int, bool], list[Tensor]], lr: float) -> list[dict[str, Any]]:
        return [
            {
                "params": parameters,
                "lr": lr * optim.layer_decay ** (last - layer),
                "weight_decay": optim.weight_decay if decays else 0.0,
            }
            for (layer, decays), parameters in _merged(chosen, optim).items()
        ]

    return as_groups(adamw, optim.lr), as_groups(muon, optim.muon_lr)


def _merged(chosen: dict[tuple[int, bool], list[Tensor]], optim: Optim) -> dict[tuple[int, bool], list[Tensor]]:
    """Without layer-wise decay all layers share one group: fewer, larger fused updates."""
    if optim.layer_decay != 1.0:
        return chosen
    merged: dict[tuple[int, bool], list[Tensor]] = {}
    for (_, decays), parameters in chosen.items():
        merged.setdefault((0, decays), []).extend(parameters)
    return merged


class Optimizers:
    """AdamW (or SGD, or LAMB) and Muon as one: each parameter belongs to one of them."""

    def __init__(self, task: Task, optim: Optim, compile: bool = False, scale: LossScale | None = None) -> None:
        """`compile` compiles the steps of Muon and LAMB; those of the others are one fused function anyway.

        `scale` is that of the loss, which a resumed run needs as much as the optimizers' state.
        """
        self.scale = scale
        adamw, muon = self.groups(task, optim)
        compile = compile and compiles_norms(next(task.parameters()).device)
        betas = (0.9, optim.beta2)
        self.members: list[torch.optim.Optimizer] = []
        if optim.optimizer == "sgd":
            self.members.append(sgd(adamw, optim))
        elif optim.optimizer == "lamb":
            self.members.append(Lamb(adamw, lr=optim.lr, betas=betas, compile=compile))
        else:
            self.members.append(torch.optim.AdamW(adamw, lr=optim.lr, betas=betas, fused=True))
        if muon:
            self.members.append(Muon(muon, lr=optim.muon_lr, compile=compile))
        self.peaks = [[group["lr"] for group in member.param_groups] for member in self.members]
        self.parameters = [p for member in self.members for group in member.param_groups for p in group["params"]]

    def groups(self, task: Task, optim: Optim) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What the members move; `parameters` are what gradients belong to."""
        return groups(task, optim)

    def step(self, gradients: Sequence[Tensor | None], factor: float, good: Tensor | None = None) -> None:
        """One step along the gradients of `parameters`, at `factor` times the peak learning rates.

        `good` [] of False moves nothing, whatever the gradients.
        """
        self.move(zip(self.parameters, gradients, strict=True), factor, good)

    def move(self, pairs: Iterable[tuple[Tensor, Tensor | None]], factor: float, good: Tensor | None) -> None:
        """One step of the members; `pairs` are their parameters with the gradients."""
        for parameter, gradient in pairs:
            parameter.grad = None if gradient is None else as_laid_out(gradient, parameter)
        for member, peaks in zip(self.members, self.peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            if isinstance(member, Lamb | Muon):
                member.step(good=good)
            else:
                member.found_inf = None if good is None else (~good).float()  # type: ignore[attr-defined]  # as a gradient scaler of PyTorch tells it
                member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The optimizers' states, and that of the scale last."""
        states = [member.state_dict() for member in self.members]
        return states if self.scale is None else [*states, self.scale.state_dict()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        count = len(self.members)
        for member, state in zip(self.members, states[:count], strict=True):
            member.load_state_dict(state)
            for parameter, values in member.state.items():
                values |= {name: as_laid_out(value, parameter) for name, value in values.items()}
        self._load_scale(states)

    def _load_scale(self, states: list[dict[str, Any]]) -> None:
        count = len(self.members)
        if self.scale is not None and len(states) > count:  # else the run resumes from another number format
            self.scale.load_state_dict(states[count])


def sgd(chosen: list[dict[str, Any]], optim: Optim) -> torch.optim.SGD:
    """SGD whose momentum starts at zero.

    PyTorch's fused SGD allocates the momentum in its first step and does not fill it if that step moves nothing (see
    `good`): the second step would add whatever the memory held.
    """
    made = torch.optim.SGD(chosen, lr=optim.lr, momentum=0.9, fused=True)
    for group in made.param_groups:
        for parameter in group["params"]:
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


def as_laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A gradient, or an optimizer's state, with the strides of its parameter; a value of another shape unchanged.

    PyTorch's fused optimizers read all of them in the order of their memory on a CPU: with other strides, each weight
    would get the gradient of another one. `backward` gives a gradient its parameter's strides; `torch.autograd.grad`
    may not, as for interpolated positions and for filters that read channels-last images.
    """
    same = value.shape != parameter.shape or value.stride() == parameter.stride()
    return value if same else torch.empty_like(parameter).copy_(value)


class Average:
    """A running average of a module's weights (and a copy of its statistics, such as batch norm's)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        own = {name: value.detach() for name, value in module.state_dict().items()}
        self.values = {name: value.clone() for name, value in own.items()}
        self._floats = [(name, value) for name, value in own.items() if value.is_floating_point()]
        self._others = [(name, value) for name, value in own.items() if not value.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update with the weights after `step`. Early decay is lower, or the initial weights would linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [self.values[name] for name, _ in self._floats]
        torch._foreach_lerp_(averages, [value for _, value in self._floats], 1 - decay)
        for name, value in self._others:
            self.values[name].copy_(value)
