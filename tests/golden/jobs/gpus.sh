#!/bin/bash
#SBATCH --job-name=small
#SBATCH --nodes=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-%j.out
#SBATCH --requeue
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0

run_dir=/runs/small
submission=/runs/small/slurm/submit-00001
python=/venv/bin/python
# Above is what `turnout submit` was told; from here on every job is the same.
source "$submission/fabric.env"
# Only now: a site's own file may name variables that are not set.
set -euo pipefail

# The code as it was when the job was submitted: an edit since then changes nothing in a job that is requeued.
export PYTHONPATH="$submission/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# Since SLURM 22.05 srun does not take this over from sbatch.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# The shell becomes the supervisor, so that SLURM's warning (--signal=B:) reaches it and not the ranks.
exec "$python" -m turnout.launch.slurm.job "$run_dir" "$submission"
