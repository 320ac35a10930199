"""`vitrail cluster`: the same commands on Slurm or Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitrail.errors import UserError
from vitrail.options import HELP, Parser, parse_options, split_options, task_flags


def cluster(args: Sequence[str]) -> int:
    """Train or predict on a cluster: `vitrail cluster slurm ... -- train RECIPE ...`, `vitrail cluster ray ...`."""
    kinds = {"slurm": slurm, "ray": ray}
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
    own, words = _split_at_dashes(args)
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
    if options.device is not None:
        raise UserError("write --device after the two dashes: it is an option of `train`")
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


def _split_at_dashes(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--`, and those after it."""
    words = list(args)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def ray(args: Sequence[str]) -> int:
    """Use a Ray cluster, or this machine's processes: `vitrail cluster ray predict|train ... [--address A]`."""
    kinds = {"predict": ray_predict, "train": ray_train}
    if args[:1] and args[0] in kinds:
        return kinds[args[0]](args[1:])
    if args[:1] and args[0] in HELP:
        print("\n\n".join(f"vitrail cluster ray {name}: {command.__doc__}" for name, command in kinds.items()))
        return 0
    raise UserError(f"vitrail cluster ray: choose from {', '.join(kinds)}")


def ray_predict(args: Sequence[str]) -> int:
    """Predict with Ray Data: `vitrail cluster ray predict SOURCE --data FOLDER|FILE.parquet|URL --out FOLDER`.

    FOLDER gets Parquet files with one row per image, also for one that cannot be read. The same command continues after
    a stop. The options of the model's task, such as --top, are those of `vitrail predict`.
    """
    parser = Parser("cluster ray predict", ray_predict, urls=True)
    parser.add_argument("source", help="a run folder, a checkpoint, the name of bundled weights, or a Hub id")
    parser.add_revision()
    parser.add_argument(
        "--data", required=True, help="a folder of images, Parquet, or a URL such as s3://bucket/images"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the Parquet files, on this machine")
    parser.add_argument("--workers", type=int, metavar="N", help="default: one per GPU, or per CPU core without GPUs")
    parser.add_argument("--gpus-per-worker", type=float, metavar="G", help="default: 1 if the cluster has GPUs, else 0")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch; default: 32")
    parser.add_argument(
        "--address", help="of the Ray cluster; local: this machine; default: the one Ray finds, or local"
    )
    if parser.parse_help(args) is not None:
        print(parser.format_help())
        return 0
    chosen, others = split_options(args, task_flags())
    options = parser.parse_args(others)
    if options.device is not None:
        raise UserError("--device has no meaning here: the workers use GPUs as --gpus-per-worker says")
    from vitrail.cluster.ray_predict import Workers, predict
    from vitrail.zoo import load

    task = load(options.source, device="cpu", revision=options.revision)
    task.choose(parse_options(task, chosen, data=False))
    workers = Workers(options.workers, options.gpus_per_worker, options.batch_size)
    print(predict(task, options.data, options.out, workers, options.address))
    return 0


def ray_train(args: Sequence[str]) -> int:
    """Train with Ray Train: `vitrail cluster ray train [--workers N] -- RECIPE --out DIR ...`."""
    own, words = _split_at_dashes(args)
    if not words and not {*HELP} & {*own}:
        raise UserError("write the recipe after two dashes: vitrail cluster ray train ... -- RECIPE --out DIR ...")
    parser = Parser("cluster ray train", ray_train)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, one GPU each; default: 1")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument(
        "--max-failures", type=int, default=3, metavar="N", help="how often it may start again; default: 3"
    )
    parser.add_argument(
        "--address", help="of the Ray cluster; local: this machine; default: the one Ray finds, or local"
    )
    options = parser.parse_args(own)
    if options.device is not None:
        raise UserError("--device has no meaning here: the workers have one GPU each, or the CPU with --cpu")
    if words[:1] == ["train"]:
        raise UserError("leave out `train` after the two dashes: vitrail cluster ray train ... -- RECIPE --out DIR ...")
    from vitrail.cluster.ray_train import train

    out = train(words, options.workers, 0.0 if options.cpu else 1.0, options.max_failures, options.address)
    print(f"best weights: {out / 'best'}, report: {out / 'report.html'}")
    return 0
