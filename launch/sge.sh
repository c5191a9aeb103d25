#!/bin/bash
# A Grid Engine job that trains, and is started again until it is done:  qsub launch/sge.sh
# Names of parallel environments and of GPU resources differ between sites: `qconf -spl`, `qconf -sc`.
#$ -N convnext-yolo
#$ -cwd
#$ -j y
#$ -r y
#$ -notify
#$ -pe mpi 16
#$ -l gpu=1
#$ -l s_rt=23:50:00,h_rt=24:00:00
# One slot is one rank, for one GPU. Warnings come as USR1 (s_rt, and before a stop) and, for
# -notify, as USR2 (before the end of the job); the ranks save then, and exit code 99 makes Grid
# Engine start the job again. A host that is lost is left out, if the rest can share the batch.
bin=$PWD/.venv/bin
recipe=(--config convnext_tiny_coco --batch.micro 8)
# From here on there is nothing to change.

# "node1 8 all.q@node1 UNDEFINED"  ->  "node1 slots=8"
hostfile=$TMPDIR/hostfile
# A host may have a line for each of its queues.
awk '{ if (!($1 in slots)) names[++count] = $1; slots[$1] += $2 }
  END { for (i = 1; i <= count; i++) print names[i] " slots=" slots[names[i]] }' \
  "$PE_HOSTFILE" >"$hostfile"
port=$((10000 + JOB_ID % 20000))
asked=

# In a session of its own: Grid Engine signals this script's process group, and USR2 would end what
# does not know it.
trap 'asked=yes; kill -USR1 "$front"' USR1 USR2 TERM
setsid "$bin/convnext-yolo" launch deepspeed --hostfile "$hostfile" --master-port "$port" \
  --max-restarts 2 "${recipe[@]}" &
front=$!
while kill -0 "$front" 2>/dev/null; do wait "$front"; done # a trap ends `wait` before its time
wait "$front"
code=$?

# 130 (or 138): asked while the doctor looked, or before that.
case $asked$code in
  0 | yes0 | yes130 | yes138) ;;
  *) exit "$code" ;;
esac
if "$bin/python" -m convnext_yolo.launch.finished "${recipe[@]}"; then exit 0; fi
exit 99
