"""Ctrl-C and the signals of schedulers: a training ends after its step, with its state saved."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from vitrail.errors import Preempted, RunError, Stopped
from vitrail.process import PREEMPTING, handled

log = logging.getLogger("vitrail")


class Halt(Exception):
    """Ends a training between two steps; `outcome` is what the command ends with.

    Its state can be saved there, unless `alone`: then the other processes are in the next step already.
    """

    def __init__(self, outcome: type[Stopped | RunError], reason: str = "stopped", alone: bool = False) -> None:
        super().__init__(reason)
        self.outcome, self.alone = outcome, alone


class _Now(KeyboardInterrupt):
    """Raised by a signal's handler where nothing has to be finished first."""


class Stop:
    """Whether a signal has requested the end of a training, and with which exception it ends."""

    def __init__(self) -> None:
        self.requested = False
        self.outcome: type[Stopped] = Stopped
        self._between = False

    @property
    def preempted(self) -> bool:
        """Whether a scheduler requested it."""
        return self.outcome is Preempted

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """A block that changes no weights, such as waiting for data: a signal or a RunError ends it as `Halt`."""
        self._between = True
        try:
            if self.requested:
                raise _Now
            yield
        except _Now:
            raise Halt(self.outcome) from None
        except RunError as error:
            raise Halt(RunError, str(error)) from None
        finally:
            self._between = False

    def on_signal(self, number: int) -> None:
        """What the handler does. A second Ctrl-C ends the command at once; a scheduler's signals may be repeated."""
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        if number in PREEMPTING:
            self.outcome = Preempted
            log.warning(f"{signal.Signals(number).name}: stopping after this step and saving")
        else:
            log.warning("stopping after this step and saving; press Ctrl-C again to stop at once")
        if self._between:
            raise _Now


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """Turn Ctrl-C, SIGTERM and SIGUSR1 into a request to stop."""
    stop = Stop()
    with handled(stop.on_signal, signal.SIGINT, *PREEMPTING):
        yield stop


@contextmanager
def preemptible() -> Iterator[None]:
    """Around the training: there SIGTERM and SIGUSR1 end the command at once, as `Preempted`."""

    def end(number: int) -> None:
        raise _Now(signal.Signals(number).name)

    with handled(end, *PREEMPTING):
        try:
            yield
        except _Now as error:
            raise Preempted(f"stopped by {error}: run the command again, or resume the run if it has begun") from None
