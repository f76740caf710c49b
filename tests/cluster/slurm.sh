#!/usr/bin/env bash
# A study on a real SLURM controller, end to end: submit the matrix, cancel one job, requeue one, let one reach its time
# limit; the same command again must end with every cell of the matrix done once, and the cancelled one taken up where
# it was, not begun anew. Then one cell over two tasks of srun, cancelled and run again: its record is that of one
# process, to the bit. Needs a controller (sbatch, srun).
# usage: tests/cluster/slurm.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$1
python=${PYTHON:-$root/.venv/bin/python}
export OMP_NUM_THREADS=1
study() { # ends the shell that calls it: the process in the background is the command itself
  cd "$root"
  exec "$python" train.py -m seed=0,1,2,3 trainer.steps="${STEPS:-600}" trainer.checkpoint_every_s=2 \
    trainer.progress=false threads=1 reference=off "runs=$folder" hydra/launcher=slurm \
    hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=2 hydra.launcher.array_parallelism=2 "$@"
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
states() { # of each cell: seed, status, steps at which earlier attempts were taken up
  "$python" - "$folder"/default/*/record.json <<'PY'
import json, sys
for path in sys.argv[1:]:
    record = json.load(open(path))
    print(record["seed"], record["status"], *record.get("resumed", {}).get("at_steps", []))
PY
}
finished() { grep -l '"status": "ok"' "$folder"/default/*/record.json 2>/dev/null | wc -l; }

study >"$folder.first.log" 2>&1 &
first=$!
wait_for RUNNING 2
sleep 8 # they are in their training, or about to be
mapfile -t running < <(jobs_in RUNNING)
scancel "${running[0]}"
scontrol requeue "${running[1]}"
wait_for PENDING 1
last=$(jobs_in PENDING | tail -1)
scontrol update "JobId=$last" TimeLimit=1 # of minutes: SLURM ends it, or the cell is quicker
# Without accounting submitit never learns that a job was cancelled and waits on: the first command is ended by hand.
while kill -0 "$first" 2>/dev/null && (($(jobs_in all | wc -l) > 0)); do sleep 2; done
sleep 10
kill "$first" 2>/dev/null || true
wait || true
cancelled=${running[0]##*_} # the array index is the seed
echo "after the first command: $(finished) of 4 cells done, $(jobs_in all | wc -l) jobs left in the queue"
echo "cancelled: seed $cancelled; requeued: seed ${running[1]##*_}; seed, status, taken up at steps:"
states
(study) >"$folder.second.log" 2>&1 || { tail -20 "$folder.second.log" >&2; exit 1; }
done_now=$(finished)
echo "after the same command again: $done_now of 4 cells done"
test "$done_now" -eq 4
test "$(find "$folder/default" -name record.json | wc -l)" -eq 4
states
states | grep -E "^$cancelled ok [1-9]" >/dev/null || { echo "the cancelled cell was begun anew" >&2; exit 1; }
test -s "$folder/default/report.html"

cell() { # one cell, of as many tasks as $1 says; srun makes a job of its own
  cd "$root"
  local launch=() tasks=$1
  if ((tasks > 1)); then
    launch=(srun --job-name=one-cell --ntasks="$tasks" --cpus-per-task=1 --mem-per-cpu=2G --kill-on-bad-exit=1)
  fi
  "${launch[@]}" "$python" train.py trainer.steps="${STEPS:-600}" trainer.accumulate=2 trainer.batch_size=4 \
    trainer.checkpoint_every_s=1 trainer.progress=false task.limit=40 threads=1 reference=off "runs=$folder/tasks-$tasks"
}
cell 2 >"$folder.cell.first.log" 2>&1 &
for _ in $(seq 240); do
  if compgen -G "$folder/tasks-2/default/*/checkpoint.safetensors" >/dev/null; then break; fi
  sleep 0.5
done
scancel --name=one-cell
wait
cell 2 >"$folder.cell.second.log" 2>&1
cell 1 >"$folder.cell.alone.log" 2>&1
cd "$root"
"$python" - "$folder" <<'PY'
import sys
from pathlib import Path

from lyapft import records
from tests.test_ranks import folder_of, same

alone, together = (folder_of(Path(sys.argv[1]) / f"tasks-{tasks}") for tasks in (1, 2))
record = records.load(together)
assert record["config"]["runs_as"]["ranks"] == 2
assert record["resumed"]["at_steps"], "it was begun anew"
same(alone, together)
print(f"one cell over two tasks, cancelled, taken up at step {record['resumed']['at_steps']}: the record of one process")
PY
echo "complete"
