#!/usr/bin/env bash
# Train on a Cloud TPU pod: create it as a queued resource, install on every worker, run, start again after a preemption,
# fetch the log, delete.
#
#   launch/tpu_pod.sh [--dry-run] all  -- umae_jax.pretrain --config configs/pretrain_swin_large.py --workdir DIR ...
#   launch/tpu_pod.sh [--dry-run] up|install|logs|down
#   launch/tpu_pod.sh [--dry-run] run  -- umae_jax.pretrain ...
#
# All workers must share DIR, such as gs://BUCKET/DIR. After a preemption the run continues from its newest checkpoint.
# --dry-run prints the commands instead of running them.
#
# Settings, from the environment: NAME, ZONE, PROJECT, TYPE (such as v5litepod-16), RUNTIME, SPOT=1 (spot capacity),
# POLL (seconds between two requests for the pod's state).
set -euo pipefail

NAME="${NAME:-umae}"
ZONE="${ZONE:-us-central1-a}"
PROJECT="${PROJECT:-$(gcloud config get-value project 2>/dev/null || true)}"
TYPE="${TYPE:-v5litepod-16}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"
SPOT="${SPOT:-0}"
POLL="${POLL:-30}"
LOG="umae_jax.log" # on every worker

cd "$(dirname "$0")/.."

die() {
  echo "error: $*" >&2
  exit 2
}

dry=0
do_run() {
  if [ "$dry" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

place=()
resources() { do_run gcloud compute tpus queued-resources "$@" "${place[@]}"; }
on_workers() { do_run gcloud compute tpus tpu-vm ssh "$NAME" --worker=all --command="$1" "${place[@]}"; }

state() {
  if [ "$dry" = 1 ]; then
    echo ACTIVE
  else
    gcloud compute tpus queued-resources describe "$NAME" --format='value(state.state)' "${place[@]}" 2>/dev/null ||
      echo MISSING
  fi
}

up() {
  local spot=()
  [ "$SPOT" = 1 ] && spot=(--spot)
  resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | MISSING) die "$ZONE did not provide the pod $NAME; see gcloud compute tpus queued-resources describe $NAME" ;;
      *) sleep "$POLL" ;;
    esac
  done
}

install() {
  on_workers 'mkdir -p ~/umae_jax'
  do_run gcloud compute tpus tpu-vm scp --recurse configs docs umae_jax pyproject.toml README.md "$NAME:umae_jax/" \
    --worker=all "${place[@]}"
  # The image's own Python may be older than 3.11.
  on_workers 'pip install --quiet uv && cd ~/umae_jax && python3 -m uv venv --quiet --allow-existing --python 3.12 ~/venv &&
    python3 -m uv pip install --quiet --python ~/venv/bin/python -e ".[tpu]"'
}

train() {
  local command
  command=$(printf '%q ' "$@")
  on_workers "cd ~/umae_jax && ~/venv/bin/python -m ${command% } 2>&1 | tee -a ~/$LOG; exit \${PIPESTATUS[0]}"
}

logs() {
  do_run mkdir -p logs
  do_run gcloud compute tpus tpu-vm scp "$NAME:$LOG" "logs/$NAME.log" --worker=0 "${place[@]}"
}

down() { resources delete "$NAME" --force --quiet; }

# Succeed if the pod disappears within minutes: its state lags behind a preemption.
preempted() {
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(state)" = ACTIVE ] || return 0
    sleep "$POLL"
  done
  return 1
}

all() {
  while true; do
    up
    install
    if train "$@"; then
      break
    fi
    preempted || die "the run failed on a pod that still exists; see launch/tpu_pod.sh logs, fix it, then use run"
    echo "the pod was preempted; starting again" >&2
    down
  done
  logs
  down
}

if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
verb="${1:-}"
shift || true
[ "${1:-}" = -- ] && shift
[ "$dry" = 1 ] && PROJECT="${PROJECT:-PROJECT}"
case "$verb" in
  up | install | logs | down) [ $# = 0 ] || die "$verb takes no command" ;;
  run | all) [ $# -gt 0 ] || die "write the command after --, such as umae_jax.pretrain --config ... --workdir ..." ;;
  *)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
[ -n "$PROJECT" ] || die "no project: set PROJECT, or gcloud config set project"
place=(--zone="$ZONE" --project="$PROJECT")
if [ "$verb" = run ]; then train "$@"; else "$verb" "$@"; fi
