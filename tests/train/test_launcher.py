"""Launchers of several processes are refused, and single ones are not, however they were started."""

from __future__ import annotations

import pytest
import torch

from vitrail.cli import main
from vitrail.errors import UserError
from vitrail.train.launcher import own_device, refuse_many_processes

SEVERAL = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}),
    "mpiexec of MPICH": ("PMI_SIZE", {"PMI_SIZE": "2", "PMI_RANK": "1"}),
    "srun": ("SLURM_STEP_NUM_TASKS", {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}),
    "srun without a count of the step": ("SLURM_NTASKS", {"SLURM_NTASKS": "2", "SLURM_STEPID": "0"}),
    "the second of srun": ("SLURM_PROCID", {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}),
    "a count alone": ("WORLD_SIZE", {"WORLD_SIZE": "2"}),
}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
ONE = {
    "no launcher": {},
    "torchrun --nproc-per-node 1": {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    "a script of sbatch --ntasks 4": {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"},
    "srun --ntasks 1 in that": {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"},
    "a shell of srun": {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "what is no number": {"WORLD_SIZE": "", "RANK": "none"},
    "torchrun": TORCHRUN,
    "torchrun in each task of srun": {**TORCHRUN, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_one_of_several_processes_is_refused(name: str) -> None:
    culprit, environment = SEVERAL[name]
    with pytest.raises(ValueError, match=rf"^{culprit}=\d: .* or unset {culprit}$"):
        refuse_many_processes(environment)


@pytest.mark.parametrize("name", ONE)
def test_a_single_process_is_not(name: str) -> None:
    refuse_many_processes(ONE[name])


@pytest.mark.parametrize("command", [["train", "digits"], ["train", "--resume", "runs/x"], ["demo"]])
def test_commands_that_train_ask(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("vitrail: OMPI_COMM_WORLD_SIZE=2: a launcher")


def test_a_process_without_its_number_on_the_machine_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK.* is not set: start with --nproc N or torchrun"):
        own_device("cuda")
