"""The files in state/: the last states of a run, each with SHA-256 digests that are checked when it is read.

step-150.pt       weights, optimizer and average in training, and the progress of the run
step-150.sha256   digests of that file and of the best weights at that step, as `sha256sum -c` reads them
best-120/         the best weights so far at step 150; `best/` of the run is a copy
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from vitrail.errors import UserError
from vitrail.files import atomic_file, write_atomic

log = logging.getLogger("vitrail")

DAMAGE = (errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR)
"""errors of reading a file that is lost or damaged"""


class State(NamedTuple):
    """A state that was read."""

    step: int
    values: dict[str, Any]
    best: Path | None
    """folder of the best weights at that step"""


class States:
    """Writes and reads the states of a run in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """The steps of the states, in order."""
        names = [file.name.removeprefix("step-").removesuffix(".pt") for file in self.path.glob("step-*.pt")]
        return sorted(int(name) for name in names if name.isdecimal())

    def best(self, step: int) -> Path:
        """The folder for weights that were the best at a step."""
        return self.path / f"best-{step}"

    def write(self, step: int, values: dict[str, Any], best: Path | None, keep: int) -> None:
        """Write a state, then remove all but the last `keep` states and the best weights that these need."""
        with atomic_file(self._file(step)) as file:
            hashed = _Hashed(file)
            torch.save(values, hashed)  # type: ignore[arg-type]  # `write` and `flush` are all that it needs
            digests = {self._file(step): hashed.digest.hexdigest()}
            digests |= {each: _digest(each) for each in sorted(best.iterdir())} if best is not None else {}
            lines = [f"{digest}  {each.relative_to(self.path)}\n" for each, digest in digests.items()]
            # Before the state, which the end of this block puts in its place: no state is without its digests.
            write_atomic(self._digests(step), "".join(lines))
        self._keep_only(self.steps()[-keep:])

    def newest(self, device: torch.device) -> State | None:
        """The newest state that is whole, on the device; None if none was saved. Newer damaged ones are removed.

        Raises UserError if all states are damaged, or if vitrail cannot read one that is whole.
        """
        faults: list[str] = []
        for step in reversed(steps := self.steps()):
            if (fault := self._fault(step)) is None:
                if faults:
                    log.warning(f"{'; '.join(faults)}: the run is resumed from the state after step {step} instead")
                self._keep_only([each for each in steps if each <= step])
                return self.read(step, device)
            faults.append(f"{self._file(step)} is damaged ({fault})")
        if faults:
            raise UserError(f"{'; '.join(faults)}: remove {self.path} to start the run again from the beginning")
        return None

    def _file(self, step: int) -> Path:
        return self.path / f"step-{step}.pt"

    def _digests(self, step: int) -> Path:
        return self.path / f"step-{step}.sha256"

    def _listed(self, step: int) -> dict[Path, str]:
        """The digest of each file that a state needs."""
        lines = [line.partition("  ") for line in self._digests(step).read_text().splitlines()]
        return {self.path / name: digest for digest, _, name in lines}

    def _best_of(self, step: int) -> Path | None:
        return next((file.parent for file in self._listed(step) if file.parent != self.path), None)

    def _fault(self, step: int) -> str | None:
        """What is wrong with a state, in words; None if it is whole."""
        try:
            listed = self._listed(step)
            changed = [file for file, digest in listed.items() if _digest(file) != digest]
        except OSError as error:
            if error.errno not in DAMAGE:
                raise
            return f"{error.filename}: {error.strerror}"
        except ValueError:
            return f"{self._digests(step).name} is no text"
        if self._file(step) not in listed:
            return f"{self._digests(step).name} does not name it"
        return f"{changed[0].relative_to(self.path)} has another digest than when it was written" if changed else None

    def read(self, step: int, device: torch.device) -> State:
        """A state that is whole, on the device. Raises UserError if vitrail cannot read it."""
        try:
            values: dict[str, Any] = torch.load(self._file(step), map_location=device, weights_only=True)
        except Exception as error:  # unpickling can raise almost anything
            raise unreadable(self._file(step), error) from None
        return State(step, values, self._best_of(step))

    def _keep_only(self, steps: list[int]) -> None:
        """Remove whatever the states of these steps do not need, such as what a killed process left."""
        needed = {self._digests(step).name for step in steps}
        for step in steps:
            try:
                needed |= {file.relative_to(self.path).parts[0] for file in self._listed(step)}
            except (OSError, ValueError):
                continue  # damaged: whoever reads it is told
        for path in self.path.iterdir():
            if path.name not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def unreadable(file: Path, error: Exception) -> UserError:
    """The error of a state that is whole, but not one of this run or of this version."""
    reason = " ".join(str(error).split())[:160]
    return UserError(f"{file} cannot be read ({reason}): remove {file.parent} to start the run again")


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
