"""The published recipes equal their training code: reference values follow its formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from checked import checked
from torch import Tensor, nn

from vitrail.data.loader import Loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.repeats import repeated
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Labels
from vitrail.recipes import RECIPES
from vitrail.sizes import config_for
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.train.lamb import Lamb
from vitrail.train.optim import Optim, Optimizers, factor, groups
from vitrail.train.run import Run
from vitrail.variants.initial import initialise
from vitrail.vit import ViT, ViTConfig

IMAGES = 1_281_167


def published(name: str) -> tuple[Run, int, int]:
    """The run on ImageNet-1k, its steps per epoch and its steps."""
    run = RECIPES[name](IMAGES)
    epoch = IMAGES // run.batch_size
    return run, epoch, run.steps(epoch)


def test_what_the_configs_say() -> None:
    """Batch, epochs, mixing and sizes, as in big_vision's configs and the commands of DeiT-III and the paper."""
    found = {}
    for name in ("vit-s16-90", "augreg-s16", "deit3-s16", "finetune-b16-384"):
        run = RECIPES[name](IMAGES)
        augment, model = run.augment, checked(ViTConfig, run.model)
        loss = checked(Classify.settings, run.task)
        found[name] = (
            (run.batch_size, run.optim.optimizer, augment.mixup, augment.cutmix, augment.scale, augment.flip),
            (loss.hidden, model.class_token, model.pool, model.positions, model.dropout, model.drop_path),
        )
    assert found == {
        "vit-s16-90": ((1024, "adamw", 0.2, 0, (0.05, 1), True), (384, False, "average", "sine", 0, 0)),
        "augreg-s16": ((4096, "adamw", 0.5, 0, (0.05, 1), True), (384, True, "token", "learned", 0, 0)),
        "deit3-s16": ((2048, "lamb", 0.8, 1, (0.08, 1), True), (None, True, "token", "learned", 0, 0.05)),
        "finetune-b16-384": ((512, "sgd", 0, 0, (0.05, 1), True), (None, True, "token", "learned", 0, 0)),
    }


def test_repeated_augmentation_takes_the_batches_of_deits_sampler() -> None:
    """Its RASampler for 8 processes with batches of 32: three copies in turn, of which process r takes every eighth."""
    images, world, own = 1000, 8, 32
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    copies = [image for image in order.tolist() for _ in range(3)]
    processes = [copies[rank::world][: images // 256 * 256 // world] for rank in range(world)]
    made = repeated(order, RECIPES["deit3-s16"](IMAGES).augment.repeats, world * own)
    assert len(made) == images
    for step in range(images // 256):
        batch = made[step * 256 : (step + 1) * 256].view(world, own)
        assert batch.tolist() == [process[step * own : (step + 1) * own] for process in processes]
        assert (batch.view(-1, 2)[:, 0] != batch.view(-1, 2)[:, 1]).all(), "mixup joins different images"
        assert 3 * len(batch.unique()) <= 256 + 4
    assert torch.equal(repeated(order, 1, 256), order)


def test_copies_of_an_image_have_their_own_draws() -> None:
    pixels = torch.full((30, 3, 8, 8), 100, dtype=torch.uint8)
    pixels[:, :, :, 4:] = torch.arange(30, dtype=torch.uint8)[:, None, None, None]
    run = RECIPES["deit3-s16"](IMAGES)
    loader = Loader(
        ImageSet("set", [str(i) for i in range(30)], list(pixels), Labels(torch.arange(30) % 2, ["a", "b"])),
        Preprocess((8, 8)),
        batch_size=24,
        seed=0,
        train=True,
        augment=replace(run.augment, mixup=0.0, cutmix=0.0),
    )
    batch = next(loader.batches())
    numbers, counts = batch["sample"].unique(return_counts=True)
    assert len(numbers) == 8 and (counts == 3).all()
    for number in numbers.tolist():
        first, second, third = batch["image"][batch["sample"] == number]
        assert not torch.equal(first, second) and not torch.equal(second, third)


def googles(total: int, warmup: int) -> Callable[[int], float]:
    """big_vision's and vision_transformer's `create_learning_rate_schedule` with a cosine, as factors."""
    return lambda t: (
        0.5 * (1 + math.cos(math.pi * min(max((t - warmup) / (total - warmup), 0), 1))) * min(1, t / warmup)
    )


def deits(epochs: int, per_epoch: int) -> Callable[[int], float]:
    """timm's `CosineLRScheduler` with DeiT's arguments for a rate of 4e-3, stepped after each epoch."""

    def scheduled(t: int) -> float:
        if t < 5:
            return 1e-6 + t * (4e-3 - 1e-6) / 5
        return 1e-5 + 0.5 * (4e-3 - 1e-5) * (1 + math.cos(math.pi * t / epochs))

    return lambda step: scheduled(max(0, step // per_epoch - 1)) / 4e-3


@pytest.mark.parametrize(
    ("name", "steps", "lr", "warmup", "theirs"),
    [
        ("vit-s16-90", 112_590, 1e-3, 10_000, googles(112_590, 10_000)),
        ("augreg-s16", 93_600, 1e-3, 10_000, googles(93_600, 10_000)),
        ("deit3-s16", 250_000, 4e-3, 6 * 625, deits(400, 625)),
        ("finetune-b16-384", 20_000, 0.03, 500, googles(20_000, 500)),
    ],
)
def test_the_learning_rate_of_every_step(
    name: str, steps: int, lr: float, warmup: int, theirs: Callable[[int], float]
) -> None:
    run, epoch, total = published(name)
    assert (total, run.optim.lr) == (steps, lr)
    chosen = {0, 1, *range(2, total, 997), warmup - 1, warmup, warmup + 1, total // 2, total - 1}
    ours = [factor(run.optim, step, total, epoch) for step in sorted(chosen)]
    assert ours == pytest.approx([theirs(step) for step in sorted(chosen)], rel=1e-9, abs=1e-12)


def test_rates_as_numbers() -> None:
    """The same as figures, so that the formulas of this file cannot be wrong in the same way."""

    def rate(name: str, step: int) -> float:
        run, epoch, total = published(name)
        return run.optim.lr * factor(run.optim, step, total, epoch)

    assert [rate("vit-s16-90", step) for step in (0, 1, 5_000, 10_000)] == pytest.approx([0, 1e-7, 5e-4, 1e-3])
    assert rate("vit-s16-90", 61_295) == pytest.approx(5e-4), "halfway from 10,000 to 112,590"
    assert [rate("finetune-b16-384", step) for step in (0, 250, 500, 10_250)] == pytest.approx([0, 0.015, 0.03, 0.015])
    # Two epochs at the first rate, since the schedule is stepped after an epoch; the cosine starts at epoch 0.
    assert [rate("deit3-s16", 625 * epoch) for epoch in (0, 1, 2, 5)] == pytest.approx(
        [1e-6, 1e-6, 8.008e-4, 3.2002e-3]
    )
    assert rate("deit3-s16", 625 * 6) == pytest.approx(0.00399846, rel=1e-5)
    assert rate("deit3-s16", 625 * 201) == pytest.approx((4e-3 + 1e-5) / 2)
    assert rate("deit3-s16", 249_999) == pytest.approx(rate("deit3-s16", 625 * 399)) == pytest.approx(1e-5, rel=0.03)


def task_of(name: str, classes: int = 10) -> Classify:
    run = RECIPES[name](IMAGES)
    loss = checked(Classify.settings, run.task)
    encoder = encoder_for(checked(ViTConfig, run.model))
    task = Classify(encoder, [str(i) for i in range(classes)], Preprocess(), hidden=loss.hidden, loss=loss.loss)
    initialise(task, run.weights_init)
    return task


@pytest.mark.parametrize(
    ("name", "decay"), [("vit-s16-90", 1e-4), ("augreg-s16", 1e-4), ("deit3-s16", 0.05), ("finetune-b16-384", 0.0)]
)
def test_weight_decay_and_what_it_reaches(name: str, decay: float) -> None:
    """big_vision decays kernels by 1e-4 times the schedule, not the rate; DeiT all but vectors and its tables."""
    run, task = RECIPES[name](IMAGES), task_of(name)
    members, _ = groups(task, run.optim)
    decayed = {id(p): group["weight_decay"] for group in members for p in group["params"]}
    for path, parameter in task.named_parameters():
        kernel = path.endswith(".weight") and "norm" not in path
        assert (decayed[id(parameter)] > 0) == (kernel and decay > 0), path
    peak = run.optim.lr if run.optim.optimizer == "adamw" else 1.0
    assert max(decayed.values()) * peak == pytest.approx(decay)


def test_adamw_is_optaxs_chain_of_adam_and_independent_decay() -> None:
    """clip_by_global_norm, scale_by_adam, scale by the rate, add 1e-4 of the weights, scale by the schedule."""
    torch.manual_seed(0)
    task = nn.Linear(5, 7)
    weight = task.weight.detach().double()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    optim = RECIPES["vit-s16-90"](IMAGES).optim
    optimizer = torch.optim.AdamW([task.weight], lr=optim.lr, betas=(0.9, optim.beta2), weight_decay=optim.weight_decay)
    for step, scheduled in enumerate((0.0, 0.3, 1.0), 1):
        task.weight.grad = torch.randn_like(task.weight)
        gradient = task.weight.grad.double()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        adam = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight - scheduled * (1e-3 * adam + 1e-4 * weight)
        optimizer.param_groups[0]["lr"] = optim.lr * scheduled
        optimizer.step()
        torch.testing.assert_close(task.weight.double(), weight, atol=1e-7, rtol=1e-6)


def lamb_in_double(
    weights: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], decays: Sequence[float], rates: Sequence[float]
) -> list[Tensor]:
    """Algorithm 2 of arXiv 1904.00962 as apex has it: clipping at 1, bias correction, a ratio where there is decay."""
    weights = [weight.double() for weight in weights]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step, (found, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in found))
        for i, g in enumerate(found):
            gradient = g.double() / max(1.0, norm)
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
            update = means[i] / (1 - 0.9**step) / (torch.sqrt(squares[i] / (1 - 0.999**step)) + 1e-8)
            update = update + decays[i] * weights[i]
            ratio = float(weights[i].norm() / update.norm()) if decays[i] and weights[i].norm() > 0 else 1.0
            weights[i] = weights[i] - rate * ratio * update
    return weights


@pytest.mark.parametrize("steps", [1, 3])
def test_lambs_steps(steps: int) -> None:
    torch.manual_seed(1)
    shapes = ((24, 8), (8, 24), (5,), (3, 4))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    with torch.no_grad():
        parameters[3].zero_()  # no ratio: the norm of its weights is 0
    decays, rates = (0.05, 0.05, 0.0, 0.05), (4e-3, 3e-3, 1e-3)[:steps]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(steps)]
    expected = lamb_in_double([p.detach() for p in parameters], gradients, decays, rates)
    before = [p.detach().clone() for p in parameters]
    members = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays, strict=True)]
    ours = Lamb(members)
    for found, rate in zip(gradients, rates, strict=True):
        norm = torch.stack([g.norm() for g in found]).norm()
        for group, p, g in zip(ours.param_groups, parameters, found, strict=True):
            group["lr"], p.grad = rate, g / norm.clamp(min=1)
        ours.step()
    for p, old, wanted in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close((p - old).double(), wanted - old.double(), atol=3e-7, rtol=1e-4)


def test_lamb_equals_timms() -> None:
    theirs = pytest.importorskip("timm.optim").Lamb
    torch.manual_seed(2)
    a = [nn.Parameter(torch.randn(shape)) for shape in ((6, 9), (4,))]
    b = copy.deepcopy(a)
    settings = [{"params": [p], "weight_decay": decay} for p, decay in zip(a, (0.05, 0.0), strict=True)]
    ours = Lamb(settings, lr=4e-3)
    other = theirs(
        [{"params": [p], "weight_decay": decay} for p, decay in zip(b, (0.05, 0.0), strict=True)],
        lr=4e-3,
        eps=1e-8,
        max_grad_norm=None,
    )
    for _ in range(3):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step(), other.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
def test_a_compiled_step_of_lamb_is_the_same() -> None:
    torch.manual_seed(4)
    a = [nn.Parameter(torch.randn(shape)) for shape in ((6, 9), (4,))]
    b = copy.deepcopy(a)
    first = Lamb([{"params": [p], "weight_decay": 0.05 * (p.ndim - 1)} for p in a], compile=True)
    second = Lamb([{"params": [p], "weight_decay": 0.05 * (p.ndim - 1)} for p in b])
    for good in (False, True, True):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step(good=torch.tensor(good)), second.step(good=torch.tensor(good))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_a_bad_step_of_lamb_moves_nothing_and_does_not_count() -> None:
    task = task_of("deit3-s16")
    optim = Optim(optimizer="lamb", lr=0.1)
    first, second = Optimizers(task, optim), Optimizers(other := copy.deepcopy(task), optim)
    torch.manual_seed(0)
    gradients = [torch.randn_like(p) for p in first.parameters]
    start = [p.detach().clone() for p in first.parameters]
    first.step([torch.full_like(g, math.nan) for g in gradients], 1.0, torch.tensor(False))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters, start, strict=True))
    first.step(gradients, 1.0, torch.tensor(True))
    second.step(gradients, 1.0, torch.tensor(True))
    for p, q in zip(task.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(first.parameters[0], start[0])
    restored = Optimizers(task, optim)
    restored.load_state_dict(copy.deepcopy(first.state_dict()))
    restored.step(gradients, 1.0, torch.tensor(True))
    second.step(gradients, 1.0, torch.tensor(True))
    assert all(torch.equal(p, q) for p, q in zip(task.parameters(), other.parameters(), strict=True))


XAVIER = {"attention.qkv": (2 / 768) ** 0.5, "attention.out": (2 / 768) ** 0.5, "mlp": (2 / (384 + 1536)) ** 0.5}
STATISTICS: dict[str, dict[str, float]] = {
    "vit-s16-90": {
        **{f"encoder.blocks.*.{name}": std for name, std in XAVIER.items() if name != "mlp"},
        **{f"encoder.blocks.*.mlp.{name}": XAVIER["mlp"] for name in ("up", "down")},
        "encoder.patches.projection": (1 / 768) ** 0.5,
        "head.hidden.0": (1 / 384) ** 0.5,
        "head.linear": 0.0,
    },
    "deit3-s16": {
        **{f"encoder.blocks.*.{name}": 0.02 for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")},
        "encoder.patches.projection": (1 / 768 / 3) ** 0.5,  # uniform in plus and minus 1 / sqrt(inputs)
        "head.linear": 0.02,
    },
}
STATISTICS["augreg-s16"] = STATISTICS["vit-s16-90"]


@pytest.mark.parametrize("name", STATISTICS)
def test_initial_statistics_of_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    task, deit = task_of(name, classes=1000), name == "deit3-s16"
    tables = {"vit-s16-90": (), "augreg-s16": (0.0, 384**-0.5), "deit3-s16": (0.02, 0.02)}[name]
    shapes = {path: parameter.shape for path, parameter in task.named_parameters()}
    assert shapes.get("encoder.positions", (1, 196, 384)) == (1, 196, 384), "positions of patches alone, if any"
    for path, parameter in task.named_parameters():
        module, _, kind = path.rpartition(".")
        module = ".".join("*" if word.isdigit() and "blocks" in path else word for word in module.split("."))
        values, own = parameter.detach(), parameter.detach().std(unbiased=False).item()
        if kind in ("class_token", "positions"):
            wanted = tables[kind == "positions"]
            assert own == pytest.approx(wanted, rel=0.1 if kind == "class_token" else 0.02), path
        elif "norm" in module:
            assert (values == (kind == "weight")).all(), path
        elif "scale" in path:
            assert (values == 1e-4).all(), path
        elif kind == "weight":
            assert own == pytest.approx(STATISTICS[name][module], rel=0.02), path
            assert abs(values.mean().item()) <= 4 * own / values.numel() ** 0.5, path
        elif "mlp" in module and not deit:
            assert own == pytest.approx(1e-6, rel=0.15), path
        elif module == "encoder.patches.projection" and deit:
            assert own == pytest.approx((1 / 768 / 3) ** 0.5, rel=0.1), path
        else:
            assert (values == 0).all(), path


def test_fixed_positions_are_big_visions() -> None:
    """`posemb_sincos_2d`: sine and cosine of the column, then of the row, at 96 frequencies from 1 to 1e-4."""
    encoder = checked(ViT, task_of("vit-s16-90").encoder)
    made = encoder.positions_for((14, 14))[0]
    for row, column, place in ((0, 0, 0), (3, 11, 53), (13, 13, 195)):
        for i in (0, 1, 50, 95):
            frequency = 1e4 ** -(i / 95)
            wanted = [f(p * frequency) for p in (column, row) for f in (math.sin, math.cos)]
            assert made[place, i::96].tolist() == pytest.approx(wanted, abs=1e-5)


def test_sgd_is_optaxs_trace_after_clipping_by_the_global_norm() -> None:
    torch.manual_seed(0)
    task, optim = task_of("finetune-b16-384", classes=3), RECIPES["finetune-b16-384"](IMAGES).optim
    optimizers = Optimizers(task, optim)
    first = optimizers.parameters[0]
    weight, trace = first.detach().double(), torch.zeros_like(first, dtype=torch.float64)
    for scheduled in (0.0, 0.5, 1.0):
        gradients = [torch.randn_like(p) for p in optimizers.parameters]
        trace = gradients[0].double() + 0.9 * trace
        weight = weight - 0.03 * scheduled * trace
        optimizers.step(gradients, scheduled, torch.tensor(True))
        torch.testing.assert_close(first.detach().double(), weight, atol=1e-7, rtol=1e-5)


def test_truncated_normals_are_cut_where_jax_cuts_them() -> None:
    torch.manual_seed(0)
    weight = task_of("vit-s16-90").get_parameter("encoder.patches.projection.weight").detach()
    std = weight.std().item()
    assert weight.abs().max().item() == pytest.approx(2 / 0.87962566 * std, rel=0.01)


def test_the_papers_own_initial_weights_stay() -> None:
    torch.manual_seed(3)
    encoder = encoder_for(config_for("nano/2"))
    before = copy.deepcopy(encoder.state_dict())
    initialise(encoder, "google")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", ["vit-s16-90", "augreg-s16", "deit3-s16", "finetune-b16-384"])
def test_loss_and_clipping(name: str) -> None:
    run = RECIPES[name](IMAGES)
    assert run.optim.clip == 1.0
    task = task_of(name, classes=5)
    assert (task.loss_kind, task.smoothing) == ("sigmoid" if name == "deit3-s16" else "softmax", 0.0)
    logits, targets = torch.randn(4, 5), torch.tensor([[0.3, 0.7, 0, 0, 0]] * 4)
    found = task._losses(logits, targets)
    if name == "deit3-s16":  # targets above 0 become 1, and the mean is over classes too
        wanted = nn.functional.binary_cross_entropy_with_logits(logits, (targets > 0).float(), reduction="none").mean(1)
    else:
        wanted = -(targets * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(found, wanted)
