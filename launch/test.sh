#!/usr/bin/env bash
# Install missing packages and run the default test suite; arguments are passed to pytest (for example:
# -m slow, -k swap, tests/unit). Without arguments two files are tested at a time. On a machine with a GPU it
# is one file, because one engine fills the GPU memory.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --with test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # without byte code each start of vLLM takes seconds longer
cores=$(env -u OMP_NUM_THREADS nproc) # which counts threads of OpenMP where it can
if (($# == 0)) && ((cores > 1)) && [[ ! -e /dev/nvidia0 ]]; then set -- -n 2 --dist loadfile --max-worker-restart 0; fi
exec "${RLSC_VENV:-.venv}/bin/python" -m pytest "$@"
