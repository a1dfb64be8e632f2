#!/usr/bin/env bash
# Train Qwen3-8B by RLSC on one node with 8 GPUs.
#
#   sbatch [sbatch options] launch/rlsc_qwen3_8b.sh [trainer options]     for example: --training.num-steps 20
#   bash launch/rlsc_qwen3_8b.sh --dry-run [trainer options]              print the plan and run the checks that need no GPU; runs nothing else
#
# Partition and account: sbatch -p ... -A ..., or SBATCH_PARTITION and SBATCH_ACCOUNT. Everything else:
# docs/cluster.md.
#SBATCH --job-name=rlsc_qwen3_8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --dependency=singleton
set -euo pipefail

# sbatch runs a copy of this file. SLURM reports the path of the original.
if [[ -z ${RLSC_ROOT:-} ]]; then
    script=${BASH_SOURCE[0]}
    if [[ ! -f $(dirname "$script")/lib.sh ]]; then
        script=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p')
        while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done # arguments follow the path
    fi
    RLSC_ROOT=$(cd "$(dirname "$script")/.." && pwd)
fi
if [[ ! -f $RLSC_ROOT/launch/lib.sh ]]; then
    echo "rlsc: error: no launch/lib.sh in $RLSC_ROOT; set RLSC_ROOT to the checkout" >&2
    exit 2
fi
export RLSC_ROOT
source "$RLSC_ROOT/launch/lib.sh"
rlsc_launch --nodes 1 --gpus-per-node 8 --config "$RLSC_ROOT/configs/qwen3_8b_1x8.yaml" -- "$@"
