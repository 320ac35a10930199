"""The command `vitrail cluster`, and the options of `vitrail train` for grids. Heavy imports are inside."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vitrail.errors import UserError
from vitrail.options import HELP, Parser


def add_grid(parser: Parser) -> None:
    """Add the options of a grid to `vitrail train`."""
    values = "FIELD=VALUE,VALUE"
    parser.add_argument(
        "--grid", nargs="+", metavar=values, help="train every combination of these values, in subfolders of --out"
    )
    parser.add_argument("--grid-index", type=int, metavar="K", help="only run K of the grid, from 0: for job arrays")


def train_grid(options: argparse.Namespace, args: Sequence[str]) -> int | None:
    """Run the grid of a `train` command; returns the exit code, or None if the command has no grid."""
    if options.grid is None:
        if options.grid_index is not None:
            raise UserError("--grid-index chooses a run of a grid: name its values with --grid")
        return None
    from vitrail.cluster.grid import run_grid

    return run_grid(args, options.grid_index, options.json)


def cluster(args: Sequence[str]) -> int:
    """Train or predict on a cluster: `vitrail cluster slurm ... -- train RECIPE ...`, `vitrail cluster ray ...`."""
    kinds = {"slurm": slurm}
    if not args or args[0] in HELP:
        print("\n\n".join(f"vitrail cluster {name}: {command.__doc__}" for name, command in kinds.items()))
        return 0 if args else UserError.exit_code
    if args[0] not in kinds:
        raise UserError(f"vitrail cluster {args[0]!r}: choose from {', '.join(kinds)}")
    return kinds[args[0]](args[1:])


def slurm(args: Sequence[str]) -> int:
    """Write an sbatch script, or submit it: `vitrail cluster slurm [--nodes N] [--submit] -- train RECIPE --out DIR`.

    The job stops before its time limit with the run saved and queues itself again; a grid becomes a job array.
    """
    own, words = _cut(args)
    if words[:1] != ["train"] and not {*HELP} & {*own}:
        raise UserError("write the command of the job after two dashes: vitrail cluster slurm ... -- train RECIPE ...")
    parser = Parser("cluster slurm", slurm)
    parser.add_argument("--nodes", type=int, default=1, help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="G", help="0 trains on the CPU; default: 1")
    parser.add_argument(
        "--cpus", type=int, help="CPU cores per node; default: enough for the processes and their workers"
    )
    parser.add_argument(
        "--time", default="24:00:00", help="time limit of one job, as Slurm writes it; default: 24:00:00"
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--at-once", type=int, metavar="N", help="jobs of a grid that run at the same time")
    parser.add_argument(
        "--sbatch", nargs="+", default=[], metavar="NAME=VALUE", help="further options of sbatch, such as mem=64G"
    )
    parser.add_argument("--script", type=Path, help="file to write; default: beside the run's folder, with .sbatch")
    parser.add_argument("--submit", action="store_true", help="submit the script with sbatch")
    options = parser.parse_args(own)
    from vitrail.cluster.slurm import Request, submit, write_script

    request = Request(
        nodes=options.nodes,
        gpus=options.gpus_per_node,
        cpus=options.cpus,
        time=options.time,
        partition=options.partition,
        account=options.account,
        at_once=options.at_once,
        others=tuple(options.sbatch),
    )
    script = write_script(request, words[1:], options.script)
    print(script)
    if options.submit:
        print(submit(script))
    return 0


def _cut(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--`, and those after it."""
    words = list(args)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]
