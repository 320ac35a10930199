"""Optimizers: AdamW, Muon for matrices, schedules, layer-wise learning rate decay, and the EMA of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from vitrail.errors import UserError
from vitrail.tasks.encoder import layers
from vitrail.tasks.task import Task
from vitrail.train.device import native_bf16


@dataclass(frozen=True)
class Optim:
    """Optimizer and schedule. Learning rates are peak values; the schedule scales both by the same factor."""

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """muon: Muon for the blocks' matrices and convolution filters, AdamW for the rest; sgd: SGD with momentum 0.9, as
    in the paper's fine-tuning"""
    lr: float = 1e-3
    muon_lr: float = 4e-3
    """learning rate of Muon; its updates are scaled to the size of AdamW's (arXiv 2502.16982)"""
    weight_decay: float = 0.05
    beta2: float = 0.999
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """learning rate after warm-up. cosine, linear: decay to zero; constant: constant, then linear decay over
    `cooldown`"""
    warmup: float = 0.05
    """warm-up, as a fraction of the steps"""
    cooldown: float = 0.2
    """final decay of the constant schedule, as a fraction of the steps"""
    layer_decay: float = 1.0
    """layer-wise learning rate decay: factor per layer, from the head down (arXiv 2106.08254); 1 for none"""
    clip: float = 0.0
    """gradient clipping: maximum norm of the gradient; 0 for no clipping"""
    ema: float = 0.0
    """decay of the exponential moving average (EMA) of the weights, which is then evaluated and saved; 0 for no EMA"""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "weight_decay", "layer_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be a fraction from 0 to 1, got {getattr(self, name)}")
        for name in ("beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")


def factor(optim: Optim, step: int, steps: int) -> float:
    """The schedule's factor on the learning rates at `step` of `steps`, from 0 to 1."""
    warmup = max(1, round(optim.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if optim.schedule == "linear":
        return 1 - done
    return min(1.0, (steps - step) / max(1, round(optim.cooldown * steps)))


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


class Muon(torch.optim.Optimizer):
    """Muon: orthogonalised momentum (Keller Jordan, 2024), scaled to updates of AdamW's size (arXiv 2502.16982).

    Takes matrices [R, C] and filters of convolutions [O, C, h, w], which are matrices [O, C h w]. Those of one shape
    are orthogonalised together: the blocks of a ViT share four shapes, so a step takes four products instead of four
    per block. The products are in bf16 if the device supports it natively, else in float32. The numbers are those of
    `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, to bf16's rounding; PyTorch has it from 2.9 on.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                matrices = torch.stack(
                    [self._update(parameter, group["momentum"]) for parameter in parameters]
                ).flatten(2)
                updates = orthogonal(matrices, group["steps"])
                # An orthogonal matrix of this shape has entries of size 1 / sqrt(max); AdamW's updates are near 0.2.
                lr = group["lr"] * 0.2 * math.sqrt(max(matrices.shape[1:]))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                shaped = updates.to(parameters[0].dtype).unflatten(2, shape[1:]).unbind()
                torch._foreach_add_(parameters, list(shaped), alpha=-lr)

    def _update(self, parameter: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""coefficients of the quintic iteration, chosen by its author for fast convergence; singular values end in [0.7,
1.2]"""


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """[K, R, C] to the nearest semi-orthogonal matrices, roughly: singular values come near 1 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if native_bf16(matrices.device) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizers:
    """AdamW (or SGD) and Muon as one: each parameter belongs to one of them."""

    def __init__(self, task: Task, optim: Optim) -> None:
        adamw, muon = groups(task, optim)
        self.members: list[torch.optim.Optimizer] = [
            torch.optim.SGD(adamw, lr=optim.lr, momentum=0.9)
            if optim.optimizer == "sgd"
            else torch.optim.AdamW(adamw, lr=optim.lr, betas=(0.9, optim.beta2), fused=True)
        ]
        if muon:
            self.members.append(Muon(muon, lr=optim.muon_lr))
        self.peaks = [[group["lr"] for group in member.param_groups] for member in self.members]

    def parameters(self) -> list[Tensor]:
        """The parameters that a step would update: those with a gradient."""
        groups = [group for member in self.members for group in member.param_groups]
        return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]

    def step(self, factor: float) -> None:
        """One step at `factor` times the peak learning rates. Clears the gradients."""
        for member, peaks in zip(self.members, self.peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


class Average:
    """A running average of a module's weights (and a copy of its statistics, such as batch norm's)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update with the weights after `step`. Early decay is lower, or the initial weights would linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        new = module.state_dict()
        floats = [name for name, value in new.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in floats], [new[name] for name in floats], 1 - decay)
        for name in new.keys() - set(floats):
            self.values[name].copy_(new[name])
