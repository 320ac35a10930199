"""Refuse launchers of several processes, because each process would train the whole run."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vitrail.errors import UserError

SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""environment variables in which torchrun and mpirun give the number of processes"""
RANKS = ("RANK", "LOCAL_RANK")
"""and the rank of each process"""


def refuse_many_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if a launcher started this process as one of several."""
    sizes, ranks = list(SIZES), list(RANKS)
    # A script in a Slurm allocation of several tasks is one process: only processes of srun belong to a step.
    if "SLURM_STEP_NUM_TASKS" in environment:
        sizes.append("SLURM_STEP_NUM_TASKS")
    elif {"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys():
        sizes.append("SLURM_NTASKS")
        ranks.append("SLURM_PROCID")
    for name in sizes + ranks:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > (name in sizes):
            raise UserError(
                f"{name}={value}: a launcher (torchrun, mpirun, srun) started several processes, but vitrail trains in "
                f"one: start it without the launcher, or unset {name}"
            )
