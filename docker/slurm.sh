#!/usr/bin/env bash
# A study on a SLURM cluster, from the container image: each task of the array runs the same command, and the cells that
# no other task holds or has finished. A task that is cut off is put back into the queue and goes on.
#   sbatch --array=0-7 docker/slurm.sh lyapft.sif study=matrix threads=4
# The image: apptainer build lyapft.sif docker-daemon://lyapft:cpu. On GPUs: sbatch --gpus-per-task=1, and lyapft:cuda.
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
gpu=()
if [[ -n ${SLURM_JOB_GPUS:-} ]]; then gpu=(--nv); fi
# A rank of torchrun is no matter of this script: one task, one process.
exec srun --kill-on-bad-exit=1 apptainer exec "${gpu[@]}" --containall --env "OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" \
  --bind "$runs:/opt/lyapft/runs" --pwd /opt/lyapft "$image" python train.py "$@" trainer.progress=false
