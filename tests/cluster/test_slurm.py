"""The sbatch script, run by stand-ins for Slurm's commands: resumed, queued again, as a job array, over nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from linters import linter

from vitrail.cli import main
from vitrail.cluster.grid import read_grid
from vitrail.cluster.slurm import seconds

TRAIN = ["train", "digits", "--epochs", "1", "--out", "runs/x"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    (tmp_path / "here it is").mkdir()
    monkeypatch.chdir(tmp_path / "here it is")
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", fake.python)
    fake.set("folder.0", "runs/x")
    return fake


def script_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command writes, which bash can read."""
    assert main(["cluster", "slurm", *words]) == 0
    path = Path(capsys.readouterr().out.splitlines()[0])
    subprocess.run(["bash", "-n", path], check=True)
    if (check := linter("shellcheck")) is not None:
        subprocess.run([check, path], check=True)
    return path.read_text()


def test_one_process_needs_neither_srun_nor_torchrun(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    text = script_of(capsys, "--time", "2-0", "--partition", "gpu", "--sbatch", "mem=64G", "--submit", "--", *TRAIN)
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        *("job-name=vitrail-x", "nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "cpus-per-task=3", "time=2-0"),
        *("partition=gpu", "requeue", "open-mode=append", "signal=B:USR1@120", "output=runs/x.%j.log", "mem=64G"),
    ]
    assert slurm.seen("words") == ["-m vitrail train digits --epochs 1 --out runs/x"]
    assert slurm.seen("codes") == ["70 0"] and not slurm.seen("srun")


def test_exit_code_75_queues_the_job_again_and_it_resumes(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.set("saves")
    assert main(["cluster", "slurm", "--submit", "--", *TRAIN, "--device", "cuda"]) == 0
    assert capsys.readouterr().out == "runs/x.sbatch\nSubmitted batch job 70\n"
    assert slurm.seen("codes") == ["70 75", "70 0"]
    assert slurm.seen("words") == 2 * ["-m vitrail train digits --epochs 1 --out runs/x --device cuda"]
    assert slurm.seen("jobs") == 2 * [read_grid(TRAIN[1:]).job], "by which the second resumes the run of the first"


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_signal_before_the_time_limit_reaches_the_processes(
    nodes: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set("signal")
    assert main(["cluster", "slurm", "--nodes", nodes, "--submit", "--", *TRAIN]) == 0
    assert slurm.seen("codes") == ["70 75", "70 0"]
    assert set(slurm.seen("jobs")) == {read_grid(TRAIN[1:]).job}


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_failed_run_is_not_queued_again(code: int, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.set("code", str(code))
    assert main(["cluster", "slurm", "--submit", "--", *TRAIN]) == 0
    assert slurm.seen("codes") == [f"70 {code}"]


def test_many_processes_on_one_node(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    text = script_of(capsys, "--gpus-per-node", "8", "--submit", "--", *TRAIN, "--workers", "3")
    assert "gpus-per-node=8\n" in text and "cpus-per-task=32\n" in text
    assert slurm.seen("words") == [
        "-m vitrail.cluster.torchrun --standalone --nproc-per-node=8 -m vitrail train digits --epochs 1 --out runs/x "
        "--workers 3"
    ]


def test_several_nodes_meet_at_the_first_one(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    script_of(capsys, "--nodes", "2", "--gpus-per-node", "4", "--cpus", "20", "--submit", "--", *TRAIN)
    assert slurm.seen("words") == 2 * [
        "-m vitrail.cluster.torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d "
        "--rdzv-endpoint=node0:15070 --rdzv-id=70 -m vitrail train digits --epochs 1 --out runs/x"
    ]
    assert "--ntasks-per-node=1 --cpus-per-task=20" in slurm.seen("srun")[0]


def test_a_grid_is_a_job_array_whose_jobs_resume(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.set("saves")
    for task, seed in enumerate((0, 5)):
        slurm.set(f"folder.{task}", f"runs/x/seed={seed}")
    grid = ["--grid", "seed=0,5"]
    text = script_of(capsys, "--at-once", "1", "--submit", "--", *TRAIN, *grid)
    assert "#SBATCH --array=0-1%1\n" in text and "#SBATCH --output=runs/x.%A_%a.log\n" in text
    words = "-m vitrail train digits --epochs 1 --out runs/x --grid seed=0,5 --grid-index"
    assert slurm.seen("words") == [*2 * [f"{words} 0"], *2 * [f"{words} 1"]]
    assert set(slurm.seen("jobs")) == {read_grid([*TRAIN[1:], *grid]).job}
    assert slurm.seen("codes") == ["70 75", "70 0", "71 75", "71 0"]


@pytest.mark.parametrize(
    "words, said",
    [
        ([*TRAIN], "write the command of the job after two dashes"),
        (["--", "predict", "x"], "write the command of the job after two dashes"),
        (["--", "train", "digits"], "name the run's folder with --out"),
        (["--", *TRAIN, "--epoch", "3"], "unknown option --epoch: did you mean --epochs?"),
        (["--", *TRAIN, "--batch-size", "0"], "must be at least 1, got 0"),
        (["--", *TRAIN, "--grid", "seed=x"], "--seed must be a whole number"),
        (["--", "train", "digit", "--out", "x"], "digits"),
        (["--", "train", "digits", "--out", "a b"], "choose an --out without spaces"),
        (["--", "train", "--resume", "runs/x", "--out", "runs/x"], "leave --resume out"),
        (["--", *TRAIN, "--nproc", "2"], "leave out --grid-index and --nproc"),
        (["--", *TRAIN, "--nproc=2"], "leave out --grid-index and --nproc"),
        (["--", *TRAIN, "--grid", "seed=0,1", "--grid-index=0"], "leave out --grid-index and --nproc"),
        (["--nodes", "0", "--", *TRAIN], "--nodes must be at least 1, got 0"),
        (["--time", "soon", "--", *TRAIN], "--time must be as Slurm writes it"),
        (["--partition", "a\n#SBATCH --x", "--", *TRAIN], "cannot stand in a line of sbatch"),
        (["--sbatch", "nodes=3", "--", *TRAIN], "vitrail sets nodes itself"),
        (["--sbatch", "mem", "--", *TRAIN], "write NAME=VALUE"),
        (["--time", "0:30", "--", *TRAIN], "--time 0:30 is too short"),
        (["--time", "4", "--", *TRAIN], "--time 4 is too short"),
        (["--at-once", "2", "--", *TRAIN], "--at-once limits the jobs of a grid, and this is one run"),
        (["--device", "cpu", "--", *TRAIN], "write --device after the two dashes"),
        (["--", "train", "folder", "--out", "x"], "no data: give --data"),
        (["--", "train", "finetune-b16-384", "--out", "x", "--data", "y"], "needs pretrained weights"),
        (["--gpus-per-node", "8", "--", *TRAIN, "--batch-size", "36"], "36 cannot be divided among 8 processes"),
        (["--nodes", "2", "--", *TRAIN, "--grid", "batch_size=8,9"], "9 cannot be divided among 2 processes"),
        (["--", "train", "recipe.json", "--out", "x"], "recipe.json cannot be read"),
    ],
)
def test_what_the_job_would_refuse_is_refused_at_once(
    words: list[str], said: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "slurm", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not any(Path().iterdir())


def test_time_limits_in_all_forms_of_slurm() -> None:
    minute, hour = 60, 3600
    forms = {"0": 0, "90": 90 * minute, "5:30": 330, "1:00:00": hour, "2-3": 51 * hour, "1-0:01": 24 * hour + 60}
    assert {text: seconds(text) for text in forms} == forms and seconds("1-01:01:01") == 25 * hour + 61


def test_data_that_only_the_nodes_have_is_named(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    script_of(capsys, "--", "train", "folder", "--data", "/scratch/pets", "--out", "runs/x")
    assert caplog.messages == ["nothing is at /scratch/pets on this machine: the nodes of the job need it"]
    caplog.clear()
    Path("pets").mkdir()
    for data in ("pets", "cifar10", "hf://datasets/a/b"):
        script_of(capsys, "--", "train", "folder", "--data", data, "--out", "runs/x")
    assert not caplog.messages


def test_a_recipe_file_and_a_script_elsewhere(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text('{"recipe": "digits", "workers": 5}')
    text = script_of(capsys, "--script", "x.sbatch", "--", "train", "mine.json", "--out", "runs/new/x")
    assert "words=(train mine.json --out runs/new/x)" in text and "cpus-per-task=6\n" in text
    assert Path("runs/new").is_dir(), "without the folder of its log, Slurm ends a job in silence"


def test_no_gpus_mean_the_cpu_also_where_a_node_has_some(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    text = script_of(capsys, "--gpus-per-node", "0", "--", *TRAIN)
    assert "words=(train digits --epochs 1 --out runs/x --device cpu)" in text


def test_no_sbatch_and_one_that_refuses(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["cluster", "slurm", "--partition", "closed", "--submit", "--", *TRAIN]) == 1
    assert "sbatch refused runs/x.sbatch: sbatch: error: invalid partition" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert main(["cluster", "slurm", "--submit", "--", *TRAIN]) == 2
    assert "sbatch is not on this machine: run `sbatch runs/x.sbatch` where it is" in capsys.readouterr().err


def test_files_of_others_are_not_overwritten(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.sh").write_text("echo mine")
    assert main(["cluster", "slurm", "--script", "mine.sh", "--", *TRAIN]) == 2
    assert "mine.sh exists" in capsys.readouterr().err and Path("mine.sh").read_text() == "echo mine"
    for _ in range(2):
        assert main(["cluster", "slurm", "--script", "ours.sh", "--", *TRAIN]) == 0
