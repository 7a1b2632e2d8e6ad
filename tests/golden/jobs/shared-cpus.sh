#!/bin/bash
#SBATCH --job-name=small
#SBATCH --nodes=1-2
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-%j.out
#SBATCH --requeue

run_dir=/runs/small
submission=/runs/small/slurm/submit-00001
python=/venv/bin/python
# The lines above depend on the options of `turnout submit`; those below are the same in every job.
source "$submission/fabric.env"
# Only now: a site's own file may use unset variables.
set -euo pipefail

# The code as it was when the job was submitted: later edits do not affect a requeued job.
export PYTHONPATH="$submission/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# Since SLURM 22.05 srun does not inherit this from sbatch.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# exec: SLURM's warning (--signal=B:) goes to the batch shell, and so to this process, not to the ranks.
exec "$python" -m turnout.launch.slurm.job "$run_dir" "$submission"
