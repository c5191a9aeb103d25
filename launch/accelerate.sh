#!/usr/bin/env bash
# This host's part of an accelerate job. Start it on every host, with its number from 0.
#
#   launch/accelerate.sh HOSTS NUMBER HOST0:PORT PROCESSES RECIPE [--key.sub value ...]
#
# PROCESSES are those of each host, at least two in all. --multi_gpu is accelerate's name for several
# processes, on CPUs too. Its DeepSpeed plugin stays off: the recipe describes the engine, which is
# DeepSpeed's own.
set -euo pipefail

if [ $# -lt 5 ]; then
  echo "usage: $0 HOSTS NUMBER HOST0:PORT PROCESSES RECIPE [--key.sub value ...]" >&2
  exit 2
fi
case $3 in
  *?:[0-9]*) ;;
  *)
    echo "$0: $3 is not HOST0:PORT; give it as in node1:29500" >&2
    exit 2
    ;;
esac
hosts=$1 number=$2 endpoint=$3 processes=$4 recipe=$5
shift 5
bin=${BIN:-$PWD/.venv/bin}

exec "$bin/accelerate" launch --multi_gpu --same_network --rdzv_backend static \
  --num_machines "$hosts" --machine_rank "$number" --num_processes $((hosts * processes)) \
  --main_process_ip "${endpoint%:*}" --main_process_port "${endpoint##*:}" \
  --mixed_precision no --dynamo_backend no \
  --module convnext_yolo.launch train --config "$recipe" --resume auto "$@"
