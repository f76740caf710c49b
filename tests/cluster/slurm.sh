#!/usr/bin/env bash
# A study on a real SLURM controller, end to end: submit the matrix, cancel one job, requeue one, let one reach its time
# limit; the same command again must end with every cell of the matrix done once. Needs a controller (sbatch, srun).
# usage: tests/cluster/slurm.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$1
python=${PYTHON:-$root/.venv/bin/python}
export OMP_NUM_THREADS=1
study() {
  (cd "$root" && "$python" train.py -m seed=0,1,2,3 trainer.steps="${STEPS:-150}" trainer.progress=false threads=1 \
    reference=off "runs=$folder" hydra/launcher=slurm hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=2 \
    hydra.launcher.array_parallelism=2 "$@")
}
jobs_in() { squeue --noheader --array --format=%i --states="$1"; }
wait_for() { # until there are $2 jobs of the state $1
  for _ in $(seq 240); do
    if (($(jobs_in "$1" | wc -l) >= $2)); then return; fi
    sleep 0.5
  done
  echo "no $2 jobs became $1" >&2
  exit 1
}
finished() { grep -l '"status": "ok"' "$folder"/default/*/record.json 2>/dev/null | wc -l; }

study >"$folder.first.log" 2>&1 &
wait_for RUNNING 2
sleep 8 # they are in their training, or about to be
mapfile -t running < <(jobs_in RUNNING)
scancel "${running[0]}"
scontrol requeue "${running[1]}"
wait_for PENDING 1
last=$(jobs_in PENDING | tail -1)
scontrol update "JobId=$last" TimeLimit=1 # of minutes: SLURM ends it, or the cell is quicker
wait || true # the command reports the cancelled job; what it left is in the study
echo "after the first command: $(finished) of 4 cells done; sacct-free check of the queue: $(jobs_in all | wc -l) left"
study >"$folder.second.log" 2>&1 || { tail -20 "$folder.second.log" >&2; exit 1; }
done_now=$(finished)
echo "after the same command again: $done_now of 4 cells done"
test "$done_now" -eq 4
test "$(find "$folder/default" -name record.json | wc -l)" -eq 4
test -s "$folder/default/report.html"
echo "complete"
