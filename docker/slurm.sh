#!/usr/bin/env bash
# A study on a SLURM cluster, from the container image: each task of the array runs the same command, and the cells that
# no other task holds or has finished. A task that reaches its time limit, or whose node is taken away, goes back into the
# queue and goes on from its last checkpoint.
#   sbatch --array=0-7 docker/slurm.sh lyapft.sif study=matrix threads=4
# LYAPFT_RUNS is where results go (default: runs/ here), LYAPFT_DATA a folder that the cells may read, under its own name.
# The image: apptainer build lyapft.sif docker-daemon://lyapft:cpu. On GPUs: sbatch --gpus-per-task=1, and lyapft:cuda.
# Never run with Apptainer itself, nor on GPUs: tests/cluster/batch.sh has a stand-in for the one.
#SBATCH --job-name=lyapft
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=lyapft-%A_%a.log
set -euo pipefail
image=$1
shift
runs=${LYAPFT_RUNS:-$SLURM_SUBMIT_DIR/runs}
mkdir -p "$runs"
options=(--containall --env "OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" --bind "$runs:/opt/lyapft/runs" --pwd /opt/lyapft)
if [[ -n ${SLURM_JOB_GPUS:-} ]]; then options+=(--nv); fi
if [[ -n ${LYAPFT_DATA:-} ]]; then options+=(--bind "$LYAPFT_DATA:$LYAPFT_DATA:ro"); fi
for name in WANDB_API_KEY HF_TOKEN; do # by the environment: a command line is seen by everybody on the node
  if [[ -n ${!name:-} ]]; then export "APPTAINERENV_$name=${!name}"; fi
done
# A rank of torchrun is no matter of this script: one task, one process.
status=0
srun --kill-on-bad-exit=1 apptainer exec "${options[@]}" "$image" python train.py "$@" trainer.progress=false || status=$?
if [[ $status == 143 ]]; then # SIGTERM two minutes before the time limit: a checkpoint is written
  scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
