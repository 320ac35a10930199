"""Several processes train as one does: the same draws, losses, weights and scores, and a state that any can resume."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import toys
from images import folder_of
from processes import in_ranks
from torch import Tensor

import vitrail
from vitrail.baselines.cnn import ResNetConfig
from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, Splits, open_data
from vitrail.data.targets import Labels, Texts
from vitrail.errors import Stopped, UserError
from vitrail.tasks import TASKS
from vitrail.tasks.caption import Captioning
from vitrail.tasks.segment import Segmentation
from vitrail.train import loop, muon, parallel
from vitrail.train.build import build, check_micro_batches
from vitrail.train.folder import Follower, RunFolder
from vitrail.train.frozen import fit_frozen
from vitrail.train.joined import scores_of_all
from vitrail.train.loop import evaluate, fit
from vitrail.train.optim import Optim
from vitrail.train.parallel import ALONE, World, buckets
from vitrail.train.run import Run
from vitrail.train.step import AsyncScalars, train_step
from vitrail.train.tune import Tune
from vitrail.vit import ViTConfig

CPU = torch.device("cpu")
AUGMENT = Augment(crop="shift", shift=1, flip=True, mixup=0.3, erase=0.2)
VIT = ViTConfig(16, 1, 2, 4, (8, 8), channels=1, drop_path=0.2)


class Told(NamedTuple):
    """What a run tells of itself."""

    samples: list[list[int]]
    """of each step, this rank's images"""
    rows: list[dict[str, float]]
    """the scalars of each step"""
    scores: dict[str, Any]
    weights: dict[str, Tensor]


def run_of(**changes: Any) -> Run:
    values: dict[str, Any] = {"recipe": "digits", "data": "digits", "model": VIT, "augment": AUGMENT, "batch_size": 32}
    values |= {"optim": Optim("muon", lr=0.01, muon_lr=0.01, ema=0.9, clip=1.0)}
    values |= {"eval_every": 0.1, "workers": 0, "precision": "fp32"}
    return Run(**(values | changes))


def digits() -> Splits:
    splits = open_data("digits")
    assert splits.test is not None
    return Splits(splits.train.spread(300), test=splits.test.spread(300))


def trained(
    world: World,
    run: Run,
    splits: Callable[[], Splits],
    path: Path,
    *,
    steps: int = 6,
    stop: int | None = None,
    resume: bool = False,
) -> Told:
    """Train for some steps, as one of the processes of `world`. The last rank is told to stop in the step `stop`."""
    samples: list[list[int]] = []
    rows: list[dict[str, float]] = []

    def noted(run: Run, module: Any, batch: Any, *rest: Any) -> AsyncScalars:
        samples.append(batch["sample"].tolist())
        if len(samples) == stop and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        scalars = train_step(run, module, batch, *rest)
        rows.append(scalars.read())
        return scalars

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", noted)
        patch.setattr(muon, "native_bf16", lambda device: False)  # whose rounding would drown the differences
        components, _ = build(run, splits(), CPU, world=world)
        folder = RunFolder(path) if world.is_main else Follower(path)
        if not resume:
            folder.begin(run, components.task.classes)
        scores: dict[str, Any] = {}
        with nullcontext() if stop is None else pytest.raises(Stopped):
            scores = fit(run, components, folder, steps, resume)
    weights = {name: value.clone() for name, value in components.task.state_dict().items()}
    return Told(samples, rows, {k: v for k, v in scores.items() if k not in ("seconds", "parameters")}, weights)


def assert_as_one(one: Told, ranks: list[Told], rtol: float = 1e-3) -> None:
    """The draws of one process, split; its losses and norms within rounding; the same weights on every rank."""
    for step, samples in enumerate(one.samples):
        assert sorted(sample for rank in ranks for sample in rank.samples[step]) == sorted(samples)
        assert len({len(rank.samples[step]) for rank in ranks}) == 1
    for rank in ranks:
        for row, expected in zip(rank.rows, one.rows, strict=True):
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=rtol, abs=1e-6), name
        for name, weight in rank.weights.items():
            assert torch.equal(weight, ranks[0].weights[name]), name
        assert json.dumps(rank.scores) == json.dumps(ranks[0].scores)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Mixup, dropped branches, Muon, clipping and the average among them; and either's state continues in the other."""
    run = run_of()
    one = trained(ALONE, run, digits, tmp_path / "one")
    two = in_ranks(2, False, trained, run, digits, tmp_path / "two")
    assert_as_one(one, two)
    for name, value in one.weights.items():
        torch.testing.assert_close(two[0].weights[name], value, rtol=1e-3, atol=1e-4)


def test_a_signal_in_the_last_step_stops_all_and_keeps_it(tmp_path: Path) -> None:
    """Slurm would else end the scoring of the test split, with an exit code that queues nothing again."""
    run, path = run_of(eval_every=10.0), tmp_path / "run"
    assert [len(told.rows) for told in in_ranks(2, False, trained, run, digits, path, stop=6)] == [6, 6]
    back = trained(ALONE, run, digits, path, resume=True)
    assert not back.rows and back.scores["top1"] == trained(ALONE, run, digits, tmp_path / "one").scores["top1"]


@pytest.mark.parametrize("eval_every, steps", [(10.0, 4), (0.1, 2)])
def test_what_one_layout_saved_continues_in_another(tmp_path: Path, eval_every: float, steps: int) -> None:
    """One of two processes gets the signal, and both stop after the same step.

    The step after the signal tells all ranks of it, and the next one is the last. Before an evaluation they ask.
    """
    run, one, two = run_of(eval_every=eval_every), tmp_path / "one", tmp_path / "two"
    whole = trained(ALONE, run, digits, tmp_path / "whole")
    assert len(trained(ALONE, run, digits, one, stop=4).rows) == 4
    stopped = in_ranks(2, False, trained, run, digits, two, stop=2)
    assert [len(told.rows) for told in stopped] == [steps, steps]
    back = trained(ALONE, run, digits, two, resume=True)
    forth = in_ranks(2, False, trained, run, digits, one, resume=True)
    for told in (back, *forth):
        rest = whole.rows[-len(told.rows) :]
        assert [row["loss"] for row in told.rows] == pytest.approx([row["loss"] for row in rest], rel=1e-3)
        assert told.scores["top1"] == whole.scores["top1"]


def test_batch_norm_micro_batches_and_sgd(tmp_path: Path) -> None:
    """Statistics are those of each micro-batch over all processes, in training and in what is saved."""
    model = ResNetConfig(widths=(4, 8), depth=1, strides=(1, 2), image_size=(8, 8), channels=1)
    run = run_of(model=model, accumulate=2, optim=Optim("sgd", lr=0.05), augment=Augment())
    one = trained(ALONE, run, digits, tmp_path / "one")
    two = in_ranks(2, False, trained, run, digits, tmp_path / "two")
    assert_as_one(one, two)
    names = [name for name in one.weights if "running" in name]
    assert names
    for name in names:
        torch.testing.assert_close(two[0].weights[name], one.weights[name], rtol=1e-3, atol=1e-5)


def colours(target: Callable[[int], Any], count: int = 20) -> Splits:
    """Random images, of which the last ones are for validation, with what `target` makes for so many."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 255, (3, 8, 8), generator=generator).to(torch.uint8) for _ in range(count)]
    every = ImageSet("colours", [str(i) for i in range(count)], images, target(count))
    return Splits(every.subset(range(count - 6)), every.subset(range(count - 6, count)))


def captions(count: int) -> Texts:
    """One or two captions per image, of other lengths."""
    return Texts([[" ".join(["a dog"] * (1 + (i + k) % 4)) for k in range(1 + i % 2)] for i in range(count)])


def masks(count: int) -> Masks:
    """Some pixels are void, more in some images than in others."""
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(0, 2, (8, 8), generator=generator).to(torch.uint8) for _ in range(count)]
    for i, mask in enumerate(each):
        mask[: i % 7] = 255
    return Masks(each, [str(i) for i in range(count)], ["dark", "light"])


COLOURS: dict[str, Any] = {"model": replace(VIT, channels=3), "batch_size": 8, "augment": Augment(flip=True)}
SMALL: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "decoder_dropout": 0.0}


@pytest.mark.parametrize("contrastive", [0.0, 0.5])
def test_captions_whose_words_are_counted_over_all(tmp_path: Path, contrastive: float) -> None:
    """Each process has other numbers of words; with a contrastive loss each sees the rows of all."""
    task = Captioning(**SMALL, word_dropout=0.0, most_words=8, contrastive=contrastive, text_depth=1)
    run = run_of(**COLOURS, task=task, accumulate=1 if contrastive else 2)
    data = partial(colours, captions)
    one = trained(ALONE, run, data, tmp_path / "one")
    two = in_ranks(2, False, trained, run, data, tmp_path / "two")
    assert_as_one(one, two)


def test_segmentation_counts_the_pixels_of_all(tmp_path: Path) -> None:
    run = run_of(**COLOURS, task=Segmentation(head="mask-transformer", head_blocks=1, dice=1.0), accumulate=2)
    data = partial(colours, masks)
    one = trained(ALONE, run, data, tmp_path / "one")
    two = in_ranks(2, False, trained, run, data, tmp_path / "two")
    assert_as_one(one, two)


def labels(count: int) -> Labels:
    return Labels(torch.arange(count) % 2, ["a", "b"])


def twins_trained(world: World, path: Path) -> Told:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "twins", "toys:Twins")
        return trained(world, run_of(**COLOURS, task=toys.MatchSettings()), partial(colours, labels), path)


def test_a_loss_of_the_whole_batch_gathers(tmp_path: Path) -> None:
    one = twins_trained(ALONE, tmp_path / "one")
    two = in_ranks(2, False, twins_trained, tmp_path / "two")
    assert_as_one(one, two)
    assert two[0].scores["distance"] == pytest.approx(one.scores["distance"], rel=1e-3)


@pytest.mark.parametrize(
    "optimizer", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lamb", "sgd"))]
)
def test_shared_weights_train_as_whole_ones(tmp_path: Path, optimizer: Any) -> None:
    """FSDP2, with micro-batches, clipping and the average; its state continues in one process, and the reverse."""
    optim = Optim(optimizer, lr=0.01, muon_lr=0.01, ema=0.9, clip=1.0, layer_decay=0.9)
    run, one, two = run_of(optim=optim, accumulate=2), tmp_path / "one", tmp_path / "two"
    whole = trained(ALONE, run, digits, tmp_path / "whole")
    shared = in_ranks(2, True, trained, run, digits, tmp_path / "shared")
    assert_as_one(whole, shared)
    for name, value in whole.weights.items():
        torch.testing.assert_close(shared[0].weights[name], value, rtol=1e-3, atol=1e-4)
    trained(ALONE, run, digits, one, stop=4)
    in_ranks(2, True, trained, run, digits, two, stop=2)
    back = trained(ALONE, run, digits, two, resume=True)
    forth = in_ranks(2, True, trained, run, digits, one, resume=True)
    for told in (back, *forth):
        rest = whole.rows[-len(told.rows) :]
        assert [row["loss"] for row in told.rows] == pytest.approx([row["loss"] for row in rest], rel=1e-3)
        assert told.scores["top1"] == whole.scores["top1"]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_four_processes_train_as_one(tmp_path: Path, shard: bool) -> None:
    """The last ranks have no rows of small weights, where the weights are shared out."""
    run = run_of(accumulate=2)
    one = trained(ALONE, run, digits, tmp_path / "one")
    assert_as_one(one, in_ranks(4, shard, trained, run, digits, tmp_path / "four"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["batch norm", "captions"])
def test_shared_weights_with_batch_norm_and_with_scalars(tmp_path: Path, model: str) -> None:
    """Contrastive captions have a temperature of one number, which FSDP2 does not share out."""
    resnet = ResNetConfig(widths=(4, 8), depth=1, strides=(1, 2), image_size=(8, 8), channels=1)
    run, data = run_of(model=resnet, accumulate=2, augment=Augment()), digits
    if model == "captions":
        task = Captioning(**SMALL, word_dropout=0.0, most_words=8, contrastive=0.5, text_depth=1)
        run, data = run_of(**COLOURS, task=task), partial(colours, captions)
    one = trained(ALONE, run, data, tmp_path / "one")
    assert_as_one(one, in_ranks(2, True, trained, run, data, tmp_path / "two"))


def solved(world: World, run: Run, path: Path) -> dict[str, Any]:
    components, _ = build(run, digits(), CPU, world=world)
    folder = RunFolder(path) if world.is_main else Follower(path)
    folder.begin(run, components.task.classes)
    return fit_frozen(run, components, folder)


@pytest.mark.parametrize("method", ["knn", pytest.param("frozen", marks=pytest.mark.slow)])
def test_frozen_features_are_computed_in_shares(tmp_path: Path, method: Any) -> None:
    start = vitrail.create("nano/2", classes=[str(i) for i in range(10)])
    start.save(tmp_path / "start")
    run = run_of(init=str(tmp_path / "start"), tune=Tune(method), augment=Augment(), batch_size=64)
    one = solved(ALONE, run, tmp_path / "one")
    for scores in in_ranks(2, False, solved, run, tmp_path / "two"):
        assert {name: scores[name] for name in ("top1", "count", "confusion")} == {
            name: one[name] for name in ("top1", "count", "confusion")
        }


def left_out(world: World, run: Run, root: Path, max_bad: float) -> list[int] | str:
    """The bad images that a rank knows after an epoch, or the error."""
    whole = open_data(root).train
    components, _ = build(replace(run, max_bad=max_bad), Splits(whole, whole.subset([0, 12])), CPU, world=world)
    batches = components.train.batches()
    try:
        for _ in range(components.train.steps_per_epoch):
            next(batches)
        world.share_bad(components.train)
    except UserError as error:
        return str(error)
    return sorted(components.train.bad)


def test_bad_images_count_over_all_processes(tmp_path: Path) -> None:
    """Each rank finds others; both know all after an evaluation, and both refuse when they are too many."""
    root = folder_of(tmp_path / "data", {"a": 12, "b": 12}, (8, 8))
    names = ["a/1.jpg", "b/2.jpg", "b/7.jpg"]
    for name in names:
        (root / name).write_bytes(f"no image, but {name}".encode())  # equal files would be in one split
    run = run_of(**{**COLOURS, "batch_size": 4}, memory=False, max_bad=0.2, eval_every=1.0)
    one = left_out(ALONE, run, root, 0.2)
    assert one == [open_data(root).train.keys.index(name) for name in names]
    assert in_ranks(2, False, left_out, run, root, 0.2) == [one, one]
    for told in in_ranks(2, False, left_out, run, root, 0.1):  # neither found as many alone
        assert "3 of 24 images of" in str(told) and "more than 10.0%" in str(told)


def scored(world: World) -> str:
    """The error of an evaluation that rank 1 cannot finish."""

    def score(make: Callable[[], Any]) -> dict[str, Any]:
        metric = make()
        if world.rank == 1:
            raise UserError("4 of 9 images are bad")
        return metric.compute()

    with pytest.raises(UserError) as found:
        scores_of_all(world, lambda: toys.MeanIoU(), score)
    return str(found.value)


def test_an_evaluation_that_one_process_cannot_finish_ends_on_all() -> None:
    assert in_ranks(2, False, scored) == ["4 of 9 images are bad"] * 2


def messages_of(world: World, run: Run, path: Path) -> int:
    """How many sums over the processes a short training asks for."""
    calls: list[object] = []
    all_reduce = dist.all_reduce

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(args)
        return all_reduce(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        trained(world, run, digits, path, steps=2)
    return len(calls)


def test_micro_batches_send_no_more_messages(tmp_path: Path) -> None:
    """The sums of gradients are those of a step, after its last micro-batch."""
    one, four = (in_ranks(2, False, messages_of, run_of(accumulate=count), tmp_path / str(count)) for count in (1, 4))
    assert one == four and one[0] > 0


def scores_of(world: World, run: Run, splits: Callable[[], Splits]) -> dict[str, Any]:
    components, _ = build(replace(run, batch_size=12), splits(), CPU, world=world)
    components.val.batch_size = 5  # so that the processes get other numbers of batches, and the last one is short
    return evaluate(components.task, components.loaders, "val", world=world)


@pytest.mark.parametrize("kind", ["classes", "captions", "masks"])
def test_the_same_weights_have_the_same_scores_to_the_last_bit(kind: str) -> None:
    """Of 23 digits, three processes score 10, 8 and 5; of 6 other images, 5, 1 and none."""
    cases: dict[str, tuple[Run, Callable[[], Splits]]] = {
        "classes": (run_of(), digits),
        "captions": (run_of(**COLOURS, task=Captioning(**SMALL, most_words=8)), partial(colours, captions)),
        "masks": (run_of(**COLOURS, task=Segmentation()), partial(colours, masks)),
    }
    run, splits = cases[kind]
    one = scores_of(ALONE, run, splits)
    assert one["count"] == (23 if kind == "classes" else 6)
    assert in_ranks(3, False, scores_of, run, splits) == [one] * 3


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    world = World(0, 2, "cpu")
    with pytest.raises(
        UserError, match="a batch of 9 cannot be divided among 2 processes: set --batch-size to 8 or 10"
    ):
        Loader(digits().train, Preprocess((8, 8), channels=1), batch_size=9, seed=0, train=True, world=2)
    loader = Loader(digits().train, Preprocess((8, 8), channels=1), batch_size=8, seed=0, train=True, world=2)
    with pytest.raises(UserError, match="8 micro-batches of 4 images per process and step: lower --accumulate"):
        check_micro_batches(run_of(accumulate=8), loader)
    assert world.is_main and not World(1, 2).is_main


def summed(world: World) -> list[float | None]:
    weights = [torch.zeros(2) for _ in range(3)]
    own: list[Tensor | None] = [torch.ones(2), torch.ones(2) if world.rank else None, None]
    return [None if one is None else float(one.sum()) for one in world.sum_given(own, weights)]


def test_gradients_that_one_process_lacks_count_as_zero() -> None:
    """A loss may leave weights out for some images, as void masks do; a weight that none uses stays without."""
    assert in_ranks(2, False, summed) == [[4.0, 2.0, None]] * 2


def test_messages_are_of_bounded_size_and_one_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BUCKET", 40)
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in ((4, torch.float32), (6, torch.float32), (3, torch.float64))]
    assert [[len(tensor) for tensor in group] for group in buckets(tensors)] == [[4, 6], [3]]
    assert [[len(tensor) for tensor in group] for group in buckets([*tensors[:2], torch.zeros(1)])] == [[4, 6], [1]]


def gathered(world: World, uneven: bool) -> tuple[list[list[float]], list[list[float]]]:
    own = (torch.arange(2.0 + uneven * world.rank)[:, None] + 10 * world.rank).requires_grad_()
    every = world.gather(own)
    (every.square().sum() * (1 + world.rank)).backward()
    assert own.grad is not None
    return every.tolist(), own.grad.tolist()


@pytest.mark.parametrize("uneven", [False, True])
def test_rows_are_gathered_with_their_gradients(uneven: bool) -> None:
    (rows, first), (same, second) = in_ranks(2, False, gathered, uneven)
    assert rows == same == [[0.0], [1.0], [10.0], [11.0], *([[12.0]] if uneven else [])]
    # The losses of both ranks are functions of all rows, with the factors 1 and 2.
    assert [*first, *second] == [[6 * row[0]] for row in rows]
