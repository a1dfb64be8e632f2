# shellcheck shell=bash
# Choose the interpreter of the launch scripts and make it import this code. Sourced, never run. Sets RLSC_ROOT
# and host_python. RLSC_ROOT is the checkout, or the package of an installed wheel, which contains launch and
# configs too.

RLSC_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RLSC_ROOT
host_python=${PYTHON:-}
if [[ -d $RLSC_ROOT/rlsc_mcore ]]; then
    export PYTHONPATH=$RLSC_ROOT${PYTHONPATH:+:$PYTHONPATH}
    environment=$RLSC_ROOT/.venv
else
    environment=$(cd "$RLSC_ROOT/../../../.." && pwd) # above lib/python3.*/site-packages/rlsc_mcore
fi
if [[ -z $host_python && -x $environment/bin/python ]]; then host_python=$environment/bin/python; fi
host_python=${host_python:-$(command -v python3 || true)}
unset environment
