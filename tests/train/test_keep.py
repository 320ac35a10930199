"""Writing beside the training: one write at a time, whose errors end the run, and full disks that may pass."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from vitrail import files
from vitrail.errors import RunError
from vitrail.files import append_atomic, copy_folder, retrying
from vitrail.train.keep import Writer
from vitrail.train.snapshot import Snapshot


def full(name: str = "state") -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", name)


def test_a_write_runs_beside_the_caller_and_the_next_waits_for_it() -> None:
    writer, may_end, events = Writer(), threading.Event(), list[str]()

    def slow() -> None:
        may_end.wait(60)
        events.append("first written")

    writer.start(slow)
    events.append("started")  # while the write is held up
    threading.Timer(0.1, may_end.set).start()
    writer.start(lambda: events.append("second written"))
    writer.wait()
    assert events == ["started", "first written", "second written"]


@pytest.mark.parametrize("then", ["start", "wait"])
def test_an_error_of_a_write_is_raised_once_where_the_next_begins_or_the_run_ends(then: str) -> None:
    writer = Writer()

    def fail() -> None:
        raise OSError(errno.EROFS, "Read-only file system", "run/state/step-5.pt")

    writer.start(fail)
    with pytest.raises(RunError, match=r"^cannot write run/state/step-5.pt: Read-only file system$"):
        writer.start(lambda: None) if then == "start" else writer.wait()
    writer.wait()


def test_a_disk_that_is_full_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "RETRY_EVERY", 0.001)
    attempts = iter([full(), full(), None])
    done = []

    def write() -> None:
        if (error := next(attempts)) is not None:
            raise error
        done.append(True)

    writer = Writer()
    writer.start(write)
    writer.wait()
    assert done and len(caplog.messages) == 1
    assert caplog.messages[0].startswith("cannot write state: No space left on device; free space: vitrail tries again")


def test_a_disk_that_stays_full_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_EVERY", 0.001)
    monkeypatch.setattr(files, "RETRY_FOR", 0.01)

    def write() -> None:
        raise full()

    writer = Writer()
    writer.start(write)
    with pytest.raises(RunError, match="cannot write state: No space left on device"):
        writer.wait()


def test_another_error_ends_the_attempts() -> None:
    """Nobody waits five minutes for a run that has failed."""
    writer = Writer()

    def write() -> None:
        raise full()

    writer.start(write)
    writer.abandon()
    with pytest.raises(RunError):
        writer.wait()


def test_other_errors_are_not_repeated() -> None:
    calls = []

    def write() -> None:
        calls.append(1)
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        retrying(write)
    assert len(calls) == 1


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    append_atomic(file, "é first\n")
    opened = Path.open

    class Short:
        """A file on a disk that has room for three more bytes."""

        def __init__(self, path: Path) -> None:
            self.file = opened(path, "ab", buffering=0)

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            if self.file.tell() > 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(bytes(data[:3]))

        def tell(self) -> int:
            return self.file.tell()

        def truncate(self, size: int) -> int:
            return self.file.truncate(size)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *args, **named: Short(path))
        with pytest.raises(OSError, match="No space left") as caught:
            append_atomic(file, "second\n")
    assert caught.value.filename == str(file)
    assert file.read_text() == "é first\n"
    append_atomic(file, "third\n")
    assert file.read_text() == "é first\nthird\n"


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_is_copied_over_another(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    for name, content in (("new", b"new weights"), ("old", b"old weights")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "old" / "more.json").write_text("{}")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    copy_folder(tmp_path / "new", tmp_path / "old")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == {
        "model.safetensors": b"new weights",
        "config.json": b"{}",
    }
    same = [
        os.path.samefile(tmp_path / "new" / name, tmp_path / "old" / name)
        for name in ("model.safetensors", "config.json")
    ]
    assert same == [links, False], "whoever edits a config in place changes that one alone"


def test_a_snapshot_does_not_follow_its_tensors() -> None:
    snapshot, shared = Snapshot(), torch.ones(3)
    live = {"a": shared, "rows": [shared, torch.arange(4.0).reshape(2, 2).t(), 7], "empty": torch.empty(0)}
    first = snapshot.take(live)
    snapshot.wait()
    assert first["a"] is first["rows"][0], "as small a file as before"
    shared.add_(1)
    assert first["a"].tolist() == [1, 1, 1] and first["rows"][1].tolist() == [[0, 2], [1, 3]] and first["rows"][2] == 7
    second = snapshot.take({**live, "later": torch.zeros(2)})
    assert second["a"].tolist() == [2, 2, 2] and second["a"].data_ptr() == first["a"].data_ptr(), "in the same memory"
    assert snapshot.take({"a": torch.zeros(5)})["a"].tolist() == [0] * 5, "or other, where the size is"
