#!/usr/bin/env bash
# A study on a real SLURM controller, end to end: submit the matrix, cancel one job, requeue one, let SLURM preempt one by
# its time limit, each in its training; that this is what happened is asked of SLURM. The same command again must end with
# every cell of the matrix done once and in the report, the hit ones taken up where they were and to the bit what they are
# without a launcher. Then one cell over two tasks of srun, cancelled and run again: its record is that of one process.
# Needs a controller (sbatch, srun), and the rights of its operator to change a time limit.
# usage: tests/cluster/slurm.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$1
python=${PYTHON:-$root/.venv/bin/python}
export OMP_NUM_THREADS=1 PYTHONPATH=$root # of the jobs, which import this checkout
mkdir -p "$folder"
fail() { echo "FAILED: $1" >&2; exit 1; }
train() { # ends the shell that calls it: the process in the background is the command itself
  cd "$root"
  exec "$python" train.py -m trainer.steps="${STEPS:-1200}" trainer.checkpoint_every_s=2 trainer.progress=false \
    threads=1 reference=off "$@"
}
study() {
  train seed=0,1,2,3 "runs=$folder" hydra/launcher=submitit_slurm hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=2 \
    hydra.launcher.array_parallelism=2
}
jobs_in() { squeue --noheader --array --format=%i --states="$1"; }
until_there() { # a file of this pattern
  for _ in $(seq 240); do
    if compgen -G "$1" >/dev/null; then return; fi
    sleep 0.5
  done
  fail "there is no $1"
}
account() { # what SLURM says of each task of the array, a line each: number, restarts, time limit, state
  scontrol --oneliner show job "$array" | sed -nE \
    's/.*ArrayTaskId=([0-9]+) .* JobState=(\w+) .* Restarts=([0-9]+) .* TimeLimit=(\S+) .*/\1 \3 \4 \2/p'
}
cells() { # each one's seed, status, and the steps at which earlier attempts were taken up
  "$python" - "$folder"/default/*/record.json <<'PY'
import json, sys
for path in sys.argv[1:]:
    record = json.load(open(path))
    print(record["seed"], record["status"], *record.get("resumed", {}).get("at_steps", []))
PY
}

(study) >"$folder.first.log" 2>&1 &
first=$!
for seed in 0 1; do until_there "$folder/default/*-s$seed-*/checkpoint.safetensors"; done
mapfile -t running < <(jobs_in RUNNING | sort)
limited=$(jobs_in PENDING | sort | tail -1)
test "${#running[@]}" -eq 2 || fail "not two jobs run, but ${running[*]}"
scancel "${running[0]}"
scontrol requeue "${running[1]}"
cancelled=${running[0]##*_} requeued=${running[1]##*_} limited=${limited##*_} # the array index is the seed
array=${running[0]%_*}
: >"$folder.account"
limit=240 # of the third job, in minutes
# Without accounting submitit never learns that a job was cancelled and waits on: the first command is ended by hand.
while kill -0 "$first" 2>/dev/null && squeue --noheader --job="$array" | grep -q .; do
  account >>"$folder.account"
  if [[ $limit == 240 ]] && compgen -G "$folder/default/*-s$limited-*/checkpoint.safetensors" >/dev/null; then
    limit=2 # the signal is due two minutes before the end, so at once
    scontrol update "JobId=${array}_$limited" TimeLimit=$limit
  elif [[ $limit == 2 ]] && grep -qE "^$limited [1-9]" "$folder.account"; then
    limit=60 # once is enough
    scontrol update "JobId=${array}_$limited" TimeLimit=$limit
  fi
  for job in $(jobs_in PENDING); do # SLURM lets a requeued job wait for two minutes
    scontrol update "JobId=$job" StartTime=now 2>/dev/null || true
  done
  sleep 2
done
account >>"$folder.account"
sleep 10
kill "$first" 2>/dev/null || true
wait || true
echo "SLURM's account (task, restarts, time limit, state):"
sort -u "$folder.account"
grep -qE "^$cancelled 0 .* CANCELLED" "$folder.account" || fail "task $cancelled was not cancelled"
grep -qE "^$requeued [1-9]" "$folder.account" || fail "task $requeued was not requeued"
grep -qE "^$limited 1 00:02:00" "$folder.account" || fail "task $limited did not go back into the queue at its time limit"
log=$(echo "$folder"/default/.submitit/*_"$limited"/*_log.out)
grep -q "Caught signal SIGUSR2" "$log" || fail "$log: SLURM's signal before the time limit did not come"
grep -q "interrupted: stopped by SIGUSR2" "$log" || fail "$log: the cell did not stop at a step's end"
grep -q "Requeued job" "$log" || fail "$log: the job was not requeued"
echo "cancelled: seed $cancelled, requeued: seed $requeued, at its time limit: seed $limited; seed, status, taken up at steps:"
cells
(study) >"$folder.second.log" 2>&1 || { tail -20 "$folder.second.log" >&2; exit 1; }
echo "after the same command again:"
cells | tee "$folder.cells"
test "$(grep -c " ok" "$folder.cells")" -eq 4 || fail "not every cell is done"
test "$(find "$folder/default" -name record.json | wc -l)" -eq 4 || fail "there are not four records"
for seed in "$cancelled" "$requeued" "$limited"; do
  grep -qE "^$seed ok [1-9]" "$folder.cells" || fail "seed $seed was begun anew"
done
grep -q "4 planned: 4 ok" "$folder.second.log" || fail "the table misses cells"
test -z "$(find "$folder/default" -name record.json -newer "$folder/default/report.html")" || fail "the report is old"
for record in "$folder"/default/*/record.json; do
  grep -q "$(basename "$(dirname "$record")" | sed 's/.*-//')" "$folder/default/report.html" || fail "the report misses $record"
done
(train "seed=$cancelled,$limited" "runs=$folder/alone") >"$folder.alone.log" 2>&1
cd "$root"
"$python" - "$folder/default" "$folder/alone/default" <<'PY'
import sys
from pathlib import Path

from tests.test_ranks import same

there, here = map(Path, sys.argv[1:])
for path in sorted(here.glob("*/record.json")):
    same(path.parent, there / path.parent.name)
    print(path.parent.name, "is to the bit what it is without a launcher")
PY

cell() { # one cell, of as many tasks as $1 says; srun makes a job of its own
  cd "$root"
  local launch=() tasks=$1
  if ((tasks > 1)); then
    launch=(srun --job-name=one-cell --ntasks="$tasks" --cpus-per-task=1 --mem-per-cpu=2G --kill-on-bad-exit=1)
  fi
  "${launch[@]}" "$python" train.py trainer.steps=600 trainer.accumulate=2 trainer.batch_size=4 \
    trainer.checkpoint_every_s=1 trainer.progress=false task.limit=40 threads=1 reference=off "runs=$folder/tasks-$tasks"
}
cell 2 >"$folder.cell.first.log" 2>&1 &
until_there "$folder/tasks-2/default/*/checkpoint.safetensors"
scancel --name=one-cell
wait || true
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
