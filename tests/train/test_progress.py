"""Progress fits a terminal of 80 columns, tells the epoch, and its times cannot be misread."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
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


@pytest.mark.parametrize(
    "step, steps, per_epoch, place",
    [(20, 20, 7, "epoch 2.9 of 2.9"), (1, 2, 458, "epoch 0.0022 of 0.0044"), (7, 14, 7, "epoch 1.0 of 2")],
)
def test_epochs_so_far_and_in_all_are_rounded_alike(step: int, steps: int, per_epoch: int, place: str) -> None:
    bar = made(steps, per_epoch)
    bar.done = step
    assert bar.place() == f"{place}, step {step} of {steps}"


def test_a_score_names_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    bar = made(10, 20)
    bar.step({"loss": 1.0}, 4)
    bar.evaluated({"top1": 0.5}, Score("top1", unit="%"), 1.0)
    assert capsys.readouterr().err == "vitrail: epoch 0.05 of 0.5, step 1 of 10: val top1 50.00 %\n"
    bar.step({"loss": 1.0}, 4)
    assert "val top1 50.00 %" in bar._fitted(73)
    bar.evaluated({"top1": None}, Score("top1", unit="%"), 1.0)
    assert capsys.readouterr().err.endswith("val top1 none\n")


def test_the_time_of_an_evaluation_is_no_training(clock: Clock) -> None:
    bar = made(10, 5)
    clock.now = 2.0
    bar.step({"loss": 1.0}, 40)
    bar.loader.wait, clock.now = 1.0, 102.0
    bar.evaluated({"top1": 0.5}, Score("top1", unit="%"), 100.0)
    row = bar.row()
    assert (row["images_per_s"], row["wait"]) == (20.0, 0.5)


def test_steps_before_a_resume_have_no_speed_in_the_row_after_it(clock: Clock) -> None:
    loader: Any = SimpleNamespace(wait=0.0, steps_per_epoch=5)
    row = Progress(10, 3, loader, {"steps": 2.0, "loss": 3.0}).row()
    assert row == {"loss": 1.5, "skipped": 0}


def test_nothing_is_known_of_the_loss_while_steps_are_skipped(clock: Clock) -> None:
    bar = made(10, 5)
    clock.now = 1.0
    bar.skip(4)
    assert "no loss" in bar._fitted(73) and bar.row()["skipped"] == 1


BAR = """
import logging, sys, time
from types import SimpleNamespace
from vitrail.standard_error import own_lines
from vitrail.tasks.values import Score
from vitrail.train.progress import Progress

with own_lines(), Progress(60, 0, SimpleNamespace(wait=0.0, steps_per_epoch=6)) as bar:
    for i in range(60):
        bar.step({"loss": 12.5}, 64)
        time.sleep(0.01)
        if i == 30:
            logging.getLogger("vitrail").warning("hint: lower the rate")
            bar.evaluated({"top1": 0.25}, Score("top1", unit="%"), 0.0)
"""


def on_terminal(columns: int, **environment: str) -> str:
    """What a terminal of so many columns gets from the bar."""
    reason = "Windows has no pseudo-terminals"
    pty, fcntl, termios = (pytest.importorskip(name, reason=reason) for name in ("pty", "fcntl", "termios"))
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    here = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", BAR], stdin=theirs, stdout=theirs, stderr=theirs, env={**here, **environment}
    )
    os.close(theirs)
    found = b""
    with contextlib.suppress(OSError):  # Linux raises EIO at the end
        while data := os.read(mine, 65536):
            found += data
    os.close(mine)
    assert child.wait() == 0
    return found.decode()


@pytest.mark.slow
def test_on_a_terminal_each_frame_is_one_line_and_other_lines_stay_whole() -> None:
    written = on_terminal(80, TERM="xterm-256color", PYTHONIOENCODING="utf-8")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert max(map(len, lines)) <= 80
    assert all(line.startswith("vitrail: ") for line in lines)
    assert (
        "vitrail: hint: lower the rate" in lines
        and "vitrail: epoch 5.2 of 10, step 31 of 60: val top1 25.00 %" in lines
    )
    assert any("epoch 10.0/10  loss 12.500  val top1 25.00 %" in line and "left" in line for line in lines)
    plain = on_terminal(80, TERM="xterm", NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert not re.search(r"\x1b\[[0-9;]*[39][0-9;]*m", plain), "no colours"
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", plain).isascii(), "no characters that the terminal lacks"


@pytest.mark.slow
def test_a_terminal_that_moves_no_cursor_gets_lines() -> None:
    written = on_terminal(80, TERM="dumb")
    assert "\x1b" not in written and "step 31 of 60: val top1" in written
