"""The command line: one module per command in `commands/`, whose heavy imports are inside functions, so help is fast.

Standard output is for results, standard error for people. Wrong input gives one line and exit code 2.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from vitrail.commands.cluster import cluster
from vitrail.commands.compare import compare
from vitrail.commands.demo import demo
from vitrail.commands.doctor import doctor
from vitrail.commands.evaluate import evaluate
from vitrail.commands.explain import explain
from vitrail.commands.files import convert, data, export
from vitrail.commands.models import models
from vitrail.commands.predict import predict
from vitrail.commands.serve import serve
from vitrail.commands.train import train
from vitrail.errors import RunError, Stopped, UserError
from vitrail.faults import CLOSED_PIPE, discard_output, has_no_reader, print_os_error
from vitrail.help import overview
from vitrail.options import as_typed
from vitrail.standard_error import own_lines, printable

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "explain": explain,
    "compare": compare,
    "convert": convert,
    "export": export,
    "data": data,
    "cluster": cluster,
    "doctor": doctor,
    "models": models,
    "serve": serve,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0; 2 for wrong input; 1 for a fault of the run; 130 or 75 if stopped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, io.TextIOWrapper(io.BytesIO()))
    with own_lines():
        return _main(args)


def _main(args: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain bytes that cannot be printed
    try:
        return answer(list(sys.argv[1:] if args is None else args))
    except BrokenPipeError as error:
        # A pipe whose reader has closed it (such as `head`) is normal, so nothing is printed. Any other is an error.
        if not any(map(has_no_reader, (sys.stdout, sys.stderr))):
            return print_os_error(error)
        discard_output()
        return CLOSED_PIPE


def answer(args: list[str]) -> int:
    """Run one command and return its exit code. Errors are printed as one line."""
    try:
        code = run(args)
        sys.stdout.flush()  # a full disk fails here, while the error can still be reported
        return code
    except (UserError, RunError, Stopped) as error:
        print(f"vitrail: {printable(as_typed(str(error), args))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        return print_os_error(error)
    except KeyboardInterrupt:
        print("vitrail: stopped", file=sys.stderr)
        return Stopped.exit_code


def run(args: list[str]) -> int:
    """Run one command. Errors are raised."""
    if not args or args[0] in ("-h", "--help"):
        print(overview(COMMANDS))
        return 0 if args else 2
    if args[0] == "--version":
        from vitrail import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        near = get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise UserError(f"no command {args[0]!r}: {hint}")
    return COMMANDS[args[0]](args[1:])
