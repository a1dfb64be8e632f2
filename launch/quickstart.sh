#!/usr/bin/env bash
# Install missing packages and train the embedded model by RLSC; arguments are passed to `rlsc quickstart`
# (see --help). Paths are relative to the repository's root; the run is written to runs/quickstart there.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
begin=$(date +%s%N)
bash launch/install.sh
milliseconds=$((($(date +%s%N) - begin) / 1000000))
RLSC_INSTALL_SECONDS=$((milliseconds / 1000)).$(printf %03d $((milliseconds % 1000)))
export RLSC_INSTALL_SECONDS
unset PYTHONDONTWRITEBYTECODE # without byte code each start of vLLM takes seconds longer
exec "${RLSC_VENV:-.venv}/bin/python" -m rlsc_mcore.cli quickstart "$@"
