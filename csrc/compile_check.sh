#!/usr/bin/env bash
# Compile every .cu for every supported GPU generation and check the machine code. Needs no GPU.
#
#   PYTHON=.venv/bin/python bash csrc/compile_check.sh [TORCH_INCLUDE ...]        (nvcc from CUDA_HOME or PATH)
#
# Headers: those of the installed torch (a CPU wheel is enough) and of every given folder, such as
# torch/include of an unpacked wheel of another version. RLSC_COMPILE_TORCH="2.11.0 2.13.0" downloads the
# headers of these versions with pip, so that the pinned torch can be checked if another one is installed. Only
# the headers of a wheel are unpacked, so its platform does not matter.
#
# Prints registers per file and generation. Fails if a file does not compile, a kernel spills registers, or a
# loop loads two bytes at a time (check_sass.py). Without nvdisasm the last check is skipped with a message.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$nvcc" --version | tail -2 | head -1

# fetch_headers VERSION: unpack the headers of a torch wheel and print their folder. Uses the macOS wheel, the
# smallest one.
fetch_headers() {
  "$python" -m pip download -q --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --platform macosx_14_0_arm64 \
    --python-version 3.12 -d "$out/wheel-$1" "torch==$1" >&2
  "$python" - "$out/wheel-$1" "$out/torch-$1" <<'PYTHON'
import sys, zipfile
from pathlib import Path
(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(sys.argv[2], [name for name in archive.namelist() if name.startswith("torch/include/")])
PYTHON
  echo "$out/torch-$1/torch/include"
}

includes=("$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0] + "/include")')" "$@")
for version in ${RLSC_COMPILE_TORCH:-}; do includes+=("$(fetch_headers "$version")"); done

# torch_version INCLUDE: print the torch version of these headers.
torch_version() {
  sed -nE 's/^#define TORCH_VERSION_(MAJOR|MINOR) +([0-9]+).*/\2/p' "$1/torch/headeronly/version.h" | paste -sd.
}

# compile INCLUDE ARCHITECTURE...: compile every file and read ptxas' report of every kernel.
compile() {
  local include=$1 version arch file codes=()
  shift
  version=$(torch_version "$include")
  for arch in "$@"; do codes+=(-gencode "arch=compute_${arch#sm_},code=$arch"); done
  for file in cuda/*.cu; do
    "$nvcc" -std=c++20 -O3 --expt-relaxed-constexpr -Xptxas -v -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "$include" \
      -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__ \
      "${codes[@]}" --threads 2 --keep --keep-dir "$out" -c "$file" -o "$out/object.o" 2> "$out/log" ||
      { cat "$out/log"; echo "FAILED $file with the headers of torch $version"; exit 1; }
    for arch in "$@"; do
      # Lines per kernel: "Compiling entry function ... for 'sm_90'", then stack and spills, then registers.
      awk -v arch="'$arch'" -v name="$file $arch, torch $version" '
        /Compiling entry function/ { here = index($0, arch) > 0; kernels += here }
        here && /spill stores/ { spills += $5 }
        here && /Used [0-9]+ registers/ { if ($5 > most) most = $5 }
        END { printf "%s: %d kernels, at most %d registers, %d bytes spilled\n", name, kernels, most, spills; exit !(kernels > 0 && spills == 0) }
      ' "$out/log" || { echo "FAILED $file $arch: no kernel, or registers spill"; exit 1; }
    done
  done
}

# Headers affect only the host code, so the other versions are compiled for one generation.
for include in "${includes[@]:1}"; do compile "$include" sm_90; done
compile "${includes[0]}" sm_80 sm_90 sm_100 sm_120

if "$python" -c 'import sys; sys.path.insert(0, "."); import check_sass; sys.exit(check_sass.find_tool("nvdisasm") is None)'; then
  "$python" check_sass.py "$out"/*.cubin
else
  echo "machine code: not looked at (no nvdisasm: install triton or nvidia-cuda-nvdisasm)"
fi
