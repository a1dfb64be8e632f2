#!/usr/bin/env bash
# Train Qwen2.5-Math-7B with LoRA by RLSC on one GPU with 48 GB.
#
#   sbatch [sbatch options] launch/rlsc_7b_lora_1gpu.sh [trainer options]     for example: --training.num-steps 20
#   bash launch/rlsc_7b_lora_1gpu.sh --dry-run [trainer options]              print the plan and run the checks that need no GPU; runs nothing else
#
# Partition and account: sbatch -p ... -A ..., or SBATCH_PARTITION and SBATCH_ACCOUNT. Everything else:
# docs/cluster.md.
#SBATCH --job-name=rlsc_7b_lora_1gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --dependency=singleton
set -euo pipefail

# sbatch runs a copy of this file. SLURM reports the path of the original, followed by its arguments.
script=${BASH_SOURCE[0]}
if [[ ! -f $(dirname "$script")/lib.sh ]]; then script=$(scontrol show job "${SLURM_JOB_ID:-}" | sed -n '/^ *Command=/{s///;p;q}') || true; fi
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
source "${RLSC_ROOT:-$(dirname "$script")/..}/launch/lib.sh" || { echo "rlsc: error: set RLSC_ROOT to the checkout" >&2 && exit 2; }
rlsc_launch --nodes 1 --gpus-per-node 1 --config "$RLSC_ROOT/configs/qwen2.5_math_7b_lora_1gpu.yaml" -- "$@"
