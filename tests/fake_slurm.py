"""Stands in for Slurm: `sbatch`, `srun` and `scontrol` that run a script here, and queue it again when it asks."""

from __future__ import annotations

import os
from pathlib import Path

SBATCH = r"""#!/bin/bash
script=$1
grep -q '^#SBATCH --partition=closed' "$script" && { echo "sbatch: error: invalid partition" >&2; exit 1; }
state=$FAKE_SLURM
nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
export SLURM_JOB_NUM_NODES=$nodes SLURM_JOB_NODELIST="node[0-$((nodes - 1))]"
export SLURM_CPUS_PER_TASK=$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$script")
for task in $(seq 0 "${last:-0}"); do
  export SLURM_JOB_ID=$((70 + task))
  [ -n "$last" ] && export SLURM_ARRAY_TASK_ID=$task
  for attempt in 1 2 3; do
    rm -f "$state/requeued" "$state/started"
    bash "$script" > "$state/log.$task.$attempt" 2>&1 &
    job=$!
    if [ -e "$state/signal" ] && [ "$attempt" = 1 ]; then
      until [ -e "$state/started" ]; do sleep 0.02; done
      kill -USR1 "$job"  # as --signal=B:USR1@120 does
    fi
    wait "$job"
    echo "$SLURM_JOB_ID $?" >> "$state/codes"
    [ -e "$state/requeued" ] || break
  done
done
echo "Submitted batch job 70"
"""
SCONTROL = r"""#!/bin/bash
case $1 in
  requeue) echo "$2" >> "$FAKE_SLURM/requeued" ;;
  show) printf 'node0\nnode1\n' ;;
  *) exit 1 ;;
esac
"""
SRUN = r"""#!/bin/bash
echo "$*" >> "$FAKE_SLURM/srun"
while [[ $1 == --* ]]; do shift; done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do
  wait "$pid"; one=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done
  [ "$one" -gt "$code" ] && code=$one
done
exit "$code"
"""
PYTHON = r"""#!/bin/bash
# Stands in for the Python that trains: it writes down its words, and ends as the test says.
echo "$*" >> "$FAKE_SLURM/words"
echo "$VITRAIL_JOB" >> "$FAKE_SLURM/jobs"
folder=$(cat "$FAKE_SLURM/folder.${SLURM_ARRAY_TASK_ID:-0}")
save() { mkdir -p "$folder"; touch "$folder/recipe.json"; exit 75; }
if [ -e "$FAKE_SLURM/signal" ] && [ ! -e "$folder/recipe.json" ]; then
  trap save USR1
  touch "$FAKE_SLURM/started"
  for i in $(seq 400); do sleep 0.02; done
  exit 9
fi
[ -e "$folder/recipe.json" ] || [ ! -e "$FAKE_SLURM/saves" ] || save
exit "$(cat "$FAKE_SLURM/code" 2>/dev/null || echo 0)"
"""


class FakeSlurm:
    """The commands in a folder of their own, and what they have seen."""

    def __init__(self, root: Path) -> None:
        self.bin, self.state = root / "bin", root / "state"
        for folder in (self.bin, self.state):
            folder.mkdir(parents=True)
        texts = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN, "python": PYTHON}
        for name, text in texts.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(self.state)}

    @property
    def python(self) -> str:
        return str(self.bin / "python")

    def set(self, name: str, text: str = "") -> None:
        """Say how the jobs go: `saves`, `signal`, `code` and `folder.TASK`."""
        (self.state / name).write_text(text)

    def seen(self, name: str) -> list[str]:
        """The lines of `words` (of Python), `jobs` (its VITRAIL_JOB), `codes` (job, exit code) and `srun`."""
        place = self.state / name
        return place.read_text().splitlines() if place.exists() else []
