"""Launchers of several processes, each of which would train the whole run."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vitrail.errors import UserError

SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""variables in which torchrun and the mpiruns say how many processes they started"""
RANKS = ("RANK", "LOCAL_RANK")
"""and the number of each, from 0"""


def refuse_many_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where a launcher started this process as one of several."""
    sizes, ranks = list(SIZES), list(RANKS)
    # A script in a Slurm allocation of several tasks is one process: only what srun started is a step.
    if "SLURM_STEP_NUM_TASKS" in environment:
        sizes.append("SLURM_STEP_NUM_TASKS")
    elif {"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys():
        sizes.append("SLURM_NTASKS")
        ranks.append("SLURM_PROCID")
    for name in sizes + ranks:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > (name in sizes):
            raise UserError(
                f"{name}={value}: a launcher (torchrun, mpirun, srun) started several processes, and vitrail trains in "
                f"one: start it without the launcher, or unset {name}"
            )
