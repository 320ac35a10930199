"""The job that started a process: started again, the same command continues the run that it began.

torchrun, Ray Train and schedulers start a command again after a failure, word for word. A run's folder records what
marks its job, and a process with the same mark resumes the run in it; for any other process the folder is taken. Marks:

- `VITRAIL_JOB`, a name of the job: vitrail sets it for Slurm, Ray and grids; others set it in their own scripts;
- under torchrun, its process. It outlives the processes that it starts again, and a second torchrun is another one. Its
  count of restarts would not do: it is 0 on a machine that joins again, and 1 after a folder was refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrail.train.parallel import World

JOB = "VITRAIL_JOB"
"""environment variable: the name of the job that started this process"""
BOOT = Path("/proc/sys/kernel/random/boot_id")


def marks(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What marks the job of this process; [] if nothing would start it again."""
    found = [f"job {name}"] if (name := environment.get(JOB)) else []
    if (run := environment.get("TORCHELASTIC_RUN_ID")) is not None and (agent := _named(os.getppid())):
        found.append(f"torchrun {run} {agent}")
    return found


def marks_of_all(world: World, command: str) -> list[str]:
    """The marks of all ranks: each machine has a torchrun of its own, and any of them may outlive the others.

    Each is that of a `command` too, told by a hash of its settings: another command of the same job is another run.
    """
    every = {mark for each in world.all_gather(json.dumps(marks()).encode()) for mark in json.loads(each)}
    return sorted(f"{mark} {command}" for mark in every)


def _named(process: int) -> str | None:
    """What no other process has in common with this one, on any machine; None where the system does not tell."""
    try:
        started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since the boot
        return f"{BOOT.read_text().strip()} {process} {started}"
    except OSError:  # not Linux
        return None
