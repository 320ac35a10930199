"""Progress fits a terminal of 80 columns, tells the epoch, and its times cannot be misread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vitrail.tasks.values import Score
from vitrail.train import progress
from vitrail.train.progress import Progress
from vitrail.units import time_left


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(progress, "time", own)
    return own


def made(steps: int, per_epoch: int, start: int = 0) -> Progress:
    loader: Any = SimpleNamespace(wait=0.0, steps_per_epoch=per_epoch)
    return Progress(steps, start, loader)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.2, "0 s left"),
        (59.4, "59 s left"),
        (59.6, "1 min left"),
        (857, "14 min left"),
        (3595, "1 h 0 min left"),
        (7505, "2 h 5 min left"),
        (100_000, "1 d 3 h left"),
    ],
)
def test_times_have_units(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


@pytest.mark.parametrize("loss, speed", [(0.5, 4), (123456.789, 1_000_000), (float("nan"), 0)])
@pytest.mark.parametrize("width", [48, 73, 200])
def test_a_line_fits_the_terminal_and_keeps_what_matters_most(
    loss: float, speed: int, width: int, clock: Clock
) -> None:
    bar = made(1_000_000, 1_234)
    bar.score = "val mask_average_precision 100.00 %"
    bar.loader.wait = 400.0
    clock.now = 1000.0
    bar.step({"loss": loss}, speed * 1000)
    line = bar._fitted(width)
    assert len(line) <= width and line.startswith("vitrail: epoch 0.0/810.4") and line.endswith(" h left")
    assert ("images/s" in line) == (width == 200) == ("40% waiting for data" in line)


def test_without_a_terminal_there_is_a_line_now_and_then_and_no_control_character(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with made(100_000, 1_000, start=200) as bar:
        for _ in range(2_000):
            clock.now += 10.0
            bar.step({"loss": 2.0}, 640)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "vitrail: epoch 0.2 of 100, step 204 of 100,000: loss 2.000, 64 images/s, 11 d 13 h left"
    assert 30 < len(lines) < 150, "more at first, and fewer for each hour of a long run"
    assert all(line.startswith("vitrail: ") and line.isprintable() and line.isascii() for line in lines)


def test_a_score_names_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    bar = made(10, 20)
    bar.step({"loss": 1.0}, 4)
    bar.evaluated({"top1": 0.5}, Score("top1", unit="%"))
    assert capsys.readouterr().err == "vitrail: epoch 0.05 of 0.5, step 1 of 10: val top1 50.00 %\n"
    bar.step({"loss": 1.0}, 4)
    assert "val top1 50.00 %" in bar._fitted(73)
    bar.evaluated({"top1": None}, Score("top1", unit="%"))
    assert capsys.readouterr().err.endswith("val top1 none\n")


def test_nothing_is_known_of_the_loss_while_steps_are_skipped(clock: Clock) -> None:
    bar = made(10, 5)
    clock.now = 1.0
    bar.skip(4)
    assert "no loss" in bar._fitted(73) and bar.row()["skipped"] == 1
