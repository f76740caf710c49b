#!/usr/bin/env bash
# docker/slurm.sh on a real SLURM controller: an array of two tasks, each ended by the signal before its time limit, goes
# back into the queue and on from what the signal saved; a cancelled job does not. Cells are to the bit what the same image
# gives undisturbed, and no credential is in what is left. Where there is no Apptainer a stand-in takes its place: the
# image's files as the root, mounts and variables as asked for, and signals forwarded, so that they come twice.
# usage, as root: tests/cluster/batch.sh FOLDER IMAGE   (IMAGE: for the stand-in a folder, that of `buildah mount`)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$1 image=$2
mkdir -p "$folder/bin" "$folder/runs" "$folder/alone"
fail() { echo "FAILED: $1" >&2; exit 1; }
if ! command -v apptainer >/dev/null; then
  cat >"$folder/bin/apptainer" <<'SH'
#!/usr/bin/env bash
set -euo pipefail
shift # exec
mounts=() variables=(PATH=/opt/venv/bin:/usr/bin:/bin HOME=/tmp/home PYTHONUNBUFFERED=1) there=/
while [[ $1 == --* ]]; do
  case $1 in
    --bind) mounts+=("$2") && shift ;;
    --env) variables+=("$2") && shift ;;
    --pwd) there=$2 && shift ;;
  esac
  shift
done
for name in $(compgen -e APPTAINERENV_); do variables+=("${name#APPTAINERENV_}=${!name}"); done
unshare --mount bash -c '
  set -euo pipefail
  image=$1 there=$2 number=$3
  shift 3
  mount -t tmpfs none "$image/tmp"
  for name in proc dev; do mount --rbind "/$name" "$image/$name"; done
  for mount in "${@:1:number}"; do IFS=: read -r from to _ <<<"$mount" && mount --bind "$from" "$image$to"; done
  shift "$number"
  exec chroot "$image" env --chdir="$there" -i "$@"
' - "$1" "$there" "${#mounts[@]}" "${mounts[@]}" "${variables[@]}" "${@:2}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM
wait "$child" || true                                          # the trap ends this one
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
wait "$child"
SH
  chmod +x "$folder/bin/apptainer"
  export PATH=$folder/bin:$PATH
fi
canary=canary$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
# every 10 minutes: no checkpoint is written but that of the signal
words=("trainer.steps=${STEPS:-4000}" trainer.checkpoint_every_s=600 threads=1 reference=off)
submit() {
  (cd "$folder" && LYAPFT_RUNS=$folder/runs WANDB_API_KEY=$canary HF_TOKEN=hf_$canary \
    sbatch --parsable --cpus-per-task=1 --mem=2G "$@")
}
account() { # what SLURM says of each task of a job, a line each: task, restarts, state
  scontrol --oneliner show job "$1" | sed -nE 's/^JobId=([0-9]+) .*JobState=(\w+) .* Restarts=([0-9]+) .*/\1 \3 \2/p'
}
array=$(submit --array=0-1 --time=4 "$root/docker/slurm.sh" "$image" -m seed=0,1 "${words[@]}")
: >"$folder/account"
until test "$(squeue --noheader --array --states=RUNNING --job="$array" | wc -l)" -eq 2; do sleep 1; done
while squeue --noheader --job="$array" | grep -q .; do
  account "$array" >>"$folder/account"
  for job in $(squeue --noheader --array --format=%i --states=PENDING --job="$array"); do
    scontrol update "JobId=$job" StartTime=now TimeLimit=60 2>/dev/null || true # not two minutes later, nor once more
  done
  sleep 2
done
account "$array" >>"$folder/account"
echo "SLURM's account of the array (job, restarts, state):"
sort -u "$folder/account"
test "$(grep -E ' 1 COMPLETED' "$folder/account" | sort -u | wc -l)" -eq 2 || fail "two tasks did not end after one requeue each"
grep -hE "^(ERROR|INFO) lyapft.*(stopped by|, continued)" "$folder"/lyapft-"${array}"_*.log
test "$(cat "$folder"/lyapft-"${array}"_*.log | grep -c "ERROR lyapft.cell: .*stopped by SIGTERM")" -eq 2 || fail "a cell was not ended by the signal"
test "$(cat "$folder"/lyapft-"${array}"_*.log | grep -c "steps, continued")" -eq 2 || fail "a cell was begun anew"

single=$(submit --time=60 "$root/docker/slurm.sh" "$image" seed=2 "${words[@]}")
until grep -q "training " "$folder"/lyapft-"${single}"_*.log 2>/dev/null; do sleep 1; done
scancel "$single"
while squeue --noheader --job="$single" | grep -q .; do sleep 1; done
sleep 5
account "$single"
account "$single" | grep -q " 0 CANCELLED" || fail "a cancelled job is not the end of it"

apptainer exec --containall --env OMP_NUM_THREADS=1 --bind "$folder/alone:/opt/lyapft/runs" --pwd /opt/lyapft "$image" \
  python train.py "${words[@]}" trainer.progress=false >"$folder/alone.log" 2>&1
"${PYTHON:-$root/.venv/bin/python}" - "$folder" <<PY
import sys
from pathlib import Path

sys.path.insert(0, "$root")
from lyapft import records
from tests.test_ranks import same

folder = Path(sys.argv[1])
(here,) = (path.parent for path in (folder / "alone" / "default").glob("*/record.json"))
there = folder / "runs" / "default"
same(here, there / here.name)
found = {record["seed"]: (record["status"], record["resumed"]["at_steps"]) for _, record in records.load_study(there)
         if record["status"] == "ok"}
print("seed: status, taken up at steps", found)
assert found.keys() == {0, 1} and all(steps for _, steps in found.values())
PY
grep -rl "$canary" "$folder" --include='*' && fail "a credential was written"
echo "complete"
