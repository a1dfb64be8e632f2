#!/usr/bin/env bash
# Everything that is claimed of one GPU, measured and put into one table.
#
#   bash benchmarks/gpu_acceptance.sh [--only kernels|swap|train|loop|peers]... [--again] [--out FOLDER]
#   bash benchmarks/gpu_acceptance.sh --dry-run                                  print the commands; needs no GPU
#
# Ends within 9 minutes: what did not fit is left, and the next call goes on there. A step that was done with these very sources is
# not done again (--again does). Results, plots and the table: benchmarks/results/<gpu>/. What is wrong is not timed: where a
# part's tests fail, its benchmarks do not run. Exit codes: 0 all done, 1 something failed, 2 no GPU or bad input, 3 steps are left.
#
# PYTHON names the interpreter (default: .venv/bin/python, else python3): an environment with a CUDA torch, vLLM and pytest; nvcc
# in PATH for the kernels. Peers that are installed take part (pip install '.[bench]'). RLSC_SMOLLM2 names a folder that `rlsc
# prepare smollm2` made (models/smollm2_135m) and RLSC_GSM8K a file of questions (gsm8k_test.jsonl) for the run on real weights.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

minutes_in_all=9
parts=(kernels swap train loop peers)
wanted=() dry="" again="" out=""
stop() {
    echo "gpu_acceptance: $*" >&2
    exit 2
}
while (($#)); do
    case $1 in
        --only)
            [[ " ${parts[*]} " == *" ${2:-} "* ]] || stop "--only: expected one of ${parts[*]}, got '${2:-}'"
            wanted+=("$2")
            shift
            ;;
        --out)
            [[ -n ${2:-} ]] || stop "--out: expected a folder after it"
            out=$2
            shift
            ;;
        --dry-run) dry=1 ;;
        --again) again=1 ;;
        *) stop "expected --only PART, --out FOLDER, --again or --dry-run, got '$1'" ;;
    esac
    shift
done
if ((${#wanted[@]} == 0)); then wanted=("${parts[@]}"); fi

python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
command -v "$python" >/dev/null || stop "PYTHON: no program $python"
if [[ -z $dry ]]; then
    gpu=$("$python" -c 'import torch
from benchmarks.harness import device_name
assert torch.cuda.is_available(), "torch.cuda.is_available() is False"
print(device_name(torch.device("cuda")))' 2>&1) ||
        stop "no GPU for $python ($(tail -n 1 <<<"$gpu")); nothing was measured. --dry-run prints what would be; PYTHON chooses the interpreter"
else
    gpu=h200
fi
out=${out:-benchmarks/results/$gpu}
models=${RLSC_BENCH_MODELS:-/tmp/rlsc_bench_models} # random weights: gigabytes, made on the spot
smollm2=${RLSC_SMOLLM2:-models/smollm2_135m} gsm8k=${RLSC_GSM8K:-gsm8k_test.jsonl}
sources=$(find rlsc_mcore csrc benchmarks tests/gpu setup.py -type f \( -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' \) -print0 |
    sort -z | xargs -0 cat | sha256sum | cut -c1-16)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
unset PYTHONDONTWRITEBYTECODE

failed=() left=() broken_parts=" "
declare -A tried # by name: what several parts stand on runs once in a call
# step PART NAME SECONDS COMMAND...: run it once for these sources, unless its part is not wanted, has failed, or time is over.
step() {
    local part=$1 name=$2 seconds=$3 remaining begin=$SECONDS status=0
    shift 3
    [[ " ${wanted[*]} " == *" $part "* ]] || return 0
    if [[ -n ${tried[$name]:-} ]]; then
        [[ ${tried[$name]} == "done" ]] || broken_parts+="$part "
        return 0
    fi
    if [[ -n $dry ]]; then
        tried[$name]="done"
        printf '%-8s %-16s at most %3d s: %s\n' "$part" "$name" "$seconds" "$(printf '%q ' "$@")"
        return 0
    fi
    if [[ -z $again && $(cat "$out/.done/$name" 2>/dev/null) == "$sources" ]]; then
        echo "===== $name: done before"
        return 0
    fi
    if [[ $broken_parts == *" $part "* ]]; then
        echo "===== $name: not run, since a step of $part has failed"
        return 0
    fi
    remaining=$((minutes_in_all * 60 - 15 - SECONDS)) # the table takes the rest
    if ((remaining < 20)); then
        left+=("$name")
        return 0
    fi
    tried[$name]=failed
    printf '\n===== %s: %s\n' "$name" "$(printf '%q ' "$@")"
    timeout --kill-after=10 "$((seconds < remaining ? seconds : remaining))" "$@" </dev/null || status=$?
    echo "===== $name: exit $status after $((SECONDS - begin)) s"
    if ((status == 0)); then
        tried[$name]="done"
        mkdir -p "$out/.done" && echo "$sources" >"$out/.done/$name"
    elif ((status == 124 || status == 137)) && ((remaining < seconds)); then
        left+=("$name") # it had less time than it may take
    else
        failed+=("$name")
        broken_parts+="$part "
    fi
}

# --- what several parts stand on, made by the first that is wanted; another machine, or a tidy one, has it no more
compgen -G 'rlsc_mcore/_C*.so' >/dev/null || rm -f "$out/.done/build"
for size in 1.5b 7b; do
    [[ -f $models/qwen2.5-$size/config.json ]] || rm -f "$out/.done/model_$size"
done
for part in "${parts[@]}"; do
    step "$part" build 150 env RLSC_NATIVE=cuda "$python" setup.py -q build_ext --inplace
done

# --- kernels: compare with float64 on the device, then time
step kernels backends 60 "$python" -c 'from rlsc_mcore.ops import describe_backends; print(*describe_backends(), sep="\n")'
step kernels kernel_tests 150 "$python" -m pytest -q -m "" tests/gpu/ops
for bench in log_prob linear_log_prob sequence_sum; do
    step kernels "$bench" 100 "$python" -m "benchmarks.bench_$bench" --seconds "${SECONDS_PER_CASE:-1.5}" --out "$out"
done

# --- swap: the transition from training to sampling, every way side by side
step swap weight_swap_0.5b 100 "$python" -m benchmarks.bench_weight_swap --shape qwen2.5-0.5b --out "$out"
step swap weight_swap_1.5b 120 "$python" -m benchmarks.bench_weight_swap --shape qwen2.5-1.5b --out "$out"
step swap weight_swap_7b 240 "$python" -m benchmarks.bench_weight_swap --shape qwen2.5-7b --out "$out"

# --- train: model FLOPs utilisation and peak memory, loss and gradient norm compared with transformers first
step train train_step_1.5b 150 "$python" -m benchmarks.bench_train_step --shape qwen2.5-1.5b --out "$out"
step train train_step_7b 240 "$python" -m benchmarks.bench_train_step --shape qwen2.5-7b --out "$out"

# --- loop: the whole step with its engine; trainer and engine must agree first
step loop loop_tests 150 "$python" -m pytest -q -m "" tests/gpu/test_loop.py
for part in loop peers; do
    step "$part" model_1.5b 120 "$python" -m benchmarks.random_model --shape qwen2.5-1.5b --output "$models/qwen2.5-1.5b"
done
step loop end_to_end_1.5b 240 "$python" -m benchmarks.bench_end_to_end --config configs/qwen2.5_math_1.5b_1gpu.yaml \
    --model.path "$models/qwen2.5-1.5b" --data.path embedded:train --data.template chat --data.questions-per-step 8 \
    --rollout.num-samples 16 --rollout.max-new-tokens 1024 --steps 3 --repeats 3 --output "$out/end_to_end_1.5b.json"

step loop model_7b 240 "$python" -m benchmarks.random_model --shape qwen2.5-7b --output "$models/qwen2.5-7b"
step loop end_to_end_7b 300 "$python" -m benchmarks.bench_end_to_end --config configs/qwen2.5_math_1.5b_1gpu.yaml --only phases \
    --model.path "$models/qwen2.5-7b" --data.path embedded:train --data.template chat --data.questions-per-step 8 \
    --rollout.num-samples 16 --rollout.max-new-tokens 1024 --rollout.kv-cache-gib 8 --optimizer.precision-aware True \
    --training.tokens-per-micro-batch 3328 --steps 2 --output "$out/end_to_end_7b.json"

# --- peers: other trainers, the same model, prompts, samples and lengths
step peers trl 300 "$python" -m benchmarks.bench_peers --model "$models/qwen2.5-1.5b" --out "$out"

# --- real weights and questions, 20 steps and 3 seeds, with baselines: what is begun goes on in the next call
if [[ -n $dry || (-f $smollm2/config.json && -f $gsm8k) ]]; then
    step loop real_model "$((minutes_in_all * 60))" "$python" -m benchmarks.bench_real_model --model "$smollm2" --questions "$gsm8k" --out "$out"
elif [[ " ${wanted[*]} " == *" loop "* ]]; then
    echo "===== real_model: left out: no $smollm2/config.json (RLSC_SMOLLM2) or no $gsm8k (RLSC_GSM8K)"
fi

if [[ -n $dry ]]; then
    echo "then: $python -m benchmarks.acceptance $out"
    exit 0
fi
echo
"$python" -m benchmarks.acceptance "$out" || failed+=("the table")
if ((${#failed[@]})); then
    echo "gpu_acceptance: failed: ${failed[*]}" >&2
    exit 1
fi
if ((${#left[@]})); then
    echo "gpu_acceptance: $minutes_in_all minutes are over; left for the next call: ${left[*]}"
    exit 3
fi
