#!/usr/bin/env bash
# Run the paper's experiment (arXiv 2506.06395, table 2) as one chain of jobs: evaluate the base models under
# every template, each column with the protocol of its published numbers; train on AIME 2024 the paper's
# recipe, its parts and controls with three seeds each; evaluate after 10, 20 and 40 steps; and write the
# table with confidence intervals beside the paper's numbers.
#
#   bash launch/reproduce_table2.sh --benchmark-dir DIR [--sizes 1.5b,7b] [--output DIR]       submits the chain to SLURM
#   bash launch/reproduce_table2.sh --benchmark-dir DIR --arms rlsc --seeds 0 --steps 10      a part of it
#   bash launch/reproduce_table2.sh --local --sizes tiny --seeds 0 --steps 1,2                 the same chain, here
#   bash launch/reproduce_table2.sh --dry-run ...                                              prints it
#
# If an input is missing, the script names it and starts nothing. Partition and account: SBATCH_PARTITION and
# SBATCH_ACCOUNT. Other options are passed to every training and evaluation.
set -euo pipefail

# shellcheck source=launch/python.sh
source "${RLSC_ROOT:-$(dirname "${BASH_SOURCE[0]}")/..}/launch/python.sh"
python=${host_python:-python3}

mode=slurm
arguments=()
for argument in "$@"; do
    case $argument in
        --local) mode=local ;;
        --dry-run) mode=print ;;
        *) arguments+=("$argument") ;;
    esac
done
if [[ $mode == slurm ]] && ! command -v sbatch >/dev/null; then
    echo "reproduce_table2: no sbatch on this machine; --local runs the chain here, --dry-run prints it" >&2
    exit 2
fi

plan=$("$python" -m rlsc_mcore.experiments.table2 plan "${arguments[@]}")
declare -A jobs
while IFS=$'\t' read -r -a fields; do
    name=${fields[0]} kind=${fields[1]} after=${fields[2]} script=${fields[3]} command=("${fields[@]:4}")
    case $kind in
        table) program=("$python" -m rlsc_mcore.experiments.table2) ;;
        *) program=("$python" -m rlsc_mcore.cli "$kind") ;;
    esac
    if [[ $mode == print ]]; then
        printf '%s (after %s): %s\n' "$name" "$after" "${program[*]} ${command[*]}"
        continue
    elif [[ $mode == local ]]; then
        printf '===== %s\n' "$name"
        "${program[@]}" "${command[@]}" </dev/null
        continue
    fi
    options=(--parsable "--job-name=table2.$name")
    if [[ $after != - ]]; then
        ids=""
        for task in ${after//,/ }; do ids+=":${jobs[$task]}"; done
        options+=("--dependency=afterok$ids")
    fi
    if [[ $kind == train ]]; then
        jobs[$name]=$(RLSC_CONFIG=${command[1]} sbatch "${options[@]}" "$RLSC_ROOT/launch/$script" "${command[@]:2}")
    elif [[ $kind == eval ]]; then
        gpus=$([[ $script == rlsc_7b.sh ]] && echo 8 || echo 1)
        wrapped=("$python" -m torch.distributed.run --standalone "--nproc-per-node=${NPROC_PER_NODE:-$gpus}" -m rlsc_mcore.cli eval "${command[@]}")
        jobs[$name]=$(sbatch "${options[@]}" --nodes=1 "--gpus-per-node=${GPUS_PER_NODE:-$gpus}" --time=12:00:00 --wrap "$(printf '%q ' "${wrapped[@]}")")
    else
        jobs[$name]=$(sbatch "${options[@]}" --nodes=1 --time=00:10:00 --wrap "$(printf '%q ' "${program[@]}" "${command[@]}")")
    fi
    jobs[$name]=${jobs[$name]%%;*}
    printf '%s: job %s (after %s)\n' "$name" "${jobs[$name]}" "$after"
done <<<"$plan"
