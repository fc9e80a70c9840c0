#!/usr/bin/env bash
# Train on all GPUs of this machine, in one process: install into a virtual environment, check, run.
#
#   launch/gpu_node.sh [--dry-run] umae_jax.pretrain --config configs/pretrain_swin_tiny.py --workdir DIR ...
#
# The same command again continues the run. --dry-run prints the commands instead of running them.
# Settings, from the environment: VENV (directory of the virtual environment).
set -euo pipefail

VENV="${VENV:-$HOME/.venvs/umae_jax}"
cd "$(dirname "$0")/.."

dry=0
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# = 0 ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi

do_run() {
  if [ "$dry" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

[ -x "$VENV/bin/python" ] || do_run python3 -m venv "$VENV"
do_run "$VENV/bin/pip" install --quiet -e ".[cuda]"
do_run "$VENV/bin/python" -m umae_jax.doctor
[ "$dry" = 1 ] || exec "$VENV/bin/python" -m "$@" # exec: signals reach the run
do_run "$VENV/bin/python" -m "$@"
