#!/usr/bin/env bash
# Trains over the hosts of a hostfile with DeepSpeed's own launcher, which reaches them by ssh.
#
#   launch/deepspeed.sh HOSTFILE RECIPE [--key.sub value ...]
#
# Every host needs this folder and its .venv at the same path. What `convnext-yolo launch deepspeed`
# does beyond this: it checks hostfile and batch first, quotes options for the other hosts' shells
# (here: no spaces, braces or dollars in them), and ends everything on a signal. The lines of your
# .deepspeed_env files, at home and here, are handed on by both.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 HOSTFILE RECIPE [--key.sub value ...]" >&2
  exit 2
fi
hostfile=$1 recipe=$2
shift 2
bin=${BIN:-$PWD/.venv/bin}

# What the ranks need of this environment, one NAME=VALUE a line: a comment would crash DeepSpeed.
names='(NCCL|GLOO|TORCH_NCCL|UCX|FI)_[A-Z0-9_]+|DS_ACCELERATOR|DEEPSPEED_TIMEOUT|LD_LIBRARY_PATH'
names+='|TP_SOCKET_IFNAME|TORCH_DISTRIBUTED_DEBUG|CUDA_DEVICE_MAX_CONNECTIONS|TMPDIR|TZ|HF_HOME'
names+='|HF_HUB_OFFLINE|TORCH_HOME|WANDB_MODE|WANDB_DIR|TORCH_SHOW_CPP_STACKTRACES|TORCH_CPP_LOG_LEVEL'
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
{
  echo "PATH=$bin:/usr/local/bin:/usr/bin:/bin"
  echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
  env | grep -E "^($names)=" || true
  for file in "$HOME/.deepspeed_env" .deepspeed_env; do
    if [ -f "$file" ]; then grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file" || true; fi
  done
} >"$DS_ENV_FILE"

# The first host's name is where the ranks meet; DeepSpeed would take the first of its addresses.
master=$(awk '!/^[[:space:]]*(#|$)/ { sub(/.*@/, "", $1); print $1; exit }' "$hostfile")

"$bin/deepspeed" --hostfile "$hostfile" --force_multi \
  --master_addr "${MASTER_ADDR:-$master}" --master_port "${MASTER_PORT:-29500}" \
  --no_local_rank --module convnext_yolo.launch train --config "$recipe" --resume auto "$@"
