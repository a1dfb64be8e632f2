#!/usr/bin/env bash
# Install a stack into an image, as root: bash launch/images/install.sh STACK. The Dockerfiles and rlsc.def run
# this. The native ops of the stack's device must be built, or the image is not built. RLSC_TORCH_INDEX is
# passed on.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
stack=${1:?expected a stack, such as cpu or gpu}
native=cpu
if [[ $stack == gpu* ]]; then native=cuda; fi
RLSC_STACK=$stack RLSC_NATIVE=$native bash "$root/launch/install.sh"

# Users of an image cannot write byte code, and without it each start takes seconds longer. Some packages
# contain files of other Python versions, which do not compile.
"$root/.venv/bin/python" -m compileall -q -j 0 "$root/rlsc_mcore" "$root/.venv/lib" >/dev/null 2>&1 || true
chmod -R a+rX "$root"
rm -rf /var/lib/apt/lists/* /var/cache/dnf /root/.cache "$root/build"
