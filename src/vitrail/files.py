"""Files that appear complete or not at all: written to a temporary file, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vitrail.errors import UserError


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write one file, replacing an existing one."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A temporary file to write to, which replaces `path` if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path):
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with named(path):
            os.chmod(beside, 0o644)  # mkstemp creates files that only their owner can read
            os.replace(beside, path)
    except BaseException as error:
        Path(beside).unlink(missing_ok=True)
        _name(error, path)
        raise
    _sync(path.parent)


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
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which replaces `path` if the block ends without an error."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path):
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield beside
        for file in beside.rglob("*"):
            _sync(file)
        with named(path):
            os.chmod(beside, 0o755)
            if path.exists():
                _exchange(beside, path)
            else:
                os.replace(beside, path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        _name(error, path)
        raise
    _sync(path.parent)


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


def _name(error: BaseException, path: Path) -> None:
    """Add the file name to an error that lacks it."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of a temporary file beside `path` name `path` instead, which is the one that people know."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
