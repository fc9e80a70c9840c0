#!/usr/bin/env bash
# Train on several nodes of a SLURM cluster, one process per GPU; JAX connects them by SLURM's variables.
#
#   launch/slurm.sh [--dry-run] umae_jax.pretrain --config configs/pretrain_swin_large.py --workdir DIR ...
#
# All nodes must share DIR. SLURM sends SIGTERM two minutes before the time limit or a preemption; the run saves, and the
# job is requeued to continue. --dry-run prints the job instead of submitting it.
# Settings, from the environment: NODES, GPUS (per node), CPUS (per process), TIME, PARTITION, VENV (with umae_jax).
set -euo pipefail

NODES="${NODES:-2}"
GPUS="${GPUS:-8}"
CPUS="${CPUS:-12}"
TIME="${TIME:-24:00:00}"
VENV="${VENV:-$HOME/.venvs/umae_jax}"
cd "$(dirname "$0")/.."

submit=(sbatch)
if [ "${1:-}" = --dry-run ]; then
  submit=(cat)
  shift
fi
if [ $# = 0 ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi

command=$(printf '%q ' "$VENV/bin/python" -m "$@")
"${submit[@]}" <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=umae
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --cpus-per-task=$CPUS
#SBATCH --time=$TIME
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umae-%j.log
${PARTITION:+#SBATCH --partition=$PARTITION}
cd $(printf '%q' "$PWD")
status=0
srun --cpus-per-task=$CPUS --kill-on-bad-exit=0 ${command% } || status=\$?
# 143: stopped by SIGTERM, everything saved.
if [ "\$status" = 143 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$status"
JOB
