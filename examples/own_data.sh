#!/usr/bin/env bash
# Train on questions of your own, and evaluate on them: bash examples/own_data.sh [RUN_FOLDER [OPTIONS OF rlsc train]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${1:-runs/own_data}
python=${PYTHON:-.venv/bin/python}
questions=$(mktemp --suffix .jsonl)
trap 'rm -f "$questions"' EXIT
for number in $(seq 1 16); do
    printf '{"question": "What is %d + 7?", "answer": "%d"}\n' "$number" "$((number + 7))"
done >"$questions"
"$python" -m rlsc_mcore.cli train --config configs/tiny_cpu.yaml --run-dir "$run" --data.path "$questions" \
    --evaluation.path "$questions" --data.questions-per-step 8 --training.num-steps 2 "${@:2}"
