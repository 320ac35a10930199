"""What the system refuses a command, in one line: closed pipes, full disks, places where nothing can be written."""

from __future__ import annotations

import errno
import os
import select
import sys
from typing import TextIO

from vitrail.errors import RunError, UserError

CLOSED_PIPE = 141
"""exit code where nobody reads the output any more: what a shell gives for `cat`"""


NO_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)
"""errors of a place where nothing can be written"""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPIPE)
"""errors of writing"""
NO_ACCESS = (errno.EPERM, errno.EIO)
"""errors of reading as much as of writing"""


def say_os_error(error: OSError) -> int:
    """Print what the system refused in one line and return the exit code; an error that tells nothing is raised."""
    if error.errno in NO_PLACE and error.filename is not None:
        print(f"vitrail: cannot write {error.filename}: {error.strerror}; choose another --out", file=sys.stderr)
        return UserError.exit_code
    if error.errno not in (*NO_ROOM, *NO_ACCESS):
        raise error
    what = "read or write" if error.errno in NO_ACCESS else "write"
    print(f"vitrail: cannot {what} {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
    forget_output()
    return RunError.exit_code


def nobody_reads(stream: TextIO) -> bool:
    """Whether what is printed goes to a pipe that has no reader any more."""
    try:
        place = stream.fileno()
    except (OSError, ValueError):  # closed, or no file
        return False
    poll = select.poll()
    poll.register(place, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def forget_output() -> None:
    """Drop what cannot be printed: Python would try once more as it ends, and fail with lines of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()  # it is another file that could not be written
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
