#!/usr/bin/env bash
# One launcher on each node: srun starts this once a node, and the launcher starts the node's ranks.
set -euo pipefail

launcher=$1 hostfile=$2 per_node=$3
shift 3
case $launcher in # job.sh has checked it
deepspeed)
    exec deepspeed --no_ssh --hostfile "$hostfile" --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
    ;;
torchrun)
    exec torchrun --nnodes "$(wc -l <"$hostfile")" --nproc-per-node "$per_node" --node-rank "$SLURM_NODEID" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 "$@"
    ;;
esac
