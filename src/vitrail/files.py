"""Atomic writes: files and folders that appear complete or not at all.

They are written to a temporary name beside the final one, flushed to disk, then renamed.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vitrail.errors import UserError

log = logging.getLogger("vitrail")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write one file, whole or not at all, replacing an existing one. Text is written in UTF-8."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def append_atomic(path: Path, added: bytes | str) -> None:
    """Add bytes, or text in UTF-8, at the end of a file, or leave the file unchanged if that fails."""
    data = memoryview(added.encode() if isinstance(added, str) else added)
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException as error:
            file.truncate(end)
            _add_name(error, path)
            raise


FULL = (errno.ENOSPC, errno.EDQUOT)
"""errors of a disk that is full, which passes if somebody frees space"""
RETRY_EVERY, RETRY_FOR = 10.0, 300.0
"""seconds between attempts to write to a full disk, and after which the last attempt fails"""


def retrying(write: Callable[[], None], wait: Callable[[float], object] = time.sleep) -> None:
    """Repeat a write for up to `RETRY_FOR` seconds while the disk is full; a warning names the file once.

    `write` must be one that can be repeated. `wait` waits for some seconds; if it returns True, the error is raised.
    """
    began = time.monotonic()
    warned = False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL or time.monotonic() - began > RETRY_FOR:
                raise
            if not warned:
                log.warning(
                    f"cannot write {error.filename or 'a file'}: {error.strerror}; free space: vitrail tries again "
                    f"every {RETRY_EVERY:.0f} seconds, for {RETRY_FOR:.0f} seconds"
                )
                warned = True
            if wait(RETRY_EVERY) is True:
                raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A temporary file to write to, which replaces `path` if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors_name(path):
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with errors_name(path):
            os.chmod(beside, 0o644)  # mkstemp creates files that only their owner can read
            os.replace(beside, path)
    except BaseException as error:
        Path(beside).unlink(missing_ok=True)
        _add_name(error, path)
        raise
    sync(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise UserError if the output of a command exists: no command overwrites what is there."""
    if path.is_dir():
        if any(path.iterdir()):
            raise UserError(f"{path} exists and is not empty: choose another name, or remove the folder first")
    elif path.exists() or path.is_symlink():
        raise UserError(f"{path} exists: choose another name, or remove the file first")


def refuse_file_name(folder: Path, remedy: str) -> None:
    """Raise UserError if the `folder` to write into is a file, or would be a new one whose name ends as a file's."""
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{folder} is a file: {remedy}")
    if re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]*", folder.suffix):
        raise UserError(f"{folder} has the ending of a file, {folder.suffix}: {remedy}")


def printable(text: str) -> str:
    r"""Text for pages and figures. Bytes of file names that are not UTF-8 are escaped, such as `\udce9`."""
    return text.encode(errors="backslashreplace").decode()


def refuse_url(text: str) -> None:
    """Raise UserError if `text` is a URL and not a path or a name."""
    if not re.match(r"[A-Za-z][\w+.-]+://|https?:", text):
        return
    model = re.match(r"https?://(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)([\w.-]+/[\w.-]+)", text)
    also = f", or give the Hub id {model[1]}" if model else ", and give its path"
    raise UserError(f"{text} is a URL, which vitrail does not download: download the file first{also}")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns a PermissionError of reading the user's files or folders into a UserError."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which replaces `path` if the block ends without an error."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors_name(path):
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield beside
        for file in beside.rglob("*"):
            sync(file)
        with errors_name(path):
            os.chmod(beside, 0o755)
            if path.exists():
                _exchange(beside, path)
            else:
                os.replace(beside, path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        _add_name(error, path)
        raise
    sync(path.parent)


def copy_folder(source: Path, path: Path) -> None:
    """Copy a checkpoint's folder, replacing an existing one, whole or not at all.

    Weights become a second name of the same file if the file system has hard links: nothing writes into such a file.
    """
    with atomic_folder(path) as folder:
        for file in source.iterdir():
            if file.suffix != ".safetensors" or not _linked(file, folder / file.name):
                shutil.copyfile(file, folder / file.name)


def _linked(file: Path, name: Path) -> bool:
    """Give a file a second name; False if the file system cannot."""
    try:
        os.link(file, name)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, path: Path) -> None:
    """Replace a folder by another, or leave it unchanged if that fails."""
    # A folder cannot replace a folder in one step: between the two renames, only the renamed old folder exists.
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        os.replace(path, old)
    except BaseException:
        old.rmdir()
        raise
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _add_name(error: BaseException, path: Path) -> None:
    """Add the file name to an error that lacks it."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Errors within the block name `path`, which people know, and not the temporary file beside it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
