#!/usr/bin/env bash
# Trains over the hosts of a hostfile with DeepSpeed's own launcher, which reaches them by ssh.
#
#   launch/deepspeed.sh HOSTFILE RECIPE [--key.sub value ...]
#
# Every host needs this folder and its .venv at the same path. What `convnext-yolo launch deepspeed`
# does beyond this: it checks hostfile and batch first, quotes options for the other hosts' shells
# (here: no spaces, braces or dollars in them), and ends everything on a signal.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 HOSTFILE RECIPE [--key.sub value ...]" >&2
  exit 2
fi
hostfile=$1 recipe=$2
shift 2
bin=${BIN:-$PWD/.venv/bin}

# What the ranks need of this environment, one NAME=VALUE a line: a comment would crash DeepSpeed.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
{
  echo "PATH=$bin:/usr/local/bin:/usr/bin:/bin"
  echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
  env | grep -E '^(NCCL|GLOO)_[A-Z_]+=' || true
} >"$DS_ENV_FILE"

# The first host's name is where the ranks meet; DeepSpeed would take the first of its addresses.
master=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")

"$bin/deepspeed" --hostfile "$hostfile" --force_multi \
  --master_addr "${MASTER_ADDR:-$master}" --master_port "${MASTER_PORT:-29500}" \
  --no_local_rank --module convnext_yolo.launch train --config "$recipe" --resume auto "$@"
