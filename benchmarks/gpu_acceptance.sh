#!/usr/bin/env bash
# Measure all claims about one GPU and write them to one table.
#
#   bash benchmarks/gpu_acceptance.sh [--only kernels|swap|train|loop|peers]... [--again] [--out FOLDER]
#   bash benchmarks/gpu_acceptance.sh --dry-run                                  print the commands; needs no GPU
#   bash benchmarks/gpu_acceptance.sh --rehearse --out FOLDER                    run every command on a CPU, with tiny shapes
#
# Ends within 9 minutes. The next call runs the steps that are left. A step that is done with the same sources
# is not repeated (--again repeats it). Results, plots and the table: benchmarks/results/<gpu>/. If the tests
# of a part fail, its benchmarks do not run.
# Exit codes: 0 all done, 1 a step failed, 2 no GPU or bad input, 3 steps are left.
#
# PYTHON is the interpreter (default: .venv/bin/python, else python3) of an environment with a CUDA torch,
# vLLM and pytest; the kernels need nvcc in PATH. Installed peers are measured too (pip install '.[bench]').
# For the run on real weights, RLSC_SMOLLM2 is a folder made by `rlsc prepare smollm2` (models/smollm2_135m)
# and RLSC_GSM8K a file of questions (gsm8k_test.jsonl).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

minutes_in_all=9
parts=(kernels swap train loop peers)
wanted=() dry="" again="" out="" rehearse=""
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
        --rehearse) rehearse=1 ;;
        --again) again=1 ;;
        *) stop "expected --only PART, --out FOLDER, --again, --dry-run or --rehearse, got '$1'" ;;
    esac
    shift
done
if ((${#wanted[@]} == 0)); then wanted=("${parts[@]}"); fi

python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
command -v "$python" >/dev/null || stop "PYTHON: no program $python"
if [[ -n $rehearse ]]; then
    [[ -n $out ]] || stop "--rehearse: expected --out FOLDER with it, so that no result of a GPU is replaced"
    gpu=cpu minutes_in_all=40
    export CUDA_VISIBLE_DEVICES="" TORCH_COMPILE_DISABLE=1 # compiling takes longer than all the rest
elif [[ -z $dry ]]; then
    gpu=$("$python" -c 'import torch
from benchmarks.harness import device_name
assert torch.cuda.is_available(), "torch.cuda.is_available() is False"
print(device_name(torch.device("cuda")))' 2>&1) ||
        stop "no GPU for $python ($(tail -n 1 <<<"$gpu")); nothing was measured. --dry-run prints what would be; PYTHON chooses the interpreter"
else
    gpu=h200
fi
out=${out:-benchmarks/results/$gpu}
gpu_gib=1000 # no limit where nothing is measured
if [[ -z $dry$rehearse ]]; then
    gpu_gib=$("$python" -c 'import torch; print(torch.cuda.mem_get_info()[1] >> 30)') || stop "the GPU's memory cannot be read"
fi
models=${RLSC_BENCH_MODELS:-/tmp/rlsc_bench_models} # random weights: gigabytes, made on the spot
smollm2=${RLSC_SMOLLM2:-models/smollm2_135m} gsm8k=${RLSC_GSM8K:-gsm8k_test.jsonl}
sources=$(find rlsc_mcore csrc benchmarks tests/gpu setup.py -type f \( -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' \) -print0 |
    sort -z | xargs -0 cat | sha256sum | cut -c1-16)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
unset PYTHONDONTWRITEBYTECODE

failed=() left=() broken_parts=" "
declare -A tried # by name: what several parts stand on runs once in a call
# step PART NAME SECONDS COMMAND...: run it once for these sources, unless its part is not selected, has
# failed, or no time is left.
step() {
    local part=$1 name=$2 seconds=$3 remaining begin=$SECONDS status=0
    shift 3
    if [[ -n $rehearse ]]; then seconds=$((4 * seconds)); fi # a busy machine decides nothing
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

# needs GIB NAME FILE PART: succeed if the GPU has so much memory; otherwise write FILE.json with the required
# memory and fail.
needs() {
    if ((gpu_gib >= $1)); then return 0; fi
    if [[ " ${wanted[*]} " != *" $4 "* ]]; then return 1; fi
    echo "===== $2: left out: it needs a GPU of $1 GiB, this one has $gpu_gib GiB"
    mkdir -p "$out"
    printf '{"skipped": "needs a GPU of %d GiB, this one has %d GiB"}\n' "$1" "$gpu_gib" >"$out/$3.json"
    return 1
}

# --- steps that several parts need; the first selected part runs them. Repeat them if their output does not exist on this machine
compgen -G 'rlsc_mcore/_C*.so' >/dev/null || rm -f "$out/.done/build"
small=1.5b large=7b
swap_shapes=(qwen2.5-0.5b qwen2.5-1.5b) step_flags=() loop_config=configs/qwen2.5_math_1.5b_1gpu.yaml
kernel_flags=() loop_flags=(--data.template chat --data.questions-per-step 8 --rollout.num-samples 16 --rollout.max-new-tokens 1024)
loop_steps=(--steps 3 --repeats 3) large_steps=(--steps 2) small_model=$models/qwen2.5-1.5b large_model=$models/qwen2.5-7b peer_flags=()
large_flags=(--rollout.kv-cache-gib 8 --optimizer.precision-aware True --training.tokens-per-micro-batch 3328)
seconds_per_case=${SECONDS_PER_CASE:-1.5}
if [[ -n $rehearse ]]; then
    kernel_flags=(--tiny) swap_shapes=() step_flags=(--layers 1 --sequences 2 --sequence-length 24 --prompt-tokens 16 --repeats 1)
    loop_config=configs/tiny_cpu.yaml small_model=embedded:tiny_qwen2 large_model=embedded:tiny_qwen2
    loop_flags=(--data.questions-per-step 2 --rollout.num-samples 2 --rollout.max-new-tokens 4)
    loop_steps=(--steps 1 --repeats 1) large_steps=(--steps 1) large_flags=(--training.tokens-per-micro-batch 256) seconds_per_case=0.01
    peer_flags=(--questions 2 --num-samples 2 --max-new-tokens 4 --steps 2 --turns 1 --per-device-batch 2)
else
    for size in "$small" "$large"; do
        [[ -f $models/qwen2.5-$size/config.json ]] || rm -f "$out/.done/model_$size"
    done
fi

# --- kernels: compare with float64 on the device, then time; nothing else needs the CUDA build
if [[ -z $rehearse ]]; then
    step kernels build 150 env RLSC_NATIVE=cuda "$python" setup.py -q build_ext --inplace
fi
step kernels backends 60 "$python" -c 'from rlsc_mcore.ops import describe_backends; print(*describe_backends(["cpu", "cuda"]), sep="\n")'
if [[ -z $rehearse ]]; then
    step kernels kernel_tests 150 "$python" -m pytest -q -m "" tests/gpu/ops
fi
for bench in log_prob linear_log_prob sequence_sum; do
    step kernels "$bench" 100 "$python" -m "benchmarks.bench_$bench" --seconds "$seconds_per_case" ${kernel_flags[@]+"${kernel_flags[@]}"} --out "$out"
done

# --- swap: the transition from training to sampling, and all ways to bring weights to the engine
if [[ -n $rehearse ]]; then
    step swap weight_swap 100 "$python" -m benchmarks.bench_weight_swap --layers 1 --seconds 0.01 --out "$out"
fi
for shape in ${swap_shapes[@]+"${swap_shapes[@]}"}; do
    step swap "weight_swap_${shape#qwen2.5-}" 120 "$python" -m benchmarks.bench_weight_swap --shape "$shape" --out "$out"
done
if [[ -z $rehearse ]] && needs 60 weight_swap_7b weight_swap_qwen2.5-7b swap; then
    step swap weight_swap_7b 240 "$python" -m benchmarks.bench_weight_swap --shape qwen2.5-7b --out "$out"
fi

# --- train: model FLOPs utilisation and peak memory, loss and gradient norm compared with transformers first
if [[ -n $rehearse ]]; then
    step train train_step 150 "$python" -m benchmarks.bench_train_step "${step_flags[@]}" --out "$out"
else
    step train train_tests 150 "$python" -m pytest -q -m "" tests/gpu/test_train_step_benchmark.py
    step train train_step_1.5b 150 "$python" -m benchmarks.bench_train_step --shape qwen2.5-1.5b --out "$out"
    if needs 130 train_step_7b train_step_qwen2.5-7b train; then
        step train train_step_7b 240 "$python" -m benchmarks.bench_train_step --shape qwen2.5-7b --out "$out"
    fi
fi

# --- loop: the whole step with its engine; trainer and engine must agree first
if [[ -z $rehearse ]]; then
    step loop loop_tests 150 "$python" -m pytest -q -m "" tests/gpu/test_loop.py
    step loop hand_over_tests 150 "$python" -m pytest -q -m "" tests/gpu/test_hand_over.py
    for part in loop peers; do
        step "$part" "model_$small" 120 "$python" -m benchmarks.random_model --shape "qwen2.5-$small" --output "$small_model"
    done
fi
step loop "end_to_end_$small" 240 "$python" -m benchmarks.bench_end_to_end --config "$loop_config" --model.path "$small_model" \
    --data.path embedded:train "${loop_flags[@]}" "${loop_steps[@]}" --out "$out" --label "$small"
if needs 130 "end_to_end_$large" "end_to_end_$large" loop; then
    if [[ -z $rehearse ]]; then
        step loop "model_$large" 240 "$python" -m benchmarks.random_model --shape "qwen2.5-$large" --output "$large_model"
    fi
    step loop "end_to_end_$large" 300 "$python" -m benchmarks.bench_end_to_end --config "$loop_config" --only phases \
        --model.path "$large_model" --data.path embedded:train "${loop_flags[@]}" "${large_flags[@]}" "${large_steps[@]}" \
        --out "$out" --label "$large"
fi

# --- peers: other trainers with the same model, prompts, samples and lengths
if [[ -z $rehearse ]] || "$python" -c 'import trl' 2>/dev/null; then
    step peers trl 300 "$python" -m benchmarks.bench_peers --model "$small_model" ${peer_flags[@]+"${peer_flags[@]}"} --out "$out"
fi

# --- real weights and questions, 20 steps and 3 seeds, with baselines; the next call continues an incomplete run
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
