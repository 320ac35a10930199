"""Errors of the operating system as one line: closed pipes, full disks, paths that cannot be written."""

from __future__ import annotations

import errno
import os
import select
import sys
from typing import TextIO

from vitrail.errors import RunError, UserError

CLOSED_PIPE = 141
"""exit code if the reader of standard output has gone, as shells report it (128 + SIGPIPE)"""


PATH_ERRORS = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)
"""errors of a path that cannot be written"""
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPIPE)
"""errors that come from writing"""
ACCESS_ERRORS = (errno.EPERM, errno.EIO)
"""errors that come from reading or writing"""


def print_os_error(error: OSError) -> int:
    """Print an error of the operating system in one line and return the exit code; unexpected errors are raised."""
    if error.errno in PATH_ERRORS and error.filename is not None:
        print(f"vitrail: cannot write {error.filename}: {error.strerror}; choose another --out", file=sys.stderr)
        return UserError.exit_code
    if error.errno not in (*WRITE_ERRORS, *ACCESS_ERRORS):
        raise error
    what = "read or write" if error.errno in ACCESS_ERRORS else "write"
    print(f"vitrail: cannot {what} {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
    discard_output()
    return RunError.exit_code


def has_no_reader(stream: TextIO) -> bool:
    """Whether the stream is a pipe without a reader."""
    try:
        place = stream.fileno()
    except (OSError, ValueError):  # closed, or not a file
        return False
    poll = select.poll()
    poll.register(place, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Discard output that cannot be written: Python would retry at exit and print its own error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()  # only if this is the stream that failed
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
