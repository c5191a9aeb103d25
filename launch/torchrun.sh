#!/usr/bin/env bash
# This host's part of a torchrun job. Start it on every host, with its number from 0.
#
#   launch/torchrun.sh HOSTS NUMBER HOST0:PORT PROCESSES RECIPE [--key.sub value ...]
#
# as in  launch/torchrun.sh 2 0 node1:29500 8 convnext_tiny_coco  on node1
# and    launch/torchrun.sh 2 1 node1:29500 8 convnext_tiny_coco  on node2.
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

# Without these two the rendezvous hangs where a host has several addresses: whether this host
# serves it, and the address by which the others reach this one (that of the way to host 0).
is_host=0
if [ "$number" -eq 0 ]; then is_host=1; fi
host0=$(getent ahosts "${endpoint%:*}" | awk '{ print $1; exit }') || true
if [ -z "$host0" ]; then
  echo "$0: ${endpoint%:*} can't be found from here; give its address" >&2
  exit 2
fi
address=${LOCAL_ADDR:-$(ip route get "$host0" | sed -n 's/.* src \([^ ]*\).*/\1/p')}

exec "$bin/torchrun" --nnodes "$hosts" --nproc-per-node "$processes" \
  --rdzv-backend c10d --rdzv-id "${RDZV_ID:-convnext-yolo}" --rdzv-endpoint "$endpoint" \
  --rdzv-conf "is_host=$is_host" --local-addr "$address" \
  -m convnext_yolo.launch train --config "$recipe" --resume auto "$@"
