"""What a command has answered so far, in a file beside its output, from which the same command resumes if stopped."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from vitrail.errors import UserError
from vitrail.files import errors_name
from vitrail.predictions.answers import Precision
from vitrail.tasks.checkpoint import digest
from vitrail.tasks.exported import Exported
from vitrail.tasks.task import Task


class Journal:
    """JSON lines: a head that names the work, and one entry per image in the order of the images."""

    def __init__(self, output: Path) -> None:
        self.output, self.path = output, output.with_name(f"{output.name}.partial")
        self.count = 0
        """entries so far"""
        self.precision: Precision | None = None
        """that of the last entry of a stopped command: rows of one output have one number format"""
        self.file: IO[bytes] | None = None

    @property
    def exists(self) -> bool:
        """Whether a stopped command has left its file."""
        return self.path.exists()

    def open(self, head: dict[str, Any]) -> None:
        """Begin, or resume after the last whole entry. UserError if the file is of other work, or in use."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with errors_name(self.output):
            self.file = self.path.open("a+b")
            self._lock(self.file)
            self.file.seek(0)
            first = self.file.readline()
            if not first.endswith(b"\n") and _line(head).startswith(first):  # new, or stopped while it was written
                self.file.truncate(0)
                self._append(head)
                return
            if first != _line(head):
                self.file.close()
                raise UserError(
                    f"{self.path} holds predictions of another model, other options or other images: remove it to "
                    "start again, or choose another --out"
                )
            whole, last = self.file.tell(), b""
            for line in self.file:
                if not line.endswith(b"\n"):
                    break
                self.count += 1
                whole, last = whole + len(line), line
            self.file.truncate(whole)
            self.precision = self._entry(last).get("precision") if last else None

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry, which the end of this process cannot undo."""
        with errors_name(self.output):
            self._append(entry)
        self.count += 1

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries so far."""
        with self.path.open("rb") as file:
            file.readline()  # the head
            for _ in range(self.count):
                yield self._entry(file.readline())

    def _entry(self, line: bytes) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            raise UserError(f"{self.path} is damaged: remove it to start again") from None
        return found

    def close(self, remove: bool) -> None:
        """Without an entry the file is removed in any case."""
        assert self.file is not None
        if remove or not self.count:
            self.path.unlink(missing_ok=True)  # before another process can lock it
        self.file.close()

    def _append(self, entry: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.write(_line(entry))
        self.file.flush()

    def _lock(self, file: IO[bytes]) -> None:
        with contextlib.suppress(ImportError):  # Windows has none
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise UserError(f"another command is writing {self.path}: choose another --out") from None


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def head_of(task: Task, images: Sequence[Path]) -> dict[str, Any]:
    """What a stopped command must have in common with the one that resumes: the model, its options and the images."""
    weights, names = hashlib.sha256(digest(task).encode()), hashlib.sha256()
    for file in _files(Path(task.made_from)) if isinstance(task, Exported) else ():
        weights.update(file.read_bytes())
    for image in images:
        names.update(str(image.resolve()).encode(errors="surrogateescape") + b"\0")
        with contextlib.suppress(OSError):  # which its row will say
            found = image.stat()
            names.update(f"{found.st_size} {found.st_mtime_ns}\0".encode())
    about = {"task": task.name, "config": task.config(), "preprocess": task.preprocess.as_dict()}
    about["classes"] = list(task.classes)
    weights.update(json.dumps(about, sort_keys=True, default=str).encode())
    return {
        "model": weights.hexdigest(),
        "options": json.loads(json.dumps(asdict(task.option), default=str)),
        "images": names.hexdigest(),
    }


def _files(source: Path) -> list[Path]:
    """The files of an export, which has no other weights."""
    return sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
