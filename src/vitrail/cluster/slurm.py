"""`vitrail cluster slurm`: an sbatch script for a run, or for a grid as a job array.

Two minutes before its time limit, Slurm signals the script, which passes the signal on. The run saves and ends with
exit code 75, and the script queues the job again. The same command then resumes the run, since the script names its job
(`train/job.py`). A node that fails needs nothing of this: Slurm then queues the job again without us.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrail import recipes
from vitrail.cluster.grid import Grid, flags_in, read_grid
from vitrail.data import builtin, hub_sets
from vitrail.errors import RunError, UserError, first_line
from vitrail.files import refuse_existing, write_atomic
from vitrail.train.job import JOB

log = logging.getLogger("vitrail")

WRITTEN = "# written by vitrail cluster slurm"
NOTICE = 120
"""seconds before the time limit at which a run is told to save; Slurm may do so up to a minute earlier"""
SHORTEST = 300
"""seconds of the shortest time limit: a job that is told to save when it starts would be queued again for ever"""
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
"""minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on"""


@dataclass(frozen=True)
class Request:
    """What a job asks of Slurm."""

    nodes: int = 1
    gpus: int = 1
    """per node; 0 trains on the CPU"""
    cpus: int | None = None
    """per node; None: enough for the processes and their workers"""
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    at_once: int | None = None
    """jobs of a grid that run at the same time; None for all"""
    others: tuple[str, ...] = ()
    """further options of sbatch, as NAME=VALUE"""

    def __post_init__(self) -> None:
        numbers = {"--nodes": self.nodes, "--gpus-per-node": self.gpus, "--cpus": self.cpus, "--at-once": self.at_once}
        for name, value in numbers.items():
            least = 0 if name == "--gpus-per-node" else 1
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if not TIME.fullmatch(self.time):
            raise UserError(f"--time must be as Slurm writes it, such as 8:00:00 or 2-12:00:00, got {self.time!r}")
        if 0 < seconds(self.time) < SHORTEST:
            raise UserError(
                f"--time {self.time} is too short, since a run is told to save up to 3 minutes before the end: give it "
                f"{SHORTEST // 60} minutes or more"
            )
        for text in (self.partition, self.account, *self.others):
            if text is not None and not re.fullmatch(r"[\w.,:/+=*\[\]&|()%@-]+", text):
                raise UserError(f"{text!r} cannot stand in a line of sbatch: leave out spaces and quotes")
        for text in self.others:
            name, _, given = text.partition("=")
            if not given or name.startswith("-"):
                raise UserError(f"--sbatch {text}: write NAME=VALUE without dashes, such as mem=64G")
            if name in OURS:
                raise UserError(f"--sbatch {text}: vitrail sets {name} itself")

    @property
    def processes(self) -> int:
        """Per node: one per GPU, or one on the CPU."""
        return max(1, self.gpus)


def seconds(time: str) -> int:
    """A time limit as Slurm writes it, in seconds: minutes, minutes:seconds, days-hours and so on. 0 is none."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    hours, minutes, others = ([*numbers, 0, 0] if dash or len(numbers) == 3 else [0, *numbers, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + others


OURS = (
    *("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "partition", "account"),
    *("array", "requeue", "open-mode", "signal", "output", "job-name"),
)
"""options of sbatch that the script has already"""


def write_script(request: Request, words: Sequence[str], script: Path | None) -> Path:
    """Write the script that trains with the `words` of a `train` command; returns its path.

    Raises UserError, with nothing written, for words that `train` would refuse. Data and weights are not opened: other
    machines may have them.
    """
    if {"--grid-index", "--nproc"} & (flags := flags_in(words)):
        raise UserError("leave out --grid-index and --nproc: the script sets them from its job and --gpus-per-node")
    grid = read_grid(words)
    if "--out" not in flags:
        raise UserError("name the run's folder with --out: by it a job that is queued again finds its run")
    if not re.fullmatch(r"[\w./+=,@-]+", str(grid.out)):
        raise UserError(f"{str(grid.out)!r} cannot stand in a line of sbatch: choose an --out without spaces")
    if len(grid.combinations) == 1 and request.at_once:
        raise UserError("--at-once limits the jobs of a grid, and this is one run")
    _check_batches(request, grid)
    path = script or grid.out.with_name(f"{grid.out.name}.sbatch")
    if path.is_dir() or (path.exists() and WRITTEN not in path.read_text(errors="replace")):
        refuse_existing(path)
        raise UserError(f"{path} is a folder: choose another --script")
    write_atomic(path, "\n".join(lines(request, grid, words)) + "\n")
    grid.out.parent.mkdir(parents=True, exist_ok=True)  # for the log: without it Slurm ends the job, and tells nobody
    if not _is_here(data := grid.common.get("data")):
        log.warning(f"nothing is at {data} on this machine: the nodes of the job need it")
    return path


def _check_batches(request: Request, grid: Grid) -> None:
    """Refuse a batch size of the command that the processes of the job cannot share."""
    count = request.nodes * request.processes
    for one in grid.combinations:
        size = one.values.get("batch_size", grid.common.get("batch_size"))
        if size is not None and size % count:
            raise UserError(f"a batch of {size} cannot be divided among {count} processes: set another --batch-size")


def _is_here(data: str | None) -> bool:
    """Whether data is at its path, or needs none: a built-in set, or one of the Hub."""
    if data is None or data in builtin.NAMES or hub_sets.is_address(data):
        return True
    return any((Path(root) / data).expanduser().exists() for root in ("", os.environ.get("VITRAIL_DATA", "")))


def lines(request: Request, grid: Grid, words: Sequence[str]) -> Iterator[str]:
    """The lines of the script."""
    is_grid = bool(grid.combinations[0].name)
    yield "#!/bin/bash"
    yield from (f"#SBATCH --{option}" for option in _options(request, grid, words, is_grid))
    yield f"{WRITTEN}: submit it with sbatch"
    yield "set -u"
    yield f"cd {shlex.quote(str(Path.cwd()))} || exit 1"
    yield ""
    yield f"export {JOB}={grid.job}  # queued again, the same command resumes the run"
    index = ' --grid-index "$SLURM_ARRAY_TASK_ID"' * is_grid
    cpu = ["--device", "cpu"] * (not request.gpus and "--device" not in flags_in(words))  # a node may have GPUs
    yield f"words=({' '.join(map(_element, ['train', *words, *cpu]))}{index})"
    yield ""
    yield from _start(request)
    yield ""
    yield from END


def _element(word: str) -> str:
    """A word as an element of a bash array. Commas are quoted, though they need not be: they look like separators."""
    quoted = shlex.quote(word)
    return f"'{word}'" if quoted == word and "," in word else quoted


def _options(request: Request, grid: Grid, words: Sequence[str], is_grid: bool) -> Iterator[str]:
    """The options of sbatch."""
    yield f"job-name=vitrail-{grid.out.name}"
    yield f"nodes={request.nodes}"
    yield "ntasks-per-node=1"
    if request.gpus:
        yield f"gpus-per-node={request.gpus}"
    yield f"cpus-per-task={request.cpus or request.processes * (1 + _workers(grid))}"
    yield f"time={request.time}"
    for name in ("partition", "account"):
        if (value := getattr(request, name)) is not None:
            yield f"{name}={value}"
    if is_grid:
        limit = f"%{request.at_once}" if request.at_once else ""
        yield f"array=0-{len(grid.combinations) - 1}{limit}"
    yield "requeue"
    yield "open-mode=append"
    yield f"signal=B:USR1@{NOTICE}"
    yield f"output={grid.out}.{'%A_%a' if is_grid else '%j'}.log"
    yield from request.others


def _workers(grid: Grid) -> int:
    """Worker processes of each process of a run, the most of any run of a grid."""
    own = [one.values.get("workers", grid.common.get("workers")) for one in grid.combinations]
    default = recipes.find(grid.common["recipe"])(10_000).workers
    return max(default if value is None else int(value) for value in own)


def _start(request: Request) -> Iterator[str]:
    """Start the processes in the background, so that bash can answer signals meanwhile."""
    python = shlex.quote(sys.executable)
    yield "pid="
    yield """trap '[ -z "$pid" ] || kill -USR1 "$pid"' USR1"""
    if request.nodes * request.processes == 1:
        yield f'{python} -m vitrail "${{words[@]}}" &'
    elif request.nodes == 1:
        yield f"{python} -m vitrail.cluster.torchrun --standalone --nproc-per-node={request.processes} \\"
        yield '  -m vitrail "${words[@]}" &'
    else:
        yield 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        yield "port=$((15000 + SLURM_JOB_ID % 10000))  # jobs that share the first node need ports of their own"
        # The nodes of a stopped run end one after the other, and that of a failed one would leave the others waiting.
        yield 'srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=300 \\'
        yield f"  {python} -m vitrail.cluster.torchrun \\"
        yield f"  --nnodes={request.nodes} --nproc-per-node={request.processes} \\"
        yield '  --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" \\'
        yield '  -m vitrail "${words[@]}" &'
    yield "pid=$!"


END = """\
while kill -0 "$pid" 2>/dev/null; do  # a signal ends `wait` early
  wait "$pid"
done
wait "$pid"  # which tells the exit code of a process that has ended, also once more
code=$?
if [ "$code" -eq 75 ]; then
  echo "vitrail: the run is saved: job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code\"""".splitlines()


def submit(script: Path) -> str:
    """Submit the script; returns what sbatch answers."""
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on this machine: run `sbatch {script}` where it is")
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"sbatch refused {script}: {first_line(done.stderr or done.stdout)}")
    return done.stdout.strip()
